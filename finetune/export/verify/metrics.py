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


@dataclass(frozen=True)
class Shift:
    """How much of what training changed an artifact has, as sums over positions that can be added up."""

    along: float = 0.0
    """Σ covariance of what changed in the artifact with what training changed, both in log probabilities against the
    base, under the trained model's distribution."""
    whole: float = 0.0
    """Σ variance of what training changed."""

    def __add__(self, other: Shift) -> Shift:
        return Shift(self.along + other.along, self.whole + other.whole)

    @property
    def kept(self) -> float | None:
        """1 for the trained model, 0 for the base, 0.5 for half of the adapter (about: log probabilities are not linear
        in it). Noise of a quantiser, which points anywhere, changes this little. None if training changed nothing."""
        return self.along / self.whole if self.whole > 0 else None


def shift(trained: Logits, base: Logits, artifact: Logits) -> Shift:
    """From the logits of all three at the same positions."""
    along = whole = 0.0
    for begin in range(0, len(trained), max(1, BLOCK // trained.shape[1])):
        some = slice(begin, begin + max(1, BLOCK // trained.shape[1]))
        log_p, log_base = log_probabilities(trained[some]), log_probabilities(base[some])
        log_q = log_probabilities(artifact[some, : trained.shape[1]])
        p = np.exp(log_p)
        by_training, by_artifact = log_p - log_base, log_q - log_base
        by_training -= (p * by_training).sum(axis=1, keepdims=True)
        along += float((p * by_training * by_artifact).sum())
        whole += float((p * by_training * by_training).sum())
    return Shift(along, whole)


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
