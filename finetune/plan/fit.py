"""Cutting a step so that it fits a card and is quick: the micro batch, the recomputed layers, the offload.

All cuts of a step train the same (micro batch × accumulation is kept), so that nothing but memory and time decides.
There are few enough of them to look at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from finetune.plan.amount import Amount, typical
from finetune.plan.gpus import Card
from finetune.plan.memory import adapter_parameters, evaluation_memory, training_memory
from finetune.plan.setup import Fit, Setup
from finetune.plan.time import Work, work_of

RESERVE = 0.05
"""The share of a card that is left free: the plan is meant to be at most so much too low, and torch's allocator cannot
use all of what it holds (it hands out pieces of blocks)."""

LARGEST = 4096
"""The largest micro batch that is looked at: no card has memory for more."""

DEPTHS = 128
"""So many numbers of recomputed layers are looked at: each, in every published model."""

SEQUENCE_LENGTHS = (8192, 4096, 2048, 1024, 512)
"""Shorter sequences that are proposed where nothing gentler helps; below 512 few conversations have room."""

MANY = 2**20
"""More held-out rows than one batch of the evaluation has room for."""

RANKS = (8, 4)
"""Lower ranks that are proposed last."""


def budget(card: Card) -> int:
    """Bytes of a card that a training may take."""
    return int(card.memory * (1 - RESERVE)) - card.in_use


@dataclass(frozen=True)
class Candidate:
    """One way to cut a step."""

    fit: Fit
    memory: int
    """Bytes at the peak, with the longest sequences; of the evaluation, where that is more."""
    work: Work
    """Of the average micro batch."""

    def seconds_a_sequence(self, card: Card) -> float:
        return self.work.seconds(card) / self.fit.micro_batch


@lru_cache(maxsize=64)
def candidates(
    setup: Setup,
    amount: Amount,
    effective_batch: int,
    evaluated: bool,
    keep_recomputed: int | None,
    keep_offload: bool | None,
) -> tuple[Candidate, ...]:
    """Every cut of a step of `effective_batch` sequences, as far as it is not kept as it is."""
    found = []
    evaluation = evaluation_bytes(setup) if evaluated else 0
    sizes = [size for size in range(1, min(effective_batch, LARGEST) + 1) if effective_batch % size == 0]
    layers = setup.shape.layers
    counts = {*range(0, layers, math.ceil(layers / DEPTHS)), layers} if keep_recomputed is None else {keep_recomputed}
    for micro in sizes:
        for recomputed in sorted(counts):
            # Without recomputation there is nothing to offload.
            for offload in (False, True) if keep_offload is None and recomputed else (bool(keep_offload),):
                fit = Fit(micro, effective_batch // micro, recomputed, offload)
                cut = cut_as(setup, fit)
                found.append(Candidate(fit, max(evaluation, training_memory(cut).total), work_of(typical(cut, amount))))
    return tuple(found)


def evaluation_bytes(setup: Setup) -> int:
    """The evaluation's peak: full batches of held-out rows as long as the longest of training, and the adapter."""
    adapter = 4 * adapter_parameters(setup.shape, setup.rank, setup.targets)
    return adapter + evaluation_memory(setup.shape, setup.quantization, setup.dtype_bytes, (MANY, setup.row))


def cut_as(setup: Setup, fit: Fit) -> Setup:
    return replace(setup, micro_batch=fit.micro_batch, recomputed=fit.recomputed, offload=fit.offload)


def fitted(
    setup: Setup,
    amount: Amount,
    effective_batch: int,
    budget_bytes: int,
    card: Card,
    *,
    evaluated: bool,
    keep_recomputed: int | None = None,
    keep_offload: bool | None = None,
) -> Fit | None:
    """The quickest cut that needs at most `budget_bytes`, or None. Of equals the simplest: no offload, few recomputed.

    setup            its own micro batch, recomputed layers and offload do not matter
    effective_batch  sequences in a step
    evaluated        whether the evaluation afterwards has to fit too
    keep_…           what the config says itself, and is not to be chosen
    """
    found = [
        candidate
        for candidate in candidates(setup, amount, effective_batch, evaluated, keep_recomputed, keep_offload)
        if candidate.memory <= budget_bytes
    ]
    if not found:
        return None
    return min(found, key=lambda one: (one.seconds_a_sequence(card), one.fit.offload, one.fit.recomputed)).fit


@dataclass(frozen=True)
class Changed:
    """A setup that fits, and what was changed for it."""

    setup: Setup
    amount: Amount
    fit: Fit
    changes: tuple[str, ...]
    """As one writes them behind `-s`; none if it fits as it is."""


def changes_that_fit(
    setup: Setup,
    amount: Amount,
    effective_batch: int,
    budget_bytes: int,
    card: Card,
    *,
    evaluated: bool,
    keep_recomputed: int | None = None,
    keep_offload: bool | None = None,
) -> Changed | None:
    """The least that has to change for a setup to fit, or None if nothing helps.

    What changes only the speed comes first (another cut of the step), then what changes the result, the gentlest first:
    nf4 in place of int8 or 16 bit, shorter sequences, a lower rank. Each is added to those before.
    """

    def fit_of(changes: tuple[str, ...]) -> Changed | None:
        fit = fitted(
            setup,
            amount,
            effective_batch,
            budget_bytes,
            card,
            evaluated=evaluated,
            keep_recomputed=keep_recomputed,
            keep_offload=keep_offload,
        )
        return None if fit is None else Changed(setup, amount, fit, changes)

    if found := fit_of(()):
        return found
    changes: tuple[str, ...] = ()
    if keep_recomputed is not None:
        keep_recomputed, changes = None, (*changes, "train.gradient_checkpointing=auto")
        if found := fit_of(changes):
            return found
    if keep_offload is not None:
        keep_offload, changes = None, (*changes, "train.offload=auto")
        if found := fit_of(changes):
            return found
    if setup.quantization != "nf4":
        setup, changes = replace(setup, quantization="nf4"), (*changes, "quantization=nf4")
        if found := fit_of(changes):
            return found
    before = changes
    for length in [length for length in SEQUENCE_LENGTHS if length < setup.sequence]:
        changes = (*before, f"train.sequence_length={length}")
        amount = amount.shortened(length)
        setup = replace(setup, sequence=amount.longest, row=amount.longest_row)
        if found := fit_of(changes):
            return found
    before = changes
    for rank in [rank for rank in RANKS if rank < setup.rank]:
        setup, changes = replace(setup, rank=rank), (*before, f"lora.rank={rank}")
        if found := fit_of(changes):
            return found
    return None


def largest_micro_batch(setup: Setup, budget_bytes: int) -> int:
    """Sequences as long as the longest that fit in one pass, everything recomputed; 0 if not even one does."""
    whole = replace(setup, recomputed=setup.shape.layers)
    return _largest(lambda count: training_memory(replace(whole, micro_batch=count)).total <= budget_bytes, LARGEST)


def longest_sequence(setup: Setup, budget_bytes: int) -> int:
    """Tokens of the longest single sequence (one row) that fits, everything recomputed, up to the base's context."""
    whole = replace(setup, recomputed=setup.shape.layers, micro_batch=1)

    def fits(tokens: int) -> bool:
        return training_memory(replace(whole, sequence=tokens, row=tokens)).total <= budget_bytes

    return _largest(fits, setup.shape.context)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `fits`, which holds for all below one for which it does."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
