"""What the benchmarks make of processes and numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import jobs, train
from benchmarks.jobs import Job, steps_of_ours, steps_of_trl
from benchmarks.measuring import ROOT, Ended, Failed, Line, in_turn, last_words, medians, ratio, rounded, run, write


def test_a_process_is_timed_line_by_line(tmp_path: Path) -> None:
    code = "import time; print('a', flush=True); time.sleep(0.3); print('b')"
    ended = run([sys.executable, "-c", code], tmp_path)
    assert [line.text for line in ended.lines] == ["a", "b"]
    assert ended.lines[1].at - ended.lines[0].at > 0.25
    assert ended.code == 0
    assert ended.wall >= ended.lines[1].at


def test_peak_memory_is_that_of_the_process_if_the_one_that_measures_is_small(tmp_path: Path) -> None:
    """A child's peak begins with what its parent held when it was started: this one is much too large for it."""
    measured = "bytearray(192 << 20)"
    code = (
        "import sys; from pathlib import Path; from benchmarks.measuring import run; "
        f"print(run([sys.executable, '-c', {measured!r}], Path({str(tmp_path)!r})).peak_mb)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # The interpreter itself takes some 10 MB.
    assert 192 < float(done.stdout) < 230


def test_what_a_failing_process_says_is_kept(tmp_path: Path) -> None:
    ended = run([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path)
    assert ended.code == 1
    assert last_words(tmp_path) == "no such thing"


def test_ways_alternate_and_one_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def way(name: str, value: float) -> dict[str, float]:
        order.append(name)
        return {"s": value}

    def broken() -> dict[str, float]:
        order.append("broken")
        raise Failed("not here")

    rounds, failed = in_turn({"one": lambda: way("one", 2.0), "other": lambda: way("other", 4.0), "broken": broken}, 3)
    assert order == ["one", "other", "broken", "other", "one", "one", "other"]
    assert failed == {"broken": "not here"}
    assert ratio(rounds, "one", "other", "s") == 0.5
    assert ratio(rounds, "one", "broken", "s") is None
    assert medians(rounds, "one") == {"s": 2.0}
    assert medians(rounds, "broken") == {}


def test_the_ratio_is_the_median_of_the_rounds_and_not_of_the_numbers() -> None:
    """A slow moment of the machine hits both, and drops out."""
    rounds = [{"a": {"s": one}, "b": {"s": other}} for one, other in ((1.0, 2.0), (10.0, 20.0), (3.0, 4.0))]
    assert ratio(rounds, "a", "b", "s") == 0.5
    assert medians(rounds, "a") == {"s": 3.0}


def test_steps_are_read_from_either_trainers_output() -> None:
    ours = [
        Line(1.0, '{"event": "data", "tokens": 10}'),
        Line(2.0, '{"event": "metrics", "step": 1, "loss": 3.0}'),
        Line(2.5, '{"event": "metrics", "step": 2, "loss": 2.0}'),
    ]
    found = steps_of_ours(ours)
    assert (found.times, found.losses, found.seconds) == ([2.0, 2.5], [3.0, 2.0], 0.5)
    trl = [
        Line(1.0, "{'loss': '3.0', 'num_tokens': '100'}"),
        Line(2.0, "{'loss': 2.0, 'num_tokens': 220.0}"),
        Line(3.0, "{'train_runtime': 3.0, 'train_loss': 2.5}"),
    ]
    found = steps_of_trl(trl)
    assert (found.losses, found.tokens, found.seconds) == ([3.0, 2.0], [100.0, 220.0], 1.0)


def test_a_loss_that_is_no_number_is_read_too() -> None:
    lines = [Line(1.0, "{'loss': nan, 'grad_norm': inf}"), Line(2.0, "{'loss': 'nan'}"), Line(3.0, "{'loss': -inf}")]
    losses = steps_of_trl(lines).losses
    assert [math.isnan(loss) for loss in losses] == [True, True, False]
    assert losses[2] == -math.inf


def test_tokens_are_counted_once_for_both_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL counts the line feed behind each answer too: here it says 110 a step where there are 100."""
    said = {
        "finetune.cli": [
            '{"event": "data", "tokens": 1000, "supervised_tokens": 600, "sequences": 40}',
            '{"event": "metrics", "loss": 3.0}',
            '{"event": "metrics", "loss": 2.0}',
        ],
        "sft": ["{'loss': 3.0, 'num_tokens': 110}", "{'loss': 2.0, 'num_tokens': 220}"],
    }

    def ended(command: list[str], folder: Path, environment: object) -> Ended:
        assert environment == train.THREADS, "both have as many threads"
        texts = next(texts for key, texts in said.items() if key in command)
        return Ended(0, 9.0, 8.0, 100.0, [Line(float(number), text) for number, text in enumerate(texts)])

    monkeypatch.setattr(train, "run", ended)
    case = train.Measured(Job(steps=2, micro_batch=4, length=64), tmp_path, tmp_path)
    with pytest.raises(Failed, match="counts the tokens for both"):
        case.trl()
    assert case.ours()["loss_tokens_per_s"] == case.trl()["loss_tokens_per_s"] == 4 * 600 / 40
    assert case.tokens_per_step == {"ours": 100.0, "trl": 110.0}


def test_trl_computes_in_bfloat16_on_a_cpu_only_where_that_is_the_case(tmp_path: Path) -> None:
    job = Job(steps=2, micro_batch=4, length=64)
    plain = jobs.trl(job, tmp_path, tmp_path)
    assert (plain[plain.index("--dtype") + 1], plain[plain.index("--bf16") + 1]) == ("float32", "False")
    half = jobs.trl(dataclasses.replace(job, trl_bfloat16=True), tmp_path, tmp_path)
    assert (half[half.index("--dtype") + 1], half[half.index("--bf16") + 1]) == ("bfloat16", "True")


def test_a_result_is_written_whole_with_four_digits(tmp_path: Path) -> None:
    write({"a": [1.23456789, {"b": 123456.7}], "n": 3}, tmp_path / "deep" / "result.json")
    assert json.loads((tmp_path / "deep" / "result.json").read_text()) == {"a": [1.235, {"b": 123500.0}], "n": 3}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]
    assert rounded(0.0) == 0.0
