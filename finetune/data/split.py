"""Which rows are held out, how often the others are seen, and whether any are on both sides. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.errors import DataError

Indices = npt.NDArray[np.int64]


def hold_out(
    share: float,
    order: npt.NDArray[np.uint64],
    labels: Indices,
    *,
    allow_leakage: bool,
) -> tuple[Indices, Indices]:
    """(held out, trained on): a fraction below 1, or a number of rows. If any are asked for, each side gets one.

    The rows that come first in `order` are held out, those that are equal or nearly so (by `labels`) together. A group
    that is larger than what is still wanted stays with the rows to train on. Where that leaves too few to hold out, the
    data is so much alike that there is nothing to measure on, which is an error unless `allow_leakage`.
    """
    rows = len(order)
    everything = np.arange(rows, dtype=np.int64)
    if share == 0:
        return everything[:0], everything
    wanted = max(1, round(share * rows) if share < 1 else int(share))
    if wanted >= rows:
        raise DataError(
            f"would hold out {wanted:,} of {rows:,} rows, which leaves none to train on",
            place="evaluation.split",
            hint="give more rows, hold out fewer, or set it to 0, which evaluates nothing",
        )
    if allow_leakage:
        chosen = np.argsort(order, kind="stable")[:wanted]
    else:
        chosen = _whole_groups(order, labels, wanted)
        # A little less than was asked for is no harm; far less measures nothing.
        if len(chosen) < wanted / 2:
            sizes = np.bincount(labels)
            raise DataError(
                f"can hold out only {len(chosen):,} of the {wanted:,} rows asked for: the rows are so much alike that "
                f"the largest group of near duplicates has {int(sizes.max()):,} of {rows:,}",
                place="evaluation.split",
                hint="remove duplicates, name other rows in `evaluation.path`, or set `evaluation.allow_leakage: true`",
            )
    mask = np.zeros(rows, dtype=np.bool_)
    mask[chosen] = True
    held_out = np.flatnonzero(mask)
    return held_out[np.argsort(order[held_out], kind="stable")], np.flatnonzero(~mask)


def keep_together(labels: Indices, rows: Indices) -> Indices:
    """Labels after joining all groups that share a row: (pieces,), (pieces,) → (pieces,).

    The pieces of a row that was split belong on one side, and with them whatever any of them is like.
    """
    if len(rows) == 0 or int(rows[-1]) + 1 == len(rows):
        return labels
    while True:
        least = np.full(len(labels), len(labels), np.int64)
        np.minimum.at(least, rows, labels)
        joined = least[rows]
        # What had one label before still has one: the least that any of its pieces has now.
        least = np.full(len(labels), len(labels), np.int64)
        np.minimum.at(least, labels, joined)
        joined = least[labels]
        if np.array_equal(joined, labels):
            return labels
        labels = joined


def _whole_groups(order: npt.NDArray[np.uint64], labels: Indices, wanted: int) -> Indices:
    sizes = np.bincount(labels, minlength=len(labels))
    members = np.argsort(labels, kind="stable")
    begins = np.concatenate(([0], np.cumsum(sizes)))
    taken: set[int] = set()
    chosen: list[int] = []
    for row in np.argsort(order, kind="stable").tolist():
        left = wanted - len(chosen)
        if not left:
            break
        label = int(labels[row])
        if label not in taken and sizes[label] <= left:
            taken.add(label)
            chosen += members[begins[label] : begins[label + 1]].tolist()
    return np.array(chosen, dtype=np.int64)


def weighted(train: Indices, sources: npt.NDArray[np.int16], weights: Sequence[float], seed: int) -> Indices:
    """The rows of an epoch: each as often as its source's weight says, and a random part of them once more for what
    is left of it after the point."""
    if all(weight == 1 for weight in weights):
        return train
    parts = []
    for number, weight in enumerate(weights):
        own = train[sources[train] == number]
        whole, rest = divmod(weight, 1)
        parts += [own] * int(whole)
        drawn = np.random.default_rng([seed, number]).permutation(own)[: round(rest * len(own))]
        parts.append(np.sort(drawn))
    return np.sort(np.concatenate(parts), kind="stable")


@dataclass(frozen=True)
class Leaks:
    """Held-out rows that are also trained on, and the first pair."""

    rows: int
    exact: int
    held_out: int = -1
    trained: int = -1


def leaks(keys: npt.NDArray[np.uint64], labels: Indices, train: Indices, held_out: Indices) -> Leaks:
    """What is on both sides, exactly (by `keys`) or nearly (by `labels`)."""
    both = np.isin(labels[held_out], labels[train])
    if not both.any():
        return Leaks(0, 0)
    exact = int(np.isin(keys[held_out], keys[train]).sum())
    first = int(np.sort(held_out[both])[0])
    return Leaks(int(both.sum()), exact, first, int(train[labels[train] == labels[first]][0]))
