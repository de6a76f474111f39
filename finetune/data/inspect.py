"""`ft data`: rows as the model will see them, the tokens with loss set apart, and how long rows are."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.prepare import PreparedData, TokenRow
from finetune.errors import DataError

BARS = 8
"""Lines in the histogram of lengths."""


def show_rows(data: PreparedData, config: Config, console: Console, *, first: int, count: int) -> None:
    """Print the histogram and some training rows; with `--json`, one object per row."""
    if not 1 <= first <= len(data.train):
        raise DataError(
            "there is no such row to train on", place=f"--row {first}", hint=f"name one from 1 to {len(data.train):,}"
        )
    chosen = data.train[first - 1 : first - 1 + max(count, 0)]
    if console.json_events:
        for number, row in enumerate(chosen, first):
            console.event(
                "row",
                number=number,
                place=row.place,
                tokens=len(row.ids),
                supervised=int(row.supervised.sum()),
                segments=[{"loss": loss, "text": text} for loss, text in segments(data, row)],
            )
        return
    console.say()
    for line in histogram([len(row.ids) for row in data.train]):
        console.say(line)
    if data.packs is not None:
        full = data.tokens / (len(data.packs) * config.train.sequence_length)
        console.say(f"packed into {len(data.packs):,} sequences of {config.train.sequence_length:,}, {full:.1%} full")
    console.say()
    console.say("with loss in [[double brackets]]" if console.style("x", "green") == "x" else "with loss in green")
    for number, row in enumerate(chosen, first):
        console.say()
        console.say(
            console.style(
                f"row {number}, {row.place}: {len(row.ids)} tokens, {int(row.supervised.sum())} with loss", "bold"
            )
        )
        parts = []
        for loss, text in segments(data, row):
            coloured = console.style(text, "green")
            parts.append(text if not loss else coloured if coloured != text else f"[[{text}]]")
        console.say("".join(parts))


def segments(data: PreparedData, row: TokenRow) -> list[tuple[bool, str]]:
    """A row's text in stretches with and without loss, special tokens visible."""
    found: list[tuple[bool, str]] = []
    begin = 0
    for end in range(1, len(row.ids) + 1):
        if end == len(row.ids) or row.supervised[end] != row.supervised[begin]:
            text = data.tokenizer.decode(row.ids[begin:end].tolist(), skip_special=False)
            found.append((bool(row.supervised[begin]), text))
            begin = end
    return found


def histogram(lengths: Sequence[int]) -> list[str]:
    """Rows by length in tokens, in equal steps."""
    longest = max(lengths)
    step = max(1, -(-longest // BARS))
    counts = [0] * -(-longest // step)
    for length in lengths:
        counts[(length - 1) // step] += 1
    width = len(f"{longest:,}")
    lines = [f"tokens per row: {min(lengths):,} to {longest:,}"]
    for index, count in enumerate(counts):
        low, high = index * step + 1, min((index + 1) * step, longest)
        bar = "█" * max(round(40 * count / max(counts)), 1 if count else 0)
        lines.append(f"{low:>{width},}–{high:<{width},} {bar} {count:,}")
    return lines
