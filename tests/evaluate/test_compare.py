"""Base against tuned: the numbers are what a plain computation gives, and the adapter is what makes the difference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData
from finetune.errors import TrainingError
from finetune.evaluate.compare import Score, compare, held_out_loss, try_longest
from finetune.model.adapter import add_adapter
from finetune.model.base import LoadedModel, load_base
from finetune.model.hardware import detect
from tests.train.conftest import prepared, tiny_config


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, PreparedData, LoadedModel]:
    """Seven held-out rows of different lengths, and a base with an adapter that does something."""
    config = tiny_config(
        tmp_path_factory.mktemp("compare"),
        evaluation={"split": 7, "samples": 2, "metric": "exact-match", "max_new_tokens": 4},
        quantization="none",
    )
    loaded = load_base(config, Path(config.base), detect())
    model = add_adapter(config, loaded)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return config, prepared(config), LoadedModel(model, loaded.hardware)


def test_the_loss_is_the_mean_over_all_tokens_with_loss(
    setting: tuple[Config, PreparedData, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data, loaded = setting
    total, tokens = 0.0, 0
    for row in data.held_out:
        ids = torch.tensor(row.ids.tolist())[None]
        labels = torch.tensor(row.labels().tolist())[None]
        with torch.no_grad():
            logits = loaded.model(input_ids=ids).logits
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
        tokens += int((labels[0, 1:] != -100).sum())
    # Batches of one row, of some, and of all give the same: padding and slices change nothing.
    for logits_at_once in (1, 2048 * 400, 2**28):
        monkeypatch.setattr("finetune.evaluate.compare.BATCH_LOGITS", logits_at_once)
        loss, counted = held_out_loss(loaded.model, data.held_out, 0, lambda done, rows: None)
        assert counted == tokens
        # fp32 with sums in another order; losses are of size 10.
        assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_the_base_is_scored_without_the_adapter_and_answers_are_counted(
    setting: tuple[Config, PreparedData, LoadedModel],
) -> None:
    config, data, loaded = setting
    found = compare(config, data, loaded)
    assert found is not None
    with loaded.model.disable_adapter():
        alone, _ = held_out_loss(loaded.model, data.held_out, 0, lambda done, rows: None)
    assert found.base.loss == pytest.approx(alone)
    assert abs(found.tuned.loss - found.base.loss) > 1e-3
    assert found.rows == found.answered == 7
    assert found.base.exact_match is not None
    assert 0 <= found.base.exact_match <= 1
    assert len(found.samples) == 2
    assert found.as_dict()["base"]["perplexity"] == pytest.approx(math.exp(found.base.loss))


def test_nothing_held_out_is_nothing_compared(
    tmp_path: Path, setting: tuple[Config, PreparedData, LoadedModel]
) -> None:
    config = tiny_config(tmp_path, evaluation={"split": 0})
    assert compare(config, prepared(config), setting[2]) is None


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity() -> None:
    assert Score(1000.0).perplexity == math.inf


class MemoryFor:
    """Stands for a card on which only so many rows fit."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.refused = 0

    def __call__(self, module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[0] > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.fault("out of memory", "evaluation", "smaller batches, the same numbers and answers")
def test_batches_that_do_not_fit_are_halved(setting: tuple[Config, PreparedData, LoadedModel]) -> None:
    config, data, loaded = setting
    expected = compare(config, data, loaded)
    memory = MemoryFor(2)
    handle = loaded.model.get_base_model().register_forward_pre_hook(memory, with_kwargs=True)
    try:
        found = compare(config, data, loaded)
    finally:
        handle.remove()
    assert memory.refused >= 4
    assert found is not None
    assert expected is not None
    assert found.base.loss == pytest.approx(expected.base.loss, rel=1e-5)  # fp32, other sums
    assert found.samples == expected.samples


@pytest.mark.fault("out of memory with a single row", "evaluation", "said before training, with the row")
def test_a_row_that_does_not_fit_alone_is_named(setting: tuple[Config, PreparedData, LoadedModel]) -> None:
    _, data, loaded = setting
    handle = loaded.model.get_base_model().register_forward_pre_hook(MemoryFor(0), with_kwargs=True)
    try:
        with pytest.raises(
            TrainingError, match=r"rows\.jsonl:\d+: out of memory on .*, evaluating a row of \d+ tokens"
        ):
            try_longest(data, loaded)
        with pytest.raises(TrainingError, match="what was trained is saved"):
            compare(setting[0], data, loaded)
    finally:
        handle.remove()
