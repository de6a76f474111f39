"""How much there is to train on: sequences, their tokens, and what padding adds to them."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from finetune.config.schema import Train
from finetune.plan.setup import Setup

if TYPE_CHECKING:
    from finetune.data.prepare import PreparedData

CHARACTERS_A_TOKEN = 4
"""For a guess where there is no tokenizer. English prose has 4 to 5 with the usual vocabularies, code and other
languages fewer; the markup around a row counts as text here, which makes up for some of it."""


@dataclass(frozen=True)
class Amount:
    """What is trained on in one epoch."""

    lengths: tuple[int, ...]
    """Tokens of a sequence (with packing, of a pack): each number that occurs once, ascending."""
    counts: tuple[int, ...]
    """How many sequences have that many."""
    supervised: int
    """Tokens with loss."""
    row: int
    """Tokens of the row that an average token stands in (Σ l² / Σ l): what attention costs."""
    longest_row: int
    counted: bool
    """Whether tokens were counted, or guessed from characters."""

    @cached_property
    def sequences(self) -> int:
        return sum(self.counts)

    @cached_property
    def tokens(self) -> int:
        return sum(length * count for length, count in zip(self.lengths, self.counts, strict=True))

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @property
    def share(self) -> float:
        """Of the tokens, those with loss."""
        return self.supervised / self.tokens

    def padded(self, micro_batch: int) -> float:
        """Tokens of a sequence on average, when each is filled up to the longest of its micro batch.

        The expected maximum of m draws: Σ l · (F(l)^m - F(l-1)^m), F the share of sequences of at most l tokens.
        """
        mean, below = 0.0, 0.0
        seen = 0
        for length, count in zip(self.lengths, self.counts, strict=True):
            seen += count
            reached = (seen / self.sequences) ** micro_batch
            mean += length * (reached - below)
            below = reached
        return mean

    def most(self, count: int, *, together: bool) -> int:
        """Tokens of the largest micro batch of `count` sequences, or of as many as there are: of the longest ones, end
        to end (`together`), or each filled up to the longest of all. It is the one that training tries first
        (train/batches.py, `longest`)."""
        if not together:
            return min(count, self.sequences) * self.longest
        at = bisect_left(self._sums[0], min(count, self.sequences))
        seen, tokens = (self._sums[0][at - 1], self._sums[1][at - 1]) if at else (0, 0)
        return tokens + (min(count, self.sequences) - seen) * self.lengths[-1 - at]

    @cached_property
    def _sums(self) -> tuple[list[int], list[int]]:
        """How many sequences are at least as long as each length, the longest first, and their tokens."""
        counts = self.counts[::-1]
        tokens = (length * count for length, count in zip(self.lengths[::-1], counts, strict=True))
        return list(accumulate(counts)), list(accumulate(tokens))

    def shortened(self, limit: int) -> Amount:
        """As many tokens in sequences of at most `limit`: longer ones are taken to be split."""
        kept: dict[int, int] = {}
        for length, count in zip(self.lengths, self.counts, strict=True):
            pieces = math.ceil(length / limit)
            part = math.ceil(length / pieces)
            kept[part] = kept.get(part, 0) + count * pieces
        lengths = tuple(sorted(kept))
        return replace(
            self,
            lengths=lengths,
            counts=tuple(kept[length] for length in lengths),
            row=min(self.row, limit),
            longest_row=min(self.longest_row, limit),
        )


def amount_of(data: PreparedData) -> Amount:
    """What was prepared, counted. Reads the lengths of rows only."""
    import numpy as np

    rows = data.train.lengths
    found, counts = np.unique(rows if data.packs is None else data.packs.lengths(rows), return_counts=True)
    return Amount(
        lengths=tuple(found.tolist()),
        counts=tuple(counts.tolist()),
        supervised=data.supervised_tokens,
        row=round(float((rows.astype(float) ** 2).sum() / rows.sum())),
        longest_row=int(rows.max()),
        counted=True,
    )


def guessed_amount(characters: int, rows: int, train: Train) -> Amount:
    """A guess from the size of the data. One sequence is taken to be as long as `train.sequence_length` allows, and
    every token to carry loss, so that memory is not guessed too low."""
    limit = train.sequence_length
    tokens = max(rows, characters // CHARACTERS_A_TOKEN)
    row = min(limit, math.ceil(tokens / rows))
    if train.packing:
        found = {limit: math.ceil(tokens / limit)}
    else:
        found = {row: rows - 1, limit: 1} if row < limit and rows > 1 else {limit: rows}
    lengths = tuple(sorted(found))
    counts = tuple(found[length] for length in lengths)
    every = sum(length * count for length, count in found.items())
    return Amount(lengths, counts, supervised=every, row=row, longest_row=limit, counted=False)


def steps_in_all(sequences: int, train: Train) -> int:
    """Optimizer steps of the whole run, counted as transformers counts them: an epoch's last, partial step counts."""
    if train.max_steps is not None:
        return train.max_steps
    batches = math.ceil(sequences / train.micro_batch_size)
    per_epoch = math.ceil(batches / train.gradient_accumulation_steps)
    return max(1, math.ceil(per_epoch * train.epochs))


def sequences_in(steps: int, sequences: int, train: Train) -> int:
    """Sequences that so many steps train on: an epoch's last step may be short of some."""
    in_a_step = train.effective_batch
    epochs, rest = divmod(steps, math.ceil(sequences / in_a_step))
    return epochs * sequences + min(sequences, rest * in_a_step)


def typical(setup: Setup, amount: Amount) -> Setup:
    """The setup's average micro batch, where the setup itself describes the largest."""
    together = setup.kernels.attention == "varlen"
    sequence = amount.tokens / amount.sequences if together else amount.padded(setup.micro_batch)
    real = amount.tokens / amount.sequences / sequence
    length = max(1, round(sequence))
    return replace(setup, most=None, sequence=length, row=min(length, amount.row), supervised=amount.share * real)
