"""What a person sees: messages on stderr, data on stdout, JSON for programs, and numbers that read well."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.console import Console, duration, finite, printable, render_table, size
from finetune.errors import ConfigError, Problem

TURNING = "\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that are not seen, and change how others are."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called within a test, since pytest sets stderr anew when a test begins."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_messages_go_to_stderr_and_data_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("hello")
    console.warn("careful")
    console.data("a,b")
    console.table(["x"], [["1"]], stdout=True)
    console.event("nothing", without="json")
    shown = capsys.readouterr()
    assert shown.err == "hello\nwarning: careful\n"
    assert shown.out == "a,b\nx\n1\n"


def test_every_problem_of_an_error_has_its_line_and_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(ConfigError([Problem("wrong", "a.yaml:3", "mend it"), Problem("bad")]))
    assert capsys.readouterr().err == "error: a.yaml:3: wrong\nhint: mend it\nerror: bad\n"


def test_what_a_file_holds_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(ConfigError("key \x1b[2K\r'a\nb'\x9b", place="x\ty", hint="see\x07"))
    assert capsys.readouterr().err == "error: x\\ty: key \\x1b[2K\\r'a\\nb'\\x9b\nhint: see\\x07\n"


@given(st.text())
def test_printable_is_one_line_and_keeps_what_can_be_read(text: str) -> None:
    def controls(text: str) -> bool:
        return any(unicodedata.category(character) in ("Cc", "Zl", "Zp") or character in TURNING for character in text)

    shown = printable(text)
    assert not controls(shown)
    assert shown == text or controls(text)


def test_text_that_turns_around_is_spelt_out_and_a_long_one_is_cut() -> None:
    assert printable("abc\u202edef") == "abc\\u202edef"
    assert len(printable("x" * 100_000)) < 5000


def test_a_reader_that_has_left_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ft train … 2>&1 | tee log`, and Ctrl-C ends tee: the run still has to be saved."""
    ends = [os.pipe() for _ in range(2)]
    streams = [os.fdopen(write, "w") for _, write in ends]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    console, events = Console(), Console(json_events=True)
    for read, _ in ends:
        os.close(read)
    console.say("hello")
    console.warn("careful")
    console.error(ConfigError("wrong"))
    console._draw_live("half way")
    console.say("again")
    events.event("metrics", loss=1.0)
    for stream in (*streams, console._err, events._out):
        stream.close()


def test_data_that_nobody_reads_ends_the_command_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    console = Console()
    os.close(read)
    with pytest.raises(SystemExit) as ended:
        console.data("a,b")
    assert ended.value.code == 0
    for each in (stream, console._out):
        each.close()


def test_json_events(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json_events=True)
    console.say("hello")
    console.say()
    console.warn("careful")
    console.event("metrics", loss=math.nan, nested=[{"x": math.inf}, (1, 2.5)])
    console.error(ConfigError("wrong", place="a.yaml:3", hint="mend it"))
    with console.progress("working", 10) as progress:
        progress.update(10)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert [json.loads(line) for line in shown.out.splitlines()] == [
        {"event": "message", "text": "hello"},
        {"event": "warning", "text": "careful"},
        {"event": "metrics", "loss": None, "nested": [{"x": None}, [1, 2.5]]},
        {"event": "error", "message": "wrong", "place": "a.yaml:3", "hint": "mend it"},
    ]


@given(st.recursive(st.floats() | st.text() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_anything_finite_is_json(value: Any) -> None:
    json.dumps(finite(value), allow_nan=False)


def test_colours_only_where_they_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    on_terminal(monkeypatch)
    assert Console().style("x", "red") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console().style("x", "red") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert Console().style("x", "red") == "x"
    assert not Console().is_terminal


def test_a_pipe_gets_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    assert Console().style("x", "red") == "x"


def test_a_live_line_is_redrawn_and_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console = Console()
    with console.progress("reading", 200, unit="rows") as progress:
        for done in range(0, 201, 10):
            now[0] += 0.05
            progress.update(done, "detail")
        assert progress.seconds_left() == pytest.approx(0)
    console.say("done")
    drawn = terminal.getvalue().split("\r\x1b[2K")
    assert 9 <= len(drawn) <= 13
    assert "reading ━" in drawn[5]
    assert "rows  detail" in drawn[5]
    assert all(len(line) < 60 for line in drawn)
    assert drawn[-1] == "done\n"


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Console().progress("reading", 1000) as progress:
        for _ in range(1000):
            now[0] += 0.1
            progress.advance()
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] in ("reading 150/1,000", "reading 151/1,000")
    assert len(shown) == 6


def test_a_stream_that_lacks_a_letter_gets_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    Console().data("a → b")
    assert buffer.getvalue() == b"a \\u2192 b\n"


def test_a_table_is_aligned() -> None:
    assert render_table(["run", "loss"], [["a", "1.25"], ["longer", "–"], ["b", ""]]) == [
        "run     loss",
        "a       1.25",
        "longer     –",
        "b",
    ]
    assert render_table(["only", "header"], []) == ["only  header"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (95, "1:35"),
        (3599.9, "1:00:00"),
        (7500, "2:05:00"),
        (1e6, "277:46:40"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_sizes(number: float, shown: str) -> None:
    assert size(number) == shown
