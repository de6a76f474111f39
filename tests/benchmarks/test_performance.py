"""docs/performance.md says what the result files say, and names what nobody has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measuring import RESULTS, write
from benchmarks.performance import PAGE, TARGETS, page, read

ABOUT: dict[str, Any] = {
    "date": "2030-01-02",
    "hardware": {"processor": "a chip", "cores": 16, "ram_gb": 128.0, "load": 0.1},
    "versions": {"python": "3.12.3", "torch": "2.11.0"},
    "device": {"name": "A GPU", "memory_gb": 141.0, "capability": "9.0", "cuda": "13.0"},
    "tiny": False,
}


def speed(tokens: float, peak: float) -> dict[str, Any]:
    return {"loss_tokens_per_s": tokens, "peak_gb": peak, "of_ceiling": 0.8, "losses": [2.0, 1.0]}


def outcomes(folder: Path) -> dict[str, tuple[str, bool] | None]:
    results = read(folder)
    found = {target.text: target.look(results) for target in TARGETS}
    return {text: None if one is None else (one.text, one.met) for text, one in found.items()}


def write_speed(folder: Path, cases: dict[str, Any], **about: Any) -> None:
    write({"cases": cases, "about": ABOUT | about}, folder / "gpu" / "box" / "speed.json")


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text("utf-8") == page(read(RESULTS)), "`.venv/bin/python -m benchmarks.performance` writes it anew"


def test_without_results_every_target_is_named_as_not_measured(tmp_path: Path) -> None:
    text = page(read(tmp_path))
    assert "## Targets" not in text
    for target in TARGETS:
        assert f"- {target.text} (" in text.partition("## Not measured")[2]


def test_a_target_is_judged_by_its_worst_case(tmp_path: Path) -> None:
    half = "ft auto in half of trl's memory"
    write_speed(
        tmp_path,
        {
            "m, dense 2k, trl defaults": speed(100, 40),
            f"m, dense 2k, {half}": speed(200, 20),
            "m, dense 8k, trl defaults": speed(100, 40),
            f"m, dense 8k, {half}": speed(150, 20),
            "m, chats, trl defaults": speed(100, 40),
            "m, chats, ft auto": speed(300, 60),
            "m, chats, unsloth": {"failed": "not installed", "seconds": 1.0},
        },
    )
    found = outcomes(tmp_path)
    dense = found["dense: ≥ 1.6× TRL's defaults at ≤ 0.5× the memory"]
    assert dense == ("1.50× at 0.50× the memory, the worst of 2", False)
    assert found["short chats: ≥ 2.5× TRL's defaults"] == ("3.00× at 1.50× the memory, the worst of 1", True)
    assert found["≥ 1.05× unsloth at ≤ 1.0× the memory"] is None
    text = page(read(tmp_path))
    assert "2030-01-02, A GPU, 141 GB, CUDA 13.0; 16 cores of a chip, load 0.1; python 3.12.3, torch 2.11.0." in text
    assert "1 cases failed" in text
    assert "dense: ≥ 1.6×" not in text.partition("## Not measured")[2]


def test_a_trial_on_a_cpu_and_a_result_without_a_date_are_no_results(tmp_path: Path) -> None:
    write_speed(tmp_path, {"m, chats, ft auto": speed(1, 1)}, device={"name": "cpu"}, tiny=True)
    (tmp_path / "first_step.json").write_text(json.dumps({"first_step_over_imports": 0.87}))
    found = read(tmp_path)
    assert (found.gpus, found.first_step, found.train) == ({}, None, None)


@pytest.mark.parametrize(
    ("errors", "met"), [([0.02, -0.03, 0.08], True), ([0.02, -0.06, 0.01], False), ([0.01, 0.02, 0.11], False)]
)
def test_the_plan_may_be_over_by_a_tenth_but_under_by_a_twentieth(
    errors: list[float], met: bool, tmp_path: Path
) -> None:
    cases = {
        str(number): {
            "error": error,
            "planned_gb": 1.0,
            "peak_gb": 1.0,
            "outside_gb": 0.5,
            "reserved_gb": 1.0,
        }
        for number, error in enumerate(errors)
    }
    write({"cases": cases, "about": ABOUT}, tmp_path / "gpu" / "box" / "plan.json")
    outcome = outcomes(tmp_path)["the plan: median error 5 %, worst 10 %, never under by more than 5 %"]
    assert outcome is not None
    assert outcome[1] is met
    assert f"worst {max(map(abs, errors)):.1%}" in outcome[0]
