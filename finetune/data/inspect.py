"""`ft data`: rows as the model will see them, the tokens with loss set apart, and how long rows are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.prepare import PreparedData
from finetune.data.store import TokenRow
from finetune.errors import DataError

BARS = 8
"""Lines in the histogram of lengths."""

FIND_BATCH = 1000
"""Rows that are turned back into text at a time when looking for something."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
"""What a terminal would obey or not show at all."""


@dataclass(frozen=True)
class Wanted:
    """Which rows to show: `count` of the training rows from number `first` on, of those that hold `find`."""

    first: int = 1
    count: int = 3
    find: str | None = None
    html: Path | None = None
    """Show them in a page instead of the terminal."""


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens that all carry loss or all do not. A special token is a segment of its own."""

    loss: bool
    special: bool
    text: str


def show_rows(data: PreparedData, config: Config, console: Console, wanted: Wanted, account: Sequence[str]) -> None:
    """Print the histogram and some training rows; with `--json`, one object per row; with `--html`, write a page.

    `account` is what was said about the data as a whole, for the page.
    """
    if wanted.html is not None:
        from finetune.data.page import write_page

        write_page(wanted.html, data, config, list(_chosen(data, wanted)), [*account, *summary(data, config)])
        console.say(f"wrote {wanted.html}")
        return
    if console.json_events:
        for number, row in _chosen(data, wanted):
            console.event(
                "row",
                number=number,
                place=row.place,
                tokens=len(row.ids),
                supervised=int(row.supervised.sum()),
                segments=[
                    {"loss": part.loss, "special": part.special, "text": part.text} for part in segments(data, row)
                ],
            )
        return
    chosen = _chosen(data, wanted)
    following = next(chosen, None)
    console.say()
    for line in [*histogram(data.train.lengths.tolist()), *summary(data, config)]:
        console.say(line)
    console.say()
    plain = console.style("x", "green") == "x"
    console.say("with loss in [[double brackets]]" if plain else "with loss in green, special tokens in cyan and bold")
    while following is not None:
        number, row = following
        console.say()
        supervised = int(row.supervised.sum())
        head = f"row {number}, {row.place}: {len(row.ids)} tokens, {supervised} with loss"
        console.say(console.style(head, "bold"))
        console.say(_bracketed(segments(data, row)) if plain else _coloured(segments(data, row), console))
        following = next(chosen, None)


def summary(data: PreparedData, config: Config) -> list[str]:
    """What else there is to know about the training rows as a whole."""
    accounting = data.accounting
    lines = []
    if data.packs is not None:
        full = data.tokens / (len(data.packs) * config.train.sequence_length)
        lines.append(f"packed into {len(data.packs):,} sequences of {config.train.sequence_length:,}, {full:.1%} full")
    if accounting.languages:
        total = sum(accounting.languages.values())
        common = sorted(accounting.languages.items(), key=lambda item: -item[1])[:4]
        shown = ", ".join(f"{language} {count / total:.0%}" for language, count in common)
        lines.append(f"languages (guessed, of {total:,} rows): {shown}")
    if accounting.outliers:
        lines.append(f"far longer than the rest: {accounting.outliers:,} rows ({accounting.first_outlier})")
    return lines


def segments(data: PreparedData, row: TokenRow) -> list[Segment]:
    """A row's text in stretches, special tokens visible."""
    special = data.tokenizer.special_ids
    kinds = [
        (loss, token if token in special else -1)
        for token, loss in zip(row.ids.tolist(), row.supervised.tolist(), strict=True)
    ]
    found: list[Segment] = []
    begin = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[begin] or kinds[end][1] >= 0:
            text = data.tokenizer.decode(row.ids[begin:end].tolist(), skip_special=False)
            found.append(Segment(kinds[begin][0], kinds[begin][1] >= 0, text))
            begin = end
    return found


def visible(text: str) -> str:
    """Text with control characters spelled out: a row may hold what a terminal would obey."""
    return _CONTROL.sub(
        lambda match: f"\\x{ord(match[0]):02x}" if match[0] < "\u0100" else f"\\u{ord(match[0]):04x}", text
    )


def histogram(lengths: Sequence[int]) -> list[str]:
    """Rows by length in tokens, in equal steps."""
    longest = max(lengths)
    width = len(f"{longest:,}")
    lines = [f"tokens per row: {min(lengths):,} to {longest:,}"]
    bars = binned(lengths)
    highest = max(count for _, _, count in bars)
    for low, high, count in bars:
        bar = "█" * max(round(40 * count / highest), 1 if count else 0)
        lines.append(f"{low:>{width},}–{high:<{width},} {bar} {count:,}")
    return lines


def binned(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, rows) for each bar of the histogram."""
    longest = max(lengths)
    step = max(1, -(-longest // BARS))
    counts = [0] * -(-longest // step)
    for length in lengths:
        counts[(length - 1) // step] += 1
    return [(index * step + 1, min((index + 1) * step, longest), count) for index, count in enumerate(counts)]


def _chosen(data: PreparedData, wanted: Wanted) -> Iterator[tuple[int, TokenRow]]:
    rows = data.train
    if not 1 <= wanted.first <= len(rows):
        raise DataError(
            "there is no such row to train on", place=f"--row {wanted.first}", hint=f"name one from 1 to {len(rows):,}"
        )
    numbers: Iterator[int] = iter(range(wanted.first, len(rows) + 1))
    if wanted.find is not None:
        numbers = _holding(data, wanted.find, wanted.first)
    any_found = False
    for number in islice(numbers, max(wanted.count, 0)):
        any_found = True
        yield number, rows[number - 1]
    if wanted.find is not None and not any_found and wanted.count > 0:
        raise DataError(
            "no row to train on holds this text",
            place=f"--find {wanted.find}",
            hint="it is looked for as the model sees it, upper and lower case alike",
        )


def _holding(data: PreparedData, text: str, first: int) -> Iterator[int]:
    """The numbers of the training rows whose text, special tokens included, holds `text`."""
    wanted = text.casefold()
    for begin in range(first - 1, len(data.train), FIND_BATCH):
        ids = [row.ids.tolist() for row in data.train[begin : begin + FIND_BATCH]]
        for number, found in enumerate(data.tokenizer.decode_batch(ids), begin + 1):
            if wanted in found.casefold():
                yield number


def _bracketed(parts: Sequence[Segment]) -> str:
    """Loss marked without colour."""
    text, inside = "", False
    for part in parts:
        if part.loss != inside:
            text += "[[" if part.loss else "]]"
            inside = part.loss
        text += visible(part.text)
    return text + ("]]" if inside else "")


def _coloured(parts: Sequence[Segment], console: Console) -> str:
    found = ""
    for part in parts:
        text = visible(part.text)
        if part.special:
            text = console.style(text, "cyan")
            text = console.style(text, "bold") if part.loss else text
        elif part.loss:
            text = console.style(text, "green")
        found += text
    return found
