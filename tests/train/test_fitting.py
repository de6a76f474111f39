"""How a run's steps are cut for the device that is there, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import Config
from finetune.model.hardware import Hardware
from finetune.plan.gpus import Card, find_card
from finetune.plan.setup import Fit
from finetune.runs.folder import RunFolder
from finetune.train import fitting
from finetune.train.fitting import Expected, expected
from finetune.train.length import remember
from tests.train.conftest import SAMPLES, TINY, prepared, tiny_config

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CPU = Hardware("cpu", "2 CPU cores", 2**34, bf16=False)
OnCard = Callable[..., Expected]


@pytest.fixture
def on_card(tmp_path: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> OnCard:
    """What is expected of rows of about 60 tokens, packed to 2,048, on a base as large as Llama 3 8B."""
    data = tmp_path / "many.jsonl"
    lines = (SAMPLES / "contract-clauses.jsonl").read_text("utf-8").splitlines()
    data.write_text("\n".join(json.dumps(json.loads(line) | {"n": n}) for n, line in enumerate(lines)), "utf-8")

    def on(
        name: str,
        memory: int | None = None,
        facts: dict[str, Any] = LLAMA_3_8B,
        lora: dict[str, Any] | None = None,
        **train: Any,
    ) -> Expected:
        train = {"sequence_length": 2048, **train}
        config = tiny_config(tmp_path, data=[{"path": str(data)}], train=train, lora=lora or {})
        card: Card = find_card(name)
        card = card if memory is None else replace(card, memory=memory)
        monkeypatch.setattr(fitting, "_card", lambda hardware: card)
        hardware = Hardware("cuda", name, card.memory, bf16=card.bf16)
        return expected(config, prepared(config), facts, hardware, run)

    return on


def sequences(found: Expected) -> int:
    assert found.fit is not None
    return found.fit.micro_batch * found.fit.accumulation


def test_on_a_cpu_a_step_is_cut_as_it_is_written(tmp_path: Path, run: RunFolder) -> None:
    config = tiny_config(tmp_path)
    found = expected(config, prepared(config), json.loads((TINY / "config.json").read_text()), CPU, run)
    assert found.fit == Fit(micro_batch=2, accumulation=2, recomputed=0, offload=False)
    assert found.estimate is None
    assert found.memory is not None
    assert any("estimate: " in line for line in found.lines())


def test_a_larger_card_is_used_for_speed_and_the_step_stays_the_same(on_card: OnCard) -> None:
    batch = {"micro_batch_size": 2, "gradient_accumulation_steps": 8}
    small, large = on_card("rtx-4070", **batch), on_card("h200", **batch)
    assert sequences(small) == sequences(large) == 16
    assert small.fit is not None
    assert large.fit is not None
    assert small.estimate is not None
    assert large.fit.recomputed < small.fit.recomputed
    assert not large.fit.offload
    assert small.estimate.fits
    assert small.estimate.peak <= small.estimate.available


def test_what_is_written_is_kept_where_it_says_so(on_card: OnCard) -> None:
    assert on_card("h200", fit="as-written").fit == Fit(2, 2, recomputed=32, offload=False)
    kept = on_card("h200", gradient_checkpointing=7)
    assert kept.fit is not None
    assert kept.fit.recomputed == 7


def test_a_run_that_goes_on_is_cut_as_before_whatever_card_is_there_now(
    on_card: OnCard, run: RunFolder, tmp_path: Path
) -> None:
    first = on_card("rtx-4070")
    assert first.fit is not None
    config: Config = tiny_config(tmp_path, train={"sequence_length": 2048})
    remember(config, run, first.fit, first.why)
    assert on_card("h200").fit == first.fit
    assert on_card("h200").why == "as before in this run"


def test_a_card_that_does_not_suffice_is_tried_all_the_same_with_as_little_as_possible(on_card: OnCard) -> None:
    """The plan may be wrong, and what is there was not measured: the training itself has the last word."""
    found = on_card("rtx-4070", memory=4 * 2**30)
    assert found.fit is not None
    assert found.fit.micro_batch == 1
    assert sequences(found) == 4
    assert found.fit.recomputed == 32
    assert "does not expect" in found.why
    assert found.estimate is not None
    assert not found.estimate.fits


def test_a_base_that_the_plan_does_not_know_is_trained_without_one(on_card: OnCard) -> None:
    found = on_card("rtx-4090", facts={"model_type": "zamba2"})
    assert (found.fit, found.memory, found.estimate) == (None, None, None)
    assert found.lines() == [f"no estimate: {found.why}"]
    assert "zamba2" in found.why
    json.dumps(found.as_dict())


def test_an_adapter_on_the_head_is_planned(on_card: OnCard) -> None:
    """An untied head is a layer of the base like any other."""
    without = on_card("rtx-4090", lora={"targets": ["q_proj"]})
    found = on_card("rtx-4090", lora={"targets": ["q_proj", "lm_head"]})
    assert found.estimate is not None
    assert without.estimate is not None
    assert found.estimate.memory.adapter - without.estimate.memory.adapter == 4 * 16 * (128256 + 4096)


def test_what_the_plan_does_not_know_is_no_end_of_a_training(on_card: OnCard) -> None:
    found = on_card("rtx-4090", lora={"targets": ["q_proj", "projector"]})
    assert (found.fit, found.memory, found.estimate) == (None, None, None)
    assert found.lines() == ["no estimate: lora.targets: the base has no layer named projector"]


def test_without_liger_kernel_a_step_is_slower_in_the_same_memory(
    on_card: OnCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for there in (object(), None):
        monkeypatch.setattr(fitting, "find_spec", lambda name, there=there: there)
        found.append(on_card("rtx-4090", fit="as-written").estimate)
    with_it, without = found
    assert with_it is not None
    assert without is not None
    assert with_it.memory == without.memory
    assert with_it.seconds < without.seconds


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "allowed", "memory", "in_use"),
    [
        (23.0, 24.0, 24.0, 1.0 - 0.55),  # the context of this process is in the plan
        (14.0, 24.0, 24.0, 10.0 - 0.55),
        (23.8, 24.0, 24.0, 0.0),
        (23.0, 12.0, 12.0, 0.0),  # a process that may have half of the card
        (4.0, 12.0, 12.0, 8.0 - 0.55),
    ],
)
def test_the_card_is_what_this_process_may_have_of_it(
    free: float, allowed: float, memory: float, in_use: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (int(free * GIB), 24 * GIB))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    hardware = Hardware("cuda", "NVIDIA GeForce RTX 4090 D", int(allowed * GIB), bf16=True)
    card = fitting._card(hardware)
    assert card.memory == memory * GIB
    assert card.in_use == pytest.approx(in_use * GIB, abs=2)
    assert (card.capability, card.name) == ((8, 9), "NVIDIA GeForce RTX 4090 D")
