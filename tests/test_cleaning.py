"""`ft clean`: what it takes, what it leaves, and when it takes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cleaning import clean
from finetune.console import Console
from finetune.errors import RunError, StorageError
from finetune.runs.folder import RunFolder
from tests.conftest import RunFt

SENTENCE = "Nobody may read this."


def make_run(path: Path, **manifest: object) -> RunFolder:
    """A run folder as `ft train`, `ft eval` and `ft export` leave it, with a sentence wherever text can be."""
    run = RunFolder(path)
    for folder in (
        run.checkpoints / "checkpoint-2",
        run.adapter,
        run.merged,
        run.gguf,
        path / "wandb" / "offline-run-1",
    ):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(100))
    (path / "wandb" / "offline-run-1" / "output.log").write_text(SENTENCE)
    for partial in ("adapter.partial", "merged.partial", "gguf/run.gguf.partial"):
        (path / partial).write_text(SENTENCE)
    (run.gguf / "run.gguf").write_bytes(bytes(50))
    run.log.write_text(SENTENCE)
    for kept in (run.config, run.resolved, run.metrics, run.verification):
        kept.write_text("{}")
    scores = {"base": {"loss": 2.0}, "tuned": {"loss": 1.0}, "samples": [{"prompt": SENTENCE}]}
    run.evaluation.write_text(json.dumps(scores))
    accounting = {"read": 3, "dropped": {f"unknown role {SENTENCE!r}": 2}, "first_dropped": {SENTENCE: "rows.jsonl:1"}}
    known = {"format": 1, "state": "finished", "config_path": "a.yaml", "accounting": accounting, "error": SENTENCE}
    run.manifest.write_text(json.dumps({**known, **manifest}))
    return run


def prepared(runs: Path, *keys: str) -> None:
    for key in keys:
        (runs / ".data" / key).mkdir(parents=True)
        (runs / ".data" / key / "data.json").write_text(SENTENCE)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def with_sentence(folder: Path) -> set[str]:
    return {name for name in names(folder) if SENTENCE in (folder / name).read_text("utf-8", errors="replace")}


def test_no_text_and_nothing_that_is_only_needed_to_go_on_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    prepared(tmp_path, "1")
    before = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert len(with_sentence(tmp_path)) == 8
    removed = clean(run, Console(), everything=False)
    assert with_sentence(tmp_path) == set()
    kept = {"config.yaml", "resolved.yaml", "metrics.jsonl", "verification.json", "evaluation.json", "manifest.json"}
    models = {"adapter/model.safetensors", "merged/model.safetensors", "gguf/model.safetensors", "gguf/run.gguf"}
    assert names(run.path) == kept | models | {".lock"}
    after = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert removed.nbytes == before - (after - (run.path / ".lock").stat().st_size)
    scores = json.loads(run.evaluation.read_text("utf-8"))
    assert scores == {"base": {"loss": 2.0}, "tuned": {"loss": 1.0}, "samples": []}
    assert run.read_manifest()["accounting"] == {"read": 3, "dropped": {"removed by ft clean": 2}}


def test_a_second_time_there_is_nothing_left_to_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    clean(run, Console(), everything=False)
    capsys.readouterr()
    removed = clean(run, Console(), everything=False)
    assert (removed.what, removed.nbytes) == ((), 0)
    assert capsys.readouterr().err == "there was nothing to remove\n"


@pytest.mark.parametrize("content", ["[1]", "{not json", '"text"'])
def test_an_evaluation_that_is_not_ours_is_removed_whole(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "a")
    run.evaluation.write_text(content)
    clean(run, Console(), everything=False)
    assert not run.evaluation.exists()


def test_prepared_data_of_other_runs_stays(tmp_path: Path) -> None:
    """`looked-at` is what `ft data` leaves, with other settings: the text is the same and nobody's."""
    run = make_run(tmp_path / "a", prepared="mine")
    make_run(tmp_path / "b", prepared="theirs")
    make_run(tmp_path / "damaged").manifest.write_text("[")
    prepared(tmp_path, "mine", "theirs", "looked-at")
    (tmp_path / ".data" / "hashes.json").write_text("{}")
    clean(run, Console(), everything=False)
    assert sorted(path.name for path in (tmp_path / ".data").iterdir()) == ["hashes.json", "theirs"]


def test_prepared_data_that_is_shared_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", prepared="shared")
    make_run(tmp_path / "b", prepared="shared")
    prepared(tmp_path, "shared")
    clean(run, Console(), everything=False)
    assert list((tmp_path / ".data").iterdir()) == []


