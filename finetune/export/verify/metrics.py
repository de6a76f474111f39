"""How far two models are apart, position by position, from their logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
"""(positions, vocabulary)"""
Numbers = npt.NDArray[np.float64]

BLOCK = 2**22
"""Logits whose probabilities are in memory at a time: 32 MB in float64."""


@dataclass(frozen=True)
class Distance:
    """One model (q) against another (p) over some positions."""

    divergence: Numbers
    """Kullback-Leibler divergence D(p‖q) in nats at each position."""
    same_top: npt.NDArray[np.bool_]
    """Whether both find the same token most likely."""

    @property
    def mean(self) -> float:
        """Mean divergence, in nats."""
        return float(self.divergence.mean()) if len(self.divergence) else 0.0

    @property
    def worst(self) -> float:
        """The 99th percentile of the divergence, in nats."""
        return float(np.quantile(self.divergence, 0.99)) if len(self.divergence) else 0.0

    @property
    def agreement(self) -> float:
        """Share of positions with the same most likely token."""
        return float(self.same_top.mean()) if len(self.same_top) else 1.0


def distance(p: Logits, q: Logits) -> Distance:
    """q against p: the shapes must be equal, except that q may have further columns (padding rows of the vocabulary).

    Computed in float64 from the logits, which is exact enough for divergences from about 1e-12 on.
    """
    q = q[:, : p.shape[1]]
    divergences, same = [], []
    for begin in range(0, len(p), max(1, BLOCK // p.shape[1])):
        some = slice(begin, begin + max(1, BLOCK // p.shape[1]))
        log_p, log_q = log_probabilities(p[some]), log_probabilities(q[some])
        # A divergence is never below 0; rounding can put it there by 1e-16.
        divergences.append(np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0))
        same.append(p[some].argmax(axis=1) == q[some].argmax(axis=1))
    return Distance(np.concatenate(divergences), np.concatenate(same))


def joined(parts: Iterable[Distance]) -> Distance:
    """Several distances over positions as one."""
    parts = list(parts)
    if not parts:
        return Distance(np.zeros(0), np.zeros(0, dtype=np.bool_))
    return Distance(np.concatenate([p.divergence for p in parts]), np.concatenate([p.same_top for p in parts]))


def losses(logits: Logits, ids: Sequence[int], scored: npt.NDArray[np.bool_]) -> Numbers:
    """Negative log likelihood in nats of each scored token but the first, given what stands before it.

    logits (tokens, vocabulary), ids and scored (tokens,).
    """
    places = np.flatnonzero(scored[1:])
    if not len(places):
        return np.zeros(0)
    found = log_probabilities(logits[places])
    return np.asarray(-found[np.arange(len(places)), np.asarray(ids)[places + 1]])


def gap(logits: Logits, chosen: Sequence[int]) -> Numbers:
    """By how much, in logits, the best token at each position is ahead of the one that was chosen; 0 if it was that."""
    some = logits[np.arange(len(chosen)), np.asarray(chosen)]
    return np.asarray(logits.max(axis=1) - some, dtype=np.float64)


def log_probabilities(logits: Logits) -> npt.NDArray[Any]:
    """Log softmax over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
