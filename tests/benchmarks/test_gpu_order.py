"""What the GPU suite measures first; and nothing that goes wrong in a case ends it, or is taken for something else."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.case import Case, Context, Turn
from benchmarks.gpu.chunks import CHUNKS, Chunk, Waiting, batch, in_order, pace
from benchmarks.gpu.guess import START, linear_parameters, seconds
from benchmarks.gpu.models import Device
from benchmarks.gpu.worker import read, work
from benchmarks.measuring import Failed, write

CPU = Device("cpu", tiny=True)


def chunk(*cases: Case) -> Chunk:
    return Chunk(lambda _: list(cases), lambda found: ", ".join(found) + "\n", lambda one: str(one.get("wrong", "")))


def only(monkeypatch: pytest.MonkeyPatch, **chunks: Chunk) -> list[Waiting]:
    """The suite has these chunks and no others; their cases in order."""
    monkeypatch.setattr(run, "CHUNKS", chunks)
    monkeypatch.setattr("benchmarks.gpu.chunks.CHUNKS", chunks)
    monkeypatch.setattr("benchmarks.gpu.worker.CHUNKS", chunks)
    return in_order(list(chunks), "", tiny=True)


def worker_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *ends: tuple[int | None, str]) -> list[list[str]]:
    """Stands for the process: how each ends, and which case it says to have begun. The names each was given."""
    given, waiting = list[list[str]](), list(ends)

    def wait_for(command: list[str], until: float) -> tuple[int | None, str]:
        given.append(command[command.index("--names") + 1 :])
        code, begun = waiting.pop(0)
        if begun:
            (tmp_path / f"{command[command.index('--worker') + 1]}.running").write_text(begun)
        return code, "its last words"

    monkeypatch.setattr(run, "_wait_for", wait_for)
    return given


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
    only(monkeypatch, speed=chunk(*cases))
    assert work("speed", [case.name for case in cases], CPU, tmp_path, time.time() + 1000) == 0
    found = read(tmp_path / "speed.json")["cases"]
    assert "CUDA error: something" in found["broken"]["failed"]
    assert found["refused"]["failed"] == "not installed"
    assert found["good"]["x"] == found["last"]["x"] == 1.0
    assert [list(done) for done in seen] == [[], ["good"]]
    assert not (tmp_path / "speed.running").exists()
    text = run.page(tmp_path)
    assert "good, last" in text
    assert "- broken failed: RuntimeError: CUDA error: something" in text


def test_failures_and_what_is_not_as_it_should_be_are_said_last_and_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only(monkeypatch, correct=chunk(Case("one", lambda _: {})), speed=chunk(Case("two", lambda _: {})))
    write({"cases": {"one": {"wrong": "not the same", "seconds": 1.0}}}, tmp_path / "correct.json")
    write({"cases": {"two": {"failed": "a\nb"}}}, tmp_path / "speed.json")
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path), "--device", "cpu", "--chunks", "correct", "speed"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert str(ended.value).splitlines() == [
        "2 cases failed or are not as they should be:",
        "correct: one: not the same",
        "speed: two failed: b",
    ]


def test_an_unequal_way_and_failing_tests_are_not_as_they_should_be() -> None:
    assert CHUNKS["correct"].wrong({"equal": False})
    assert not CHUNKS["correct"].wrong({"equal": True})
    assert CHUNKS["tests"].wrong({"failures": {"test_x": "why"}}) == "failed: test_x"
    assert not CHUNKS["tests"].wrong({"failures": {}})


def test_a_case_is_not_begun_without_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = only(monkeypatch, speed=chunk(Case("long", lambda _: {}, seconds=100)))
    assert work("speed", ["long"], CPU, tmp_path, time.time() - 1) == 0
    assert run.measure(order, CPU, tmp_path, time.time() + 50) == order
    assert not (tmp_path / "speed.json").exists()


def test_a_worker_that_dies_costs_its_case_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = only(monkeypatch, speed=chunk(Case("one", lambda _: {}), Case("two", lambda _: {})))
    (tmp_path / "speed.running").write_text("two")  # of a call that was killed: no word about this one
    given = worker_that(monkeypatch, tmp_path, (-9, "one"), (1, ""))
    assert run.measure(order, CPU, tmp_path, time.time() + 1000) == []
    found = read(tmp_path / "speed.json")["cases"]
    assert found == {
        "one": {"failed": "its process ended with -9: its last words"},
        "two": {"failed": "its process ended with 1 before it began: its last words"},
    }
    assert given == [["one", "two"], ["two"]]


def test_what_was_never_begun_is_left_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = only(monkeypatch, speed=chunk(Case("one", lambda _: {}), Case("two", lambda _: {})))
    worker_that(monkeypatch, tmp_path, (0, ""), (0, ""))
    assert run.measure(order, CPU, tmp_path, time.time() + 1000) == order
    assert read(tmp_path / "speed.json")["cases"] == {}


def test_what_the_end_of_a_call_cuts_off_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = only(monkeypatch, speed=chunk(Case("one", lambda _: {})))
    for left in (order, []):
        worker_that(monkeypatch, tmp_path, (None, "one"))
        assert run.measure(order, CPU, tmp_path, time.time() + 1000) == left
    assert "twice" in read(tmp_path / "speed.json")["cases"]["one"]["failed"]


def test_a_process_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    script = "import subprocess, sys, pathlib; child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1); "
    script += f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); child.wait()"
    code, _ = run._wait_for([sys.executable, "-c", script], time.time() - 7)
    assert code is None
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    patience = time.time() + 10
    while state.exists() and " Z " not in state.read_text():  # killed, and about to be gone
        assert time.time() < patience
        time.sleep(0.05)


def test_retry_forgets_failures_only(tmp_path: Path) -> None:
    write({"cases": {"one": {"failed": "then"}, "two": {"x": 1}}}, tmp_path / "speed.json")
    run.forget_failures(tmp_path, ["speed"])
    assert read(tmp_path / "speed.json")["cases"] == {"two": {"x": 1}}


# -- the order ----------------------------------------------------------------------------------------------------


def test_what_matters_most_comes_first_and_a_loan_of_half_an_hour_has_it() -> None:
    order = in_order(list(CHUNKS), "", tiny=False)
    turns = [one.case.turn for one in order]
    assert turns == sorted(turns)
    assert 12 <= sum(one.chunk == "correct" for one in order if one.case.turn == Turn.CORRECT) <= 16
    assert 13 <= turns.count(Turn.PLAN) <= 16
    assert sum(one.case.seconds for one in order if one.case.turn <= Turn.PLAN) < 30 * 60
    telling = [one.case.name for one in order if one.case.turn == Turn.TELLING]
    for model in ("llama3-8b", "mistral-7b", "qwen2.5-7b"):
        for kind in ("dense 2k", "chats"):
            for way in ("trl defaults", "trl tuned", "ft auto"):
                assert f"{model}, {kind}, {way}" in telling
    # What is compared with TRL's memory comes after it.
    for name in telling:
        if name.endswith("in trl's memory"):
            reference = f"{name.rpartition(', ')[0]}, trl defaults"
            assert telling.index(reference) < telling.index(name)
    listed = run.listing(order)
    assert listed.count("\n") == len(order) + 2


def test_unsloth_is_passed_over_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = Case("x, unsloth", lambda _: {}, needs="no_such_package")
    has = Case("y", lambda _: {}, needs="json")
    assert [one.case.name for one in only(monkeypatch, speed=chunk(lacks, has))] == ["y"]


def test_every_case_of_unsloth_says_what_it_needs() -> None:
    cases = [case for case in CHUNKS["speed"].cases(False) if "unsloth" in case.name]
    assert cases
    assert {(case.needs, case.process) for case in cases} == {("unsloth", "unsloth")}


def test_cases_share_a_process_only_with_their_like_and_only_as_far_as_time_is_there() -> None:
    def one(name: str, seconds: float = 10, process: str = "ours", turn: Turn = Turn.TELLING) -> Waiting:
        return Waiting("speed", Case(name, lambda _: {}, seconds, turn, process))

    order = [one("long", 500), one("a"), one("b"), one("c", process="tuned"), one("d")]
    assert [each.case.name for each in batch(order, 100, 1.0)] == ["a", "b"]
    assert [each.case.name for each in batch(order, 1000, 1.0)] == ["long", "a", "b"]
    assert [each.case.name for each in batch(order, START + 15, 1.0)] == ["a"]
    assert batch(order, START + 15, 2.0) == []
    assert [each.case.name for each in batch([one("a"), one("b", turn=Turn.REST)], 100, 1.0)] == ["a"]


def test_guesses_are_corrected_by_what_was_measured() -> None:
    order = [Waiting("speed", Case(str(number), lambda _: {}, 10.0)) for number in range(4)]
    known = {"speed": {"0": {"seconds": 20.0}, "1": {"seconds": 30.0}, "2": {"failed": "x", "seconds": 1.0}}}
    assert pace(known, order) == 1.0  # two say too little
    known["speed"]["3"] = {"seconds": 25.0}
    assert pace(known, order) == 2.5


def test_guesses_grow_with_the_model_and_with_what_is_recomputed() -> None:
    large = seconds("llama3-8b", 16384, 15, length=2048)
    assert (
        large
        > seconds("llama3-8b", 16384, 15, length=2048, recomputed=0)
        > seconds("llama3.2-1b", 16384, 15, length=2048)
    )
    # Llama-3-8B has 6.98 billion parameters in its linear layers (8.03 less 2 × 128256 × 4096 and the norms).
    assert linear_parameters("llama3-8b") == pytest.approx(6.98e9, rel=1e-3)
