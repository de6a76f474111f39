"""The GPU suite runs through on a CPU, nothing that goes wrong in a case ends it, and its models are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.models import SHAPES, Device, build, facts
from benchmarks.measuring import ROOT, Failed, write

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
    assert len(case["losses"]) == 4
    assert case["fit"] == {"micro_batch": 2, "accumulation": 1, "recomputed": 0, "offload": False}
    assert result["about"]["tiny"] is True
    assert "torch" in result["about"]["versions"]
    assert (tmp_path / "table.md").read_text() == run.page(tmp_path)


def chunk(*cases: Case) -> run.Chunk:
    return run.Chunk(lambda _: list(cases), lambda found: ", ".join(found) + "\n")


def test_a_case_that_fails_is_recorded_and_the_next_one_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def broken(context: Context) -> dict[str, Any]:
        raise RuntimeError("CUDA error: something")

    def good(context: Context) -> dict[str, Any]:
        seen.append(dict(context.done))
        assert list(context.folder.iterdir()) == []
        return {"x": 1.0}

    def refused(context: Context) -> dict[str, Any]:
        raise Failed("not installed")

    cases = [Case("broken", broken), Case("good", good), Case("refused", refused), Case("last", good)]
    monkeypatch.setitem(run.CHUNKS, "speed", chunk(*cases))
    assert run.work("speed", [case.name for case in cases], CPU, tmp_path, time.time() + 1000) == 0
    found = run.read(tmp_path / "speed.json")["cases"]
    assert "CUDA error: something" in found["broken"]["failed"]
    assert found["refused"]["failed"] == "not installed"
    assert found["good"]["x"] == found["last"]["x"] == 1.0
    assert [list(done) for done in seen] == [[], ["good"]]
    text = run.page(tmp_path)
    assert "good, last" in text
    assert "- broken failed: RuntimeError: CUDA error: something" in text


def test_a_case_is_not_begun_without_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.CHUNKS, "speed", chunk(Case("long", lambda _: {}, seconds=100)))
    assert run.work("speed", ["long"], CPU, tmp_path, time.time() + 50) == 0
    assert run.run_chunk("speed", "", CPU, tmp_path, time.time() + 50) == 1
    assert not (tmp_path / "speed.json").exists()


def test_a_worker_that_dies_costs_its_case_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.CHUNKS, "speed", chunk(Case("one", lambda _: {}), Case("two", lambda _: {})))
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    (tmp_path / "speed.running").write_text("one")
    assert run.run_chunk("speed", "", CPU, tmp_path, time.time() + 1000) == 0
    found = run.read(tmp_path / "speed.json")["cases"]
    assert list(found) == ["one", "two"]
    assert all("its process ended with 1" in case["failed"] for case in found.values())


def test_retry_forgets_failures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run.CHUNKS, "speed", chunk(Case("one", lambda _: {}, seconds=10**6), Case("two", lambda _: {})))
    write({"cases": {"one": {"failed": "then"}, "two": {"x": 1}}}, tmp_path / "speed.json")
    assert run.run_chunk("speed", "", CPU, tmp_path, time.time() + 60) == 0
    assert run.run_chunk("speed", "", CPU, tmp_path, time.time() + 60, retry=True) == 1
    assert run.read(tmp_path / "speed.json")["cases"] == {"two": {"x": 1}}


def test_names_of_cases_are_never_the_same() -> None:
    for one in run.CHUNKS.values():
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