def test_what_is_being_prepared_at_this_moment_stays(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive, dead = f"{os.getpid()}-1.partial", f"{ended.pid}-1.partial"
    prepared(tmp_path, alive, dead)
    clean(make_run(tmp_path / "a"), Console(), everything=False)
    assert [path.name for path in (tmp_path / ".data").iterdir()] == [alive]


def test_a_run_that_is_not_finished_is_only_given_up_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", state="interrupted")
    before = names(tmp_path)
    with pytest.raises(RunError, match="not finished, and goes on from its checkpoints") as raised:
        clean(run, Console(), everything=False)
    assert "`ft train a.yaml` finishes it" in str(raised.value.problems[0].hint)
    assert names(tmp_path) - {"a/.lock"} == before
    clean(run, Console(), everything=True)
    assert not run.path.exists()


def test_all_of_a_run_but_nothing_that_is_not_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run.path / "thesis.tex").write_text("mine")
    removed = clean(run, Console(), everything=True)
    assert names(run.path) == {"thesis.tex"}
    assert removed.left == ("thesis.tex",)


def test_a_manifest_of_something_else_is_not_cleaned(tmp_path: Path) -> None:
    """A web application's folder has a manifest.json as well, and may have a log.txt."""
    run = make_run(tmp_path / "a")
    run.manifest.write_text('{"name": "app", "icons": []}')
    before = names(run.path)
    for everything in (False, True):
        with pytest.raises(RunError, match="not written by ft train"):
            clean(run, Console(), everything=everything)
    assert names(run.path) - {".lock"} == before


def test_a_run_in_use_is_not_cleaned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    before = names(run.path)
    with run.lock(), pytest.raises(StorageError, match=f"in use by process {os.getpid()}"):
        clean(run, Console(), everything=True)
    assert names(run.path) - {".lock"} == before


def test_links_are_removed_and_what_they_lead_to_is_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.partial").write_text("mine")
    (elsewhere / "evaluation.json").write_text('{"samples": ["mine"]}')
    for link, target in (
        (run.path / "linked.partial", elsewhere),
        (run.path / "evaluation.json", elsewhere / "evaluation.json"),
        (run.path / "log.txt", elsewhere / "x.partial"),
    ):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    (tmp_path / "runs" / ".data").mkdir()
    (tmp_path / "runs" / ".data" / "key").symlink_to(elsewhere)
    clean(run, Console(), everything=False)
    assert names(elsewhere) == {"x.partial", "evaluation.json"}
    assert (elsewhere / "evaluation.json").read_text("utf-8") == '{"samples": ["mine"]}'
    assert json.loads(run.evaluation.read_text("utf-8")) == {"samples": []}
    assert not run.evaluation.is_symlink()
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_symlink()]


def test_from_inside_the_folder_and_by_a_link_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs" / "a")
    prepared(tmp_path / "runs", "1")
    monkeypatch.chdir(run.path)
    clean(RunFolder(Path()), Console(), everything=False)
    assert list((tmp_path / "runs" / ".data").iterdir()) == []
    link = tmp_path / "runs" / "link"
    monkeypatch.chdir(tmp_path)
    moved = Path(run.path.rename(tmp_path / "moved"))
    link.symlink_to(moved)
    clean(RunFolder(link), Console(), everything=True)
    assert not os.path.lexists(link)
    assert not moved.exists()


def test_prepared_data_that_lies_within_the_run(tmp_path: Path) -> None:
    """Earlier versions put it there when they were given `.` for the run."""
    run = make_run(tmp_path / "a")
    prepared(run.path, "1")
    clean(run, Console(), everything=False)
    assert not (run.path / ".data").exists()


def test_the_command(tmp_path: Path, run_ft: RunFt) -> None:
    run = make_run(tmp_path / "runs" / "a")
    result = run_ft("clean", "a", "--json", cwd=tmp_path)
    assert result.code == 0, result.stderr
    (event,) = (json.loads(line) for line in result.stdout.splitlines())
    assert event["event"] == "cleaned"
    assert event["bytes"] > 0
    assert "runs/a/log.txt" in event["removed"]
    assert "the answers in runs/a/evaluation.json" in event["removed"]
    shown = run_ft("clean", run.path, "--all", cwd=tmp_path).stderr.splitlines()
    assert "removed runs/a" in shown
    assert shown[-1].endswith(" are free again")
