"""What a person sees: messages on stderr, data on stdout.

Three ways of showing progress, chosen by where the output goes: a live line on a terminal, a plain line now and then in
a file or a pipe, JSON events with `--json`. `NO_COLOR` and `TERM=dumb` are honoured.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from finetune.errors import FinetuneError

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}

PLAIN_INTERVAL_SECONDS = 15.0
"""How often a plain progress line is printed at first when stderr is not a terminal."""

_LONGEST = 4000
"""Characters of one message: some forty lines."""

LIVE_INTERVAL_SECONDS = 0.1
"""How often the live line is redrawn: the eye sees no more."""


class Console:
    """Where all of a command's output goes. `json_events` turns messages into one JSON object a line on stdout."""

    def __init__(self, *, json_events: bool = False) -> None:
        self.json_events = json_events
        # Held from the start: while libraries run, sys.stdout and sys.stderr lead into the run's log.
        self._out: TextIO = sys.stdout
        self._err: TextIO = sys.stderr
        if isinstance(self._out, io.TextIOWrapper):
            # An arrow that the terminal's encoding lacks is no reason to fail; stderr is like this from the start.
            self._out.reconfigure(errors="backslashreplace")
        self._live = False

    # -- where the output goes ------------------------------------------------------------------------------------

    @property
    def is_terminal(self) -> bool:
        return self._err.isatty() and os.environ.get("TERM") != "dumb" and not self.json_events

    def style(self, text: str, name: str) -> str:
        """`text` in a colour or weight, where stderr shows them."""
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not self._err.isatty()
        return text if plain else f"\x1b[{_STYLES[name]}m{text}\x1b[0m"

    # -- messages -------------------------------------------------------------------------------------------------

    def say(self, text: str = "") -> None:
        """A line for the person."""
        if self.json_events:
            if text:
                self.event("message", text=text)
            return
        self._clear_live()
        self._tell(redacted(text) + "\n")

    def warn(self, text: str) -> None:
        text = redacted(text)
        if self.json_events:
            self.event("warning", text=text)
            return
        self._clear_live()
        self._tell(f"{self.style('warning:', 'yellow')} {text}\n")

    def error(self, error: FinetuneError) -> None:
        """Print every problem of an error as `error:` and `hint:` lines."""
        self._clear_live()
        for problem in error.problems:
            hint = redacted(problem.hint) if problem.hint else None
            if self.json_events:
                place = redacted(problem.place) if problem.place else None
                self.event("error", message=redacted(problem.message), place=place, hint=hint)
                continue
            self._tell(f"{self.style('error:', 'red')} {printable(redacted(str(problem)))}\n")
            if hint:
                self._tell(f"{self.style('hint:', 'cyan')} {printable(hint)}\n")

    def event(self, kind: str, **fields: Any) -> None:
        """A machine-readable event; nothing is printed unless `--json` was given."""
        if self.json_events:
            text = json.dumps(finite({"event": kind, **fields}), ensure_ascii=False, allow_nan=False)
            try:
                self._out.write(text + "\n")
                self._out.flush()
            except (OSError, ValueError):
                self._out = _nobody(self._out)

    def data(self, text: str) -> None:
        """What was asked for, on stdout, so that it can be piped. Ends the command where nobody reads it any more."""
        self._clear_live()
        try:
            self._out.write(text + "\n")
            self._out.flush()
        except BrokenPipeError:
            self._out = _nobody(self._out)
            raise SystemExit(0) from None  # `ft runs | head` is no error

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *, stdout: bool = False) -> None:
        """A table with aligned columns: text to the left, numbers to the right."""
        lines = render_table(header, list(rows))
        if stdout:
            self.data("\n".join(lines))
            return
        for number, line in enumerate(lines):
            self.say(self.style(line, "bold") if number == 0 else line)

    # -- progress -------------------------------------------------------------------------------------------------

    def progress(self, label: str, total: int | None = None, *, unit: str = "") -> Progress:
        return Progress(self, label, total, unit)

    def _draw_live(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        self._tell("\r\x1b[2K" + text[: width - 1])
        self._live = True

    def _clear_live(self) -> None:
        if self._live:
            self._live = False
            self._tell("\r\x1b[2K")

    def _tell(self, text: str) -> None:
        """Write for the person. One who has closed the terminal, or ended what reads it, is no reason to end a run."""
        try:
            self._err.write(text)
            self._err.flush()
        except (OSError, ValueError):
            self._err = _nobody(self._err)


class Progress:
    """A long step's progress. Use as a context manager; call `update` as often as you like."""

    def __init__(self, console: Console, label: str, total: int | None, unit: str) -> None:
        self._console, self._label, self.total, self._unit = console, label, total, unit
        self._done = 0
        self._started = time.monotonic()
        self._shown = self._started

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._console._clear_live()

    def update(self, done: int, detail: str = "") -> None:
        """`done` of the total is behind us; `detail` is shown beside the bar."""
        self._done = done
        now = time.monotonic()
        # In a log, lines become rarer as time goes on: 20 in eight minutes, 75 in a day.
        plain = max(PLAIN_INTERVAL_SECONDS, (now - self._started) / 10)
        interval = LIVE_INTERVAL_SECONDS if self._console.is_terminal else plain
        if now - self._shown < interval:
            return
        self._shown = now
        if self._console.is_terminal:
            self._console._draw_live(self._line(bar=True) + ("  " + detail if detail else ""))
        elif not self._console.json_events:
            self._console.say(self._line(bar=False) + ("  " + detail if detail else ""))

    def count(self, done: int, total: int, detail: str) -> None:
        """`update`, for steps that learn the total on the way."""
        self.total = total
        self.update(done, detail)

    def advance(self, detail: str = "") -> None:
        self.update(self._done + 1, detail)

    def _line(self, *, bar: bool) -> str:
        unit = f" {self._unit}" if self._unit else ""
        if not self.total:
            return f"{self._label} {self._done:,}{unit}"
        share = min(1.0, self._done / self.total)
        counts = f"{self._done:,}/{self.total:,}{unit}"
        if not bar:
            return f"{self._label} {counts}"
        filled = round(share * 20)
        return f"{self._label} {'━' * filled}{'╌' * (20 - filled)} {counts}"

    def seconds_left(self) -> float | None:
        """An estimate from the mean pace so far, or None before there is one."""
        if not self.total or not self._done:
            return None
        return (time.monotonic() - self._started) / self._done * (self.total - self._done)


def redacted(text: str) -> str:
    """A text without the secrets in it (`redaction.redacted`, which takes 5 ms to load: `ft --help` does without)."""
    from finetune.redaction import redacted

    return redacted(text)


def _nobody(stream: TextIO) -> TextIO:
    """A stream in place of one whose reader has left. What is left in that one's buffer goes nowhere, too."""
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nowhere.fileno(), stream.fileno())
    return nowhere


def printable(text: str) -> str:
    """One line of bearable length, with characters that control a terminal or turn text around spelt out.

    What a file holds must not move the cursor, hide an error or make it read otherwise.
    """
    shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]", _spelt_out, shown)


def _spelt_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def finite(value: Any) -> Any:
    """A value as JSON can hold it: infinities and what is not a number become null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines; a column whose every cell looks like a number is set to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(_looks_numeric(row[column]) for row in cells[1:]) for column in range(len(header))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def _looks_numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or (cell[0] in "+-−–" and len(cell) > 1 and cell[1].isdigit()) or cell in "–-"


def duration(seconds: float) -> str:
    """`95` → `1:35`, `7500` → `2:05:00`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def size(number: float) -> str:
    """Bytes for people: `1536` → `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")
