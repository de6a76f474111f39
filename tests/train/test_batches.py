"""Packed rows must not see each other: the loss of two rows packed is the loss of the two apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.data.store import TokenRow
from finetune.train.batches import Collator, as_dataset
from tests.train.conftest import TINY


def row(ids: list[int], supervised_from: int) -> TokenRow:
    mask = np.arange(len(ids)) >= supervised_from
    return TokenRow(np.array(ids, dtype=np.int32), mask, "here")


def collated(sequences: list[list[TokenRow]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch of these sequences of rows."""
    rows = [row for sequence in sequences for row in sequence]
    numbers = iter(range(len(rows)))
    dataset = as_dataset([[next(numbers) for _ in sequence] for sequence in sequences])
    return Collator(rows.__getitem__, pad_id)(list(dataset))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """The one backend that is selected (`model/base.py`), and the plain one that others are measured by."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=request.param).eval()


def nll(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Sum of the negative log likelihood of the supervised tokens, and their number."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    return float(flat), int((labels[:, 1:] != -100).sum())


def test_packed_rows_have_the_loss_of_the_rows_apart(model: torch.nn.Module) -> None:
    generator = np.random.default_rng(0)
    rows = [row(generator.integers(5, 1500, size=n).tolist(), n // 3) for n in (17, 40, 5, 23)]
    packed = collated([rows[:2], rows[2:]])
    apart = collated([[one] for one in rows])
    packed_loss, packed_tokens = nll(model, packed)
    apart_loss, apart_tokens = nll(model, apart)
    assert packed_tokens == apart_tokens
    # fp32 sums of about 60 terms of size 10, in another order: 1e-5 relative is a hundred times the rounding.
    assert packed_loss == pytest.approx(apart_loss, rel=1e-5)


def test_a_packed_row_does_not_change_when_its_neighbour_does(model: torch.nn.Module) -> None:
    mine = row(list(range(100, 130)), 1)
    logits = []
    for neighbour in (row([7] * 20, 1), row([8] * 20, 1)):
        batch = collated([[neighbour, mine]])
        batch.pop("labels")
        with torch.no_grad():
            logits.append(model(**batch, use_cache=False).logits[0, 20:])
    assert torch.equal(logits[0], logits[1])


def test_the_first_token_of_a_packed_row_is_not_predicted_from_the_row_before() -> None:
    batch = collated([[row([1, 2, 3], 0), row([4, 5], 0)]])
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_padding_carries_no_loss() -> None:
    batch = collated([[row([1, 2, 3], 1)], [row([4, 5], 1)]], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
