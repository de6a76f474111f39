"""The GPU suite runs through on a CPU, nothing that goes wrong in a case ends it, and its models are what they say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import rows as rows_
from benchmarks.gpu import run, speed
from benchmarks.gpu.chunks import CHUNKS
from benchmarks.gpu.models import SHAPES, Device, build, facts
from benchmarks.gpu.plan_error import errors
from benchmarks.gpu.planned import least_fit, within
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.trl_settings import NOT_RECOMPUTED, trl_settings
from benchmarks.gpu.ways import MEASURED, SHORT, WARM_UP, Steps
from benchmarks.measuring import ROOT, Failed

CPU = Device("cpu", tiny=True)


def test_the_smallest_chunk_runs_on_a_cpu_and_is_not_run_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--device", "cpu", "--tiny", "--chunks", "cards"]
    for _ in range(2):
        done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "everything is measured" in done.stdout
    # The second call found what the first had done.
    assert "done in" not in done.stdout
    result = json.loads((tmp_path / "cards.json").read_text())
    (case,) = result["cases"].values()
    assert "failed" not in case, case["failed"]
    assert len(case["losses"]) == SHORT
    assert case["fit"] == {"micro_batch": 2, "accumulation": 1, "recomputed": 0, "offload": False}
    assert result["about"]["tiny"] is True
    assert "torch" in case["versions"]
    assert (tmp_path / "table.md").read_text() == run.page(tmp_path)


# -- memory and time ----------------------------------------------------------------------------------------------


def test_a_bound_on_tensors_is_what_the_plan_then_allows_itself() -> None:
    from finetune.plan.fit import budget
    from finetune.plan.gpus import card_like
    from finetune.plan.memory import CONTEXT

    tensors = 20 * 10**9
    assert budget(card_like("NVIDIA H200", within(tensors))) == pytest.approx(tensors + CONTEXT, abs=100)


def test_half_of_trls_memory_is_given_where_it_is_possible_and_else_the_least(tmp_path: Path) -> None:
    from finetune.model.hardware import detect

    rows = Rows("chats", 512, 1, 2, count=20)
    config = rows_.config(rows, tmp_path, steps=2, quantization="nf4", train={"fit": "auto"})
    data = rows_.prepare(rows, tmp_path, "tiny", config)
    card = dataclasses.replace(detect(), device="cuda", name="NVIDIA H200", memory=140 * 2**30)
    least, needed = least_fit(config, data, "tiny", card)
    assert (least.micro_batch, least.accumulation, least.recomputed, least.offload) == (1, 2, 4, True)
    tight = speed._bound(speed.IN_HALF, config, data, "tiny", card, 1.9 * needed / 1e9)
    assert (tight.memory, tight.fit, tight.said["half_possible"]) == (None, least, False)
    roomy = speed._bound(speed.IN_HALF, config, data, "tiny", card, 2.1 * needed / 1e9)
    assert (roomy.memory, roomy.fit) == (within(round(2.1 * needed / 2)), None)
    assert speed._bound(speed.IN_TRLS, config, data, "tiny", card, 3.0).memory == within(3 * 10**9)
    with pytest.raises(Failed, match="TRL's defaults"):
        speed._bound(speed.IN_HALF, config, data, "tiny", card, None)


def test_twelve_steps_after_three_are_measured() -> None:
    steps = Steps()
    steps.times = [float(2**number) for number in range(WARM_UP + MEASURED)]
    assert len(steps.seconds) == MEASURED
    assert steps.seconds[0] == 2**WARM_UP - 2 ** (WARM_UP - 1)


def test_the_plans_errors_are_told_apart() -> None:
    found = {"planned_tensors_gb": 9.0, "planned_gb": 9.6, "peak_gb": 10.0, "reserved_gb": 11.0, "outside_gb": 1.0}
    speeds = {"planned_tokens_per_s": 150.0, "tokens_per_s": 100.0}
    assert errors(found | speeds) == pytest.approx({"error": -0.1, "total_error": -0.2, "time_error": 0.5})
    on_a_cpu = dict.fromkeys(found, 0.0) | {"planned_tokens_per_s": None, "tokens_per_s": 100.0}
    assert errors(on_a_cpu) == {"error": None, "total_error": None, "time_error": None}


def test_tuned_without_recomputation_has_the_same_step_in_smaller_pieces() -> None:
    cuda = Device("cuda", tiny=False)
    settings = trl_settings(NOT_RECOMPUTED, speed.DATA["dense 2k"], None, cuda)
    assert settings["gradient_checkpointing"] is False
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 8
    assert trl_settings("trl tuned", speed.DATA["dense 2k"], None, cuda)["per_device_train_batch_size"] == 8


def test_the_table_says_what_was_compared_and_what_cannot_be() -> None:
    def run_of(tokens: float, peak: float, attention: str = "sdpa", **more: Any) -> dict[str, Any]:
        fit = {"micro_batch": 2, "accumulation": 1, "recomputed": 32, "offload": False}
        times = {"step_s": 1.0, "shortest_s": 0.9, "longest_s": 1.25}
        base = {"loss_tokens_per_s": tokens, "peak_gb": peak, "of_ceiling": 0.5, "mean_loss": 2.0}
        return base | times | {"fit": fit, "attention": attention} | more

    found = {
        "m, chats, trl defaults": run_of(100, 10),
        "m, chats, trl tuned": run_of(150, 12),
        "m, chats, trl tuned, flex": run_of(160, 12, "flex_attention"),
        f"m, chats, {speed.IN_HALF}": run_of(240, 8, "varlen", half_possible=False, half_gb=5.0, least_gb=7.5),
        "m, chats, ft auto": run_of(320, 20, "varlen"),
        "m, chats, ft auto, again": run_of(304, 20, "varlen"),
    }
    text = speed.table(found)
    assert "TRL's quickest tuned, without flash-attn" in text
    ours = next(line for line in text.splitlines() if line.startswith("| m, chats, ft auto |"))
    assert "| 1 (0.9–1.25) | 20 | 0.5 | varlen | 2 × 1 | 32 | 3.2 | 2 | 2 | 1.67 | 2 |" in ours
    assert "half of what TRL's defaults took is 5.0 GB, and by the plan nothing trains this in less than 7.5 GB" in text
    assert "m, chats, ft auto: measured again at another time, 0.950× the speed" in text
    flash = found | {"m, chats, trl tuned": run_of(150, 12, "flash_attention_2")}
    assert "without flash-attn" not in speed.table(flash)


# -- cases and models ---------------------------------------------------------------------------------------------


def test_names_of_cases_are_never_the_same() -> None:
    for one in CHUNKS.values():
        for tiny in (True, False):
            names = [case.name for case in one.cases(tiny)]
            assert names
            assert len(names) == len(set(names))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_model_is_built_as_a_real_one_is_loaded(quantization: Any) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    model = build("tiny", quantization, CPU)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    quantised = {name for name, module in linears.items() if isinstance(module, Linear4bit)}
    assert quantised == (set(linears) - {"lm_head"} if quantization == "nf4" else set())
    assert len(linears) == 4 * 7 + 1
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    if quantization == "nf4":
        state = linears["model.layers.0.mlp.up_proj"].weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
    logits = model(input_ids=torch.arange(8).unsqueeze(0)).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.01


@pytest.mark.parametrize(
    ("shape", "billions"), [("llama3-8b", 8.03), ("mistral-7b", 7.25), ("qwen2.5-7b", 7.62), ("llama3.2-1b", 1.24)]
)
def test_shapes_have_the_parameters_of_the_models_they_stand_for(shape: str, billions: float) -> None:
    """Totals as the models' pages on the Hub give them."""
    from finetune.plan.memory import parameters
    from finetune.plan.shape import shape_of

    assert parameters(shape_of(facts(shape), shape)) / 1e9 == pytest.approx(billions, abs=0.005)
    assert SHAPES[shape]["hidden_size"] % SHAPES[shape]["num_attention_heads"] == 0
