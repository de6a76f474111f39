"""Distances between models are what torch says they are, and what the definition says at its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.export.verify import metrics
from finetune.export.verify.metrics import distance, gap, joined, losses


def _logits(seed: int, rows: int, columns: int, scale: float = 3.0) -> metrics.Logits:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * scale).astype(np.float32)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(2, 40), st.floats(0.01, 30))
def test_the_divergence_is_torchs(seed: int, rows: int, columns: int, scale: float) -> None:
    p, q = _logits(seed, rows, columns, scale), _logits(seed + 1, rows, columns, scale)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (p, q))
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    found = distance(p, q)
    assert found.divergence == pytest.approx(expected.numpy(), rel=1e-9, abs=1e-12)
    assert found.same_top.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert (found.divergence >= 0).all()


def test_a_model_is_no_distance_from_itself_and_padding_rows_do_not_count() -> None:
    p = _logits(0, 5, 30)
    wider = np.concatenate([p, np.full((5, 7), 50, np.float32)], axis=1)
    for q in (p, wider):
        assert distance(p, q).divergence == pytest.approx(np.zeros(5), abs=1e-12)
        assert distance(p, q).agreement == 1.0


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = _logits(0, 50, 30), _logits(1, 50, 30)
    whole = distance(p, q)
    monkeypatch.setattr(metrics, "BLOCK", 90)
    assert (distance(p, q).divergence == whole.divergence).all()
    assert (joined([distance(p[:20], q[:20]), distance(p[20:], q[20:])]).divergence == whole.divergence).all()


def test_a_distance_that_is_not_a_number_stays_one() -> None:
    p, q = _logits(0, 3, 10), _logits(1, 3, 10)
    q[1, 2] = np.nan
    assert math.isnan(distance(p, q).mean)


def test_losses_are_torchs_cross_entropy_of_the_scored_tokens() -> None:
    logits, ids = _logits(0, 6, 20), [3, 1, 4, 1, 5, 9]
    scored = np.array([True, False, True, True, False, True])
    every = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:-1]).double(), torch.tensor(ids[1:]), reduction="none"
    ).numpy()
    assert losses(logits, ids, scored) == pytest.approx(every[[1, 2, 4]], rel=1e-12)
    assert len(losses(logits, ids, np.zeros(6, dtype=np.bool_))) == 0


def test_the_gap_is_zero_for_the_best_token_and_else_what_it_lacks() -> None:
    logits = np.array([[1.0, 3.0, 2.5], [0.0, -1.0, 4.0]], np.float32)
    assert gap(logits, [1, 0]).tolist() == [0.0, 4.0]
