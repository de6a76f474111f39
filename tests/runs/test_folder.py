"""Run folders: which one a command means, the lock, and folders that are damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import FinetuneError, RunError, StorageError
from finetune.runs.folder import RunFolder, finished_run, list_runs, next_run, open_run, runs_of


def make(path: Path, **manifest: object) -> RunFolder:
    run = RunFolder(path)
    run.create()
    run.update_manifest(**{"state": "finished", **manifest})
    return run


def message(error: pytest.ExceptionInfo[FinetuneError]) -> str:
    (problem,) = error.value.problems
    return f"{problem} | {problem.hint}"


def test_runs_of_a_config_in_the_order_they_were_made(tmp_path: Path) -> None:
    for name in ("legal", "legal-2", "legal-10", "legal-3", "legal-llama", "legal-1", "legal-02", "legal-x", "alegal"):
        make(tmp_path / name)
    (tmp_path / "legal-4").write_text("a file")
    assert [run.name for run in runs_of("legal", tmp_path)] == ["legal", "legal-2", "legal-3", "legal-10"]
    assert next_run("legal", tmp_path).name == "legal-11"
    assert next_run("legal-llama", tmp_path).name == "legal-llama-2"
    assert next_run("new", tmp_path).name == "new"
    assert next_run("new", tmp_path / "nowhere").path == tmp_path / "nowhere" / "new"


def test_the_runs_of_a_config_whose_name_ends_in_a_number(tmp_path: Path) -> None:
    make(tmp_path / "legal-2", config_path="configs/legal-2.yaml")
    assert runs_of("legal", tmp_path) == []
    assert [run.name for run in runs_of("legal-2", tmp_path)] == ["legal-2"]
    make(next_run("legal", tmp_path).path, config_path="configs/legal.yaml")
    assert next_run("legal", tmp_path).name == "legal-3"
    assert next_run("legal-2", tmp_path).name == "legal-2-2"


def test_a_name_with_the_letters_of_a_pattern(tmp_path: Path) -> None:
    make(tmp_path / "a.b")
    make(tmp_path / "axb")
    assert [run.name for run in runs_of("a.b", tmp_path)] == ["a.b"]


def test_a_run_is_found_by_its_folder_or_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("runs/legal"))
    assert open_run(Path("runs/legal")).path == Path("runs/legal")
    assert open_run(Path("legal")).path == Path("runs/legal")
    assert open_run(tmp_path / "runs" / "legal").name == "legal"


@pytest.mark.parametrize(("inside", "named"), [(".", "."), ("./", "./"), ("adapter", ".."), (".", "adapter/..")])
def test_a_run_that_is_named_without_its_name_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, named: str
) -> None:
    """Its name is in the names of exports, and prepared data lies beside it: `.` has neither name nor parent."""
    run = make(tmp_path / "runs" / "legal")
    run.adapter.mkdir()
    monkeypatch.chdir(run.path / inside)
    found = open_run(Path(named))
    assert (found.name, found.path.parent) == ("legal", tmp_path.resolve() / "runs")


def test_a_folder_of_the_same_name_is_not_taken_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("runs/legal"))
    Path("legal").mkdir()
    assert open_run(Path("legal")).path == Path("runs/legal")
    make(Path("legal"))
    assert open_run(Path("legal")).path == Path("legal")
    make(Path("other"))
    with pytest.raises(RunError, match="no such run"):
        open_run(Path("../other"))  # and not `runs/../other`


def test_what_a_person_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError) as none:
        open_run(Path("legal"))
    assert message(none) == "legal: no such run | `ft runs` lists the runs; `ft train CONFIG` makes one"
    run = make(Path("runs/legal"), config_path="configs/legal.yaml")
    with pytest.raises(RunError) as close:
        open_run(Path("leagl"))
    assert message(close) == "leagl: no such run | did you mean runs/legal?"
    with pytest.raises(RunError) as empty:
        open_run(Path("."))
    assert message(empty) == ".: not a run folder: it has no manifest.json | `ft runs` lists the runs"
    with pytest.raises(RunError) as unfinished:
        finished_run(Path("legal"))
    assert message(unfinished) == (
        "runs/legal: this run has no trained adapter yet | `ft train configs/legal.yaml` goes on with it"
    )
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    assert finished_run(Path("legal")).path == run.path


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b"null"])
def test_a_damaged_manifest(tmp_path: Path, content: bytes) -> None:
    run = make(tmp_path / "legal")
    run.manifest.write_bytes(content)
    with pytest.raises(RunError) as caught:
        run.read_manifest()
    (problem,) = caught.value.problems
    assert problem.place == str(run.manifest)
    assert "--fresh" in str(problem.hint)


def test_a_manifest_that_is_a_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "legal")
    run.manifest.mkdir(parents=True)
    with pytest.raises(RunError, match=r"manifest\.json: is a folder, not a file"):
        open_run(run.path)
    assert list_runs(tmp_path) == []


def test_the_state_of_a_folder_that_never_became_a_run(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).state is None
    assert make(tmp_path / "legal", state="interrupted").state == "interrupted"


def test_a_manifest_is_updated_field_by_field(tmp_path: Path) -> None:
    run = make(tmp_path / "legal", seed=1)
    run.update_manifest(state="failed", loss=float("nan"))
    assert json.loads(run.manifest.read_text()) == {"state": "failed", "seed": 1, "loss": None}


def test_only_runs_are_listed(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "nowhere") == []
    make(tmp_path / "b")
    make(tmp_path / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("x")
    assert [run.name for run in list_runs(tmp_path)] == ["a", "b"]


def test_a_file_where_the_runs_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x")
    with pytest.raises(StorageError) as caught:
        RunFolder(tmp_path / "runs" / "legal").create()
    assert message(caught) == (
        f"{tmp_path}/runs/legal: cannot be written: Not a directory | a file is where a folder should be: move it away"
    )
    with pytest.raises(StorageError) as itself:
        RunFolder(tmp_path / "runs").create()
    assert "a file is where a folder should be" in message(itself)


HOLD = """
import sys
from pathlib import Path
from finetune.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    run = make(tmp_path / "legal")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StorageError) as caught, run.lock():
            pass
        assert message(caught) == (
            f"{run.path}: in use by process {other.pid} | wait for it, or start a second run with --fresh"
        )
        other.kill()
        other.wait()
    # However the other process ended, the lock went with it.
    with run.lock():
        pass
