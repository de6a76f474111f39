"""Cutting a step so that it fits a card and is quick: the micro batch, the recomputed layers, the offload.

All cuts of a step train the same (micro batch × accumulation is kept), so that nothing but memory and time decides.
There are few enough of them to look at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from finetune.plan.amount import Amount, typical
from finetune.plan.gpus import Card
from finetune.plan.memory import evaluation_memory, training_memory
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
    evaluation = evaluation_memory(setup) if evaluated else 0
    sizes = [size for size in range(1, min(effective_batch, LARGEST) + 1) if effective_batch % size == 0]
    layers = setup.shape.layers
    counts = {*range(0, layers, math.ceil(layers / DEPTHS)), layers} if keep_recomputed is None else {keep_recomputed}
    for micro in sizes:
        for recomputed in sorted(counts):
            # Without recomputation there is nothing to offload.
            for offload in (False, True) if keep_offload is None and recomputed else (bool(keep_offload),):
                fit = Fit(micro, effective_batch // micro, recomputed, offload)
                cut = cut_as(setup, fit, amount)
                found.append(Candidate(fit, max(evaluation, training_memory(cut).total), work_of(typical(cut, amount))))
    return tuple(found)


def cut_as(setup: Setup, fit: Fit, amount: Amount | None = None) -> Setup:
    """The setup with its step cut so. With the amount of data, the largest micro batch is that of the data; without, as
    many sequences as it has may be as long as the longest."""
    most = None if amount is None else amount.most(fit.micro_batch, together=setup.kernels.attention == "varlen")
    return replace(setup, micro_batch=fit.micro_batch, recomputed=fit.recomputed, offload=fit.offload, most=most)


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
class Wish:
    """A training, as far as it may be changed."""

    setup: Setup
    amount: Amount
    alpha: float
    """Of the adapter: it is scaled by alpha / rank, and so follows the rank."""
    cut: Fit | None = None
    """How a step is cut, where the config wants that as it is written."""
    recomputed: int | None = None
    offload: bool | None = None
    """What the config says of these itself; None where it leaves that open."""


@dataclass(frozen=True)
class Change:
    """One thing that can be done about a training that does not fit."""

    written: tuple[str, ...]
    """As one writes it behind `-s`."""
    to: Callable[[Wish], Wish]


@dataclass(frozen=True)
class Changed:
    """A training that fits, and what was changed for it."""

    wish: Wish
    fit: Fit
    changes: tuple[str, ...]
    """As one writes them behind `-s`."""


def changes_that_fit(
    wish: Wish, effective_batch: int, budget_bytes: int, card: Card, *, evaluated: bool
) -> Changed | None:
    """The least that has to change for a training to fit, or None if nothing helps.

    What changes only the speed comes first (another cut of the step), then what changes the result, the gentlest first:
    nf4 in place of int8 or 16 bit, shorter sequences, a lower rank. Each is added to those before, as strong as there
    is; as soon as it fits, each is taken back as far as that goes.
    """

    def wished(taken: Sequence[Change | None]) -> Wish:
        changed = wish
        for change in taken:
            changed = changed if change is None else change.to(changed)
        return changed

    def fits(taken: Sequence[Change | None]) -> bool:
        return _least(wished(taken), effective_batch, evaluated) <= budget_bytes

    choices = _choices(wish)
    taken: list[Change | None] = []
    for choice in choices:
        found = next((change for change in choice if fits([*taken, change])), None)
        taken.append(found or choice[-1])
        if found is not None:
            break
    if not fits(taken):
        return None
    for at, choice in enumerate(choices[: len(taken)]):
        for gentler in (None, *choice):
            if fits([*taken[:at], gentler, *taken[at + 1 :]]):
                taken[at] = gentler
                break
    changed = wished(taken)
    fit = changed.cut or fitted(
        changed.setup,
        changed.amount,
        effective_batch,
        budget_bytes,
        card,
        evaluated=evaluated,
        keep_recomputed=changed.recomputed,
        keep_offload=changed.offload,
    )
    assert fit is not None
    return Changed(changed, fit, tuple(text for change in taken if change is not None for text in change.written))


def _choices(wish: Wish) -> list[list[Change]]:
    """What can be changed, the gentlest first; of each, how far."""
    setup = wish.setup
    found: list[list[Change]] = []
    if wish.cut is not None:
        found.append([Change(("train.fit=auto",), lambda one: replace(one, cut=None))])
    if wish.recomputed is not None:
        found.append([Change(("train.gradient_checkpointing=auto",), lambda one: replace(one, recomputed=None))])
    if wish.offload is False:
        found.append([Change(("train.offload=auto",), lambda one: replace(one, offload=None))])
    if setup.quantization != "nf4":
        found.append([Change(("quantization=nf4",), _in_nf4)])
    lengths = [length for length in SEQUENCE_LENGTHS if length < setup.sequence]
    found.append([Change((f"train.sequence_length={length}",), partial(_shorter, length)) for length in lengths])
    ranks = [setup.rank >> halved for halved in range(1, setup.rank.bit_length())]
    alphas = [wish.alpha * rank / setup.rank for rank in ranks]
    found.append(
        [
            Change((f"lora.rank={rank}", f"lora.alpha={alpha:g}"), partial(_lower, rank, alpha))
            for rank, alpha in zip(ranks, alphas, strict=True)
        ]
    )
    return [choice for choice in found if choice]


def _in_nf4(wish: Wish) -> Wish:
    return replace(wish, setup=replace(wish.setup, quantization="nf4"))


def _shorter(length: int, wish: Wish) -> Wish:
    amount = wish.amount.shortened(length)
    return replace(wish, amount=amount, setup=replace(wish.setup, sequence=amount.longest, row=amount.longest_row))


def _lower(rank: int, alpha: float, wish: Wish) -> Wish:
    return replace(wish, alpha=alpha, setup=replace(wish.setup, rank=rank))


def _least(wish: Wish, effective_batch: int, evaluated: bool) -> int:
    """Bytes of the smallest cut of a step: one sequence at a time, everything recomputed, and offloaded."""
    layers = wish.setup.shape.layers
    recomputed = layers if wish.recomputed is None else wish.recomputed
    offload = recomputed > 0 if wish.offload is None else wish.offload
    cut = wish.cut or Fit(1, effective_batch, recomputed, offload)
    training = training_memory(cut_as(wish.setup, cut, wish.amount)).total
    return max(training, evaluation_memory(wish.setup) if evaluated else 0)


def largest_micro_batch(setup: Setup, budget_bytes: int) -> int:
    """Sequences as long as the longest that fit in one pass, everything recomputed; 0 if not even one does."""
    whole = replace(setup, recomputed=setup.shape.layers, most=None)
    return _largest(lambda count: training_memory(replace(whole, micro_batch=count)).total <= budget_bytes, LARGEST)


def longest_sequence(setup: Setup, budget_bytes: int) -> int:
    """Tokens of the longest single sequence (one row) that fits, everything recomputed, up to the base's context."""
    whole = replace(setup, recomputed=setup.shape.layers, micro_batch=1, most=None)

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
