"""docs/performance.md says what the result files say, and names what nobody has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.chunks import names_of
from benchmarks.gpu.speed import IN_HALF, IN_TRLS
from benchmarks.gpu.trl_settings import NOT_RECOMPUTED
from benchmarks.measuring import RESULTS, write
from benchmarks.performance import PAGE, page, read
from benchmarks.targets import TARGETS

ABOUT: dict[str, Any] = {
    "date": "2030-01-02",
    "hardware": {"processor": "a chip", "cores": 16, "ram_gb": 128.0, "load": 0.1},
    "versions": {"python": "3.12.3", "torch": "2.11.0"},
    "device": {"name": "A GPU", "memory_gb": 141.0, "capability": "9.0", "cuda": "13.0"},
    "tiny": False,
}


def speed(tokens: float, peak: float) -> dict[str, Any]:
    return {
        "loss_tokens_per_s": tokens,
        "peak_gb": peak,
        "of_ceiling": 0.8,
        "mean_loss": 1.5,
        "step_s": 1.0,
        "shortest_s": 0.9,
        "longest_s": 1.1,
        "attention": "sdpa",
        "fit": {"micro_batch": 8, "accumulation": 1, "recomputed": 32, "offload": False},
        "versions": {"python": "3.12.3", "torch": "2.11.0"},
    }


def whole_suite(tokens: dict[str, float], peaks: dict[str, float], **changes: Any) -> dict[str, Any]:
    """Every case of the suite, by the way that it is measured in."""
    cases = {}
    for name in names_of("speed"):
        way = name.split(", ", 2)[2].removesuffix(", again")
        cases[name] = speed(tokens.get(way, 100), peaks.get(way, 40))
    return cases | changes


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


DENSE = "dense: ≥ 1.6× TRL's defaults at ≤ 0.5× the memory"
CHATS = "short chats: ≥ 2.5× TRL's defaults"
UNSLOTH = "≥ 1.05× unsloth at ≤ 1.0× the memory"
GOOD = ({IN_HALF: 170, IN_TRLS: 200, "ft auto": 300}, {IN_HALF: 20, IN_TRLS: 39, "ft auto": 90})


def test_a_target_is_met_where_one_way_does_all_of_it_in_every_cell(tmp_path: Path) -> None:
    write_speed(tmp_path, whole_suite(*GOOD))
    found = outcomes(tmp_path)
    text, met = found[DENSE] or ("", None)
    assert met
    assert "with the whole card: 3.00× at 2.25× the memory, the worst of 4" in text
    assert "in TRL's memory: 2.00× at 0.97× the memory, the worst of 4" in text
    assert "in half of it or the least: 1.70× at 0.50× the memory, the worst of 4" in text
    assert found[CHATS] == ("3.00× at 2.25× the memory, the worst of 3", True)
    page_text = page(read(tmp_path))
    assert (
        "2030-01-02, A GPU, 141 GB, CUDA 13.0; 16 cores of a chip, load 0.1; python 3.12.3, torch 2.11.0." in page_text
    )
    assert "dense: ≥ 1.6×" not in page_text.partition("## Not measured")[2]


def test_the_worst_cell_decides(tmp_path: Path) -> None:
    write_speed(tmp_path, whole_suite(*GOOD, **{f"mistral-7b, dense 2k, {IN_HALF}": speed(150, 20)}))
    text, met = outcomes(tmp_path)[DENSE] or ("", None)
    assert met is False
    assert "in half of it or the least: 1.50× at 0.50× the memory, the worst of 4" in text
    # Quick with much memory in one way and slow with little in another is not both.
    write_speed(tmp_path, whole_suite(*GOOD, **{f"mistral-7b, dense 2k, {IN_HALF}": speed(170, 21)}))
    assert (outcomes(tmp_path)[DENSE] or ("", None))[1] is False


def test_what_failed_or_is_missing_is_counted_and_not_met(tmp_path: Path) -> None:
    cases = whole_suite(*GOOD)
    cases["qwen2.5-7b, chats, ft auto"] = {"failed": "a\nout of memory"}
    del cases["mistral-7b, chats, ft auto"]
    write_speed(tmp_path, cases)
    assert outcomes(tmp_path)[CHATS] == (
        "3.00× at 2.25× the memory, the worst of 1; 1 failed; 1 not measured",
        False,
    )
    assert "- qwen2.5-7b, chats, ft auto failed: out of memory" in page(read(tmp_path))


def test_a_target_of_which_all_failed_is_not_one_that_nobody_measured(tmp_path: Path) -> None:
    write_speed(tmp_path, {name: {"failed": "no"} for name in names_of("speed") if "unsloth" not in name})
    found = outcomes(tmp_path)
    assert found[CHATS] == ("6 failed", False)
    assert found[UNSLOTH] is None
    assert f"- {CHATS}" not in page(read(tmp_path))
    write_speed(tmp_path, {name: {"failed": "no"} for name in names_of("speed")})
    assert (outcomes(tmp_path)[UNSLOTH] or ("", None))[1] is False


def test_tuned_is_the_quickest_that_tuning_gave(tmp_path: Path) -> None:
    tokens, peaks = GOOD
    write_speed(tmp_path, whole_suite(tokens | {"trl tuned": 110, NOT_RECOMPUTED: 150}, peaks))
    text, met = outcomes(tmp_path)["≥ 1.25× TRL tuned by hand at ≤ 0.75× the memory"] or ("", None)
    assert "in half of it or the least: 1.13×" in text
    assert met is False


def test_loss_curves_are_compared_by_their_means(tmp_path: Path) -> None:
    name = "loss curves equal TRL's: mean loss within 2 %"
    write_speed(tmp_path, whole_suite(*GOOD))
    assert (outcomes(tmp_path)[name] or ("", None))[1] is True
    write_speed(tmp_path, whole_suite(*GOOD, **{"llama3-8b, chats, ft auto": speed(300, 90) | {"mean_loss": 1.6}}))
    text, met = outcomes(tmp_path)[name] or ("", None)
    assert text.startswith("at most 6.7% apart")
    assert met is False


def test_an_unequal_way_is_a_target_not_met(tmp_path: Path) -> None:
    distance = {"loss": 1e-3, "gradients": 1e-2, "worst tensor": 1e-2}
    same = {"plain": distance, "way": distance, "equal": True}
    names = names_of("correct")
    for equal, met in ((True, True), (False, False)):
        cases = dict.fromkeys(names, same) | {names[0]: same | {"equal": equal}}
        write({"cases": cases, "about": ABOUT}, tmp_path / "gpu" / "box" / "correct.json")
        assert (outcomes(tmp_path)["every faster way equals the plain path"] or ("", None))[1] is met
    write({"cases": {names[0]: same}, "about": ABOUT}, tmp_path / "gpu" / "box" / "correct.json")
    assert outcomes(tmp_path)["every faster way equals the plain path"] == (
        f"1 of 1 are; {len(names) - 1} not measured",
        False,
    )


def test_a_machine_without_a_chunk_does_not_matter_to_another(tmp_path: Path) -> None:
    write_speed(tmp_path, whole_suite(*GOOD))
    fit = {"micro_batch": 1, "accumulation": 8, "recomputed": 32, "offload": False}
    one = {"fit": fit, "ran_out": [], "within": True, "peak_gb": 1.0, "reserved_gb": 1.0, "outside_gb": 0.5}
    cases = {name: one | {"loss_tokens_per_s": 1.0} for name in names_of("cards")}
    write({"cases": cases, "about": ABOUT}, tmp_path / "gpu" / "other" / "cards.json")
    name = "`fit: auto` trains in 8, 12, 16 and 24 GB without running out"
    assert outcomes(tmp_path)[name] == (
        f"{len(cases)} trained, 0 of them not at once or with more memory than that",
        True,
    )
    page(read(tmp_path))


def test_versions_are_those_of_the_cases(tmp_path: Path) -> None:
    cases = {
        "llama3-8b, chats, trl defaults": speed(100, 40) | {"versions": {"trl": "1.15"}},
        "llama3-8b, chats, unsloth": speed(100, 40) | {"versions": {"trl": "1.10"}},
    }
    write_speed(tmp_path, cases)
    assert "trl 1.15 or 1.10." in page(read(tmp_path))


def first_step(**changes: Any) -> dict[str, Any]:
    costs = {"cpu_s": 10.0, "peak_mb": 500.0}
    ways = {"ft": {"wall_s": 10.0, "first_step_s": 7.0} | costs, "bare": {"wall_s": 8.0} | costs}
    ways["trl"] = {"wall_s": 30.0} | costs
    about = {key: value for key, value in ABOUT.items() if key != "device"}
    return about | {"ways": ways, "failed": {}, "first_step / bare": 0.9} | changes


def test_the_newcomers_job_is_judged_by_the_clock_and_says_whose_clock_it_was(tmp_path: Path) -> None:
    name = "CPU: the newcomer's job in ≤ 16 s, where litgpt and torchtune took 16 s and LLaMA-Factory 24 s"
    write(first_step(), tmp_path / "first_step.json")
    assert outcomes(tmp_path)[name] == ("10.0 s (beside it trl 30.0 s); the 16 s are of another machine", True)
    write(first_step(ways={}, failed={"ft": "why"}) | {"first_step / bare": None}, tmp_path / "first_step.json")
    found = outcomes(tmp_path)
    assert found[name] == ("failed", False)
    assert found["CPU: first step at ≤ 1.1× of importing and loading alone"] == ("failed", False)
    assert "ft failed: why" in page(read(tmp_path))


def test_work_that_is_not_equal_is_no_evidence_on_the_cpu(tmp_path: Path) -> None:
    def case(name: str, wall: float | None) -> dict[str, Any]:
        over = dict.fromkeys(("wall_s", "step_s", "loss_tokens_per_s", "peak_mb"), wall)
        return {"case": name, "ours": {}, "trl": {}, "ours / trl": over, "mean_loss": {}}

    name = "CPU: never slower than TRL's command line for the same work"
    about = {key: value for key, value in ABOUT.items() if key != "device"}
    both = [case("float32, padded", 0.9), case("TRL in bfloat16, ft in float32, padded", 1.5)]
    write(about | {"cases": both}, tmp_path / "train.json")
    assert outcomes(tmp_path)[name] == ("0.90× its time, the worst of 1", True)
    write(about | {"cases": [*both, case("nf4, padded", None)]}, tmp_path / "train.json")
    assert outcomes(tmp_path)[name] == ("0.90× its time, the worst of 1; 1 failed", False)


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
    names = names_of("plan")
    sizes = dict.fromkeys(("planned_gb", "planned_tensors_gb", "peak_gb", "reserved_gb", "outside_gb"), 1.0)
    speeds = {"planned_tokens_per_s": 120.0, "tokens_per_s": 100.0, "time_error": 0.2, "total_error": -0.2}
    cases = {
        name: sizes | speeds | {"error": errors[number] if number < len(errors) else 0.0}
        for number, name in enumerate(names)
    }
    path = tmp_path / "gpu" / "box" / "plan.json"
    write({"cases": cases, "about": ABOUT}, path)
    target = "the plan: median error 5 %, worst 10 %, never under by more than 5 %"
    text, judged = outcomes(tmp_path)[target] or ("", None)
    assert judged is met
    assert f"worst {max(map(abs, errors)):.1%}" in text
    assert "all of the process: median 20.0%" in text
    assert outcomes(tmp_path)["the plan's tokens a second: how far off"] == (
        f"median 20%, from +20% to +20%, {len(names)} points",
        None,
    )
    # The middle of an even number of errors lies between two of them.
    write(
        {
            "cases": {name: cases[name] | {"error": 0.04 * number} for number, name in enumerate(names[:2])},
            "about": ABOUT,
        },
        path,
    )
    assert (outcomes(tmp_path)[target] or ("", None))[0].startswith("tensors: median 2.0%, worst 4.0%")
    assert outcomes(tmp_path)[target][1] is False  # most of the grid is missing
