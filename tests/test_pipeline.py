"""`ft train` as a person lives with it: again after a crash or after the end, with other settings, by two at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from finetune.config.load import load
from finetune.config.schema import Config
from finetune.errors import MissingExtraError, WorldError
from finetune.runs.tracking import check_tracking
from tests.conftest import RunFt
from tests.train.conftest import SAMPLES, TINY


def write_config(folder: Path, **train: object) -> Path:
    lines = (SAMPLES / "contract-clauses.jsonl").read_text("utf-8").splitlines()[:40]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    settings = {"max_steps": 6, "save_every": 2, "log_every": 1, "micro_batch_size": 2, "sequence_length": 256}
    config = {
        "base": str(TINY),
        "data": [{"path": "rows.jsonl"}],
        "evaluation": {"split": 4, "samples": 1, "max_new_tokens": 8},
        "train": {**settings, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, **train},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, run_ft: RunFt) -> Path:
    """A folder with tiny.yaml and its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_config(folder)
    result = run_ft("train", "tiny.yaml", cwd=folder)
    assert result.code == 0, result.stderr
    return folder


def test_a_run_leaves_exactly_the_files_that_the_readme_explains(finished: Path) -> None:
    names = {path.name for path in (finished / "runs" / "tiny").iterdir()}
    expected = {"config.yaml", "resolved.yaml", "manifest.json", "metrics.jsonl", "evaluation.json", "log.txt"}
    assert names == expected | {"checkpoints", "adapter", ".lock"}
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    for name in names:
        assert f"`{name}" in readme, f"the README does not explain {name}"


def test_a_finished_run_is_not_trained_again(finished: Path, run_ft: RunFt) -> None:
    before = adapter_bytes(finished / "runs" / "tiny")
    result = run_ft("train", "tiny.yaml", cwd=finished)
    assert result.code == 0
    assert "is finished" in result.stderr
    assert "--fresh" in result.stderr
    assert adapter_bytes(finished / "runs" / "tiny") == before


def test_other_settings_for_the_same_run_are_refused_and_named(finished: Path, run_ft: RunFt) -> None:
    result = run_ft("train", "tiny.yaml", "-s", "lora.rank=4", "-s", "train.seed=7", cwd=finished)
    assert result.code == 2
    assert "lora.rank was 16 and is 4 now" in result.stderr
    assert "train.seed was 42 and is 7 now" in result.stderr
    assert "tiny-2" in result.stderr


def test_the_resolved_config_makes_the_same_run_again(finished: Path, run_ft: RunFt) -> None:
    resolved = finished / "runs" / "tiny" / "resolved.yaml"
    assert load(resolved).config == load(finished / "tiny.yaml").config
    result = run_ft("train", resolved, "--runs", "again", cwd=finished)
    assert result.code == 0, result.stderr
    assert adapter_bytes(finished / "again" / "resolved") == adapter_bytes(finished / "runs" / "tiny")


def test_the_screen_stays_small_and_clean(finished: Path, run_ft: RunFt) -> None:
    result = run_ft("train", "tiny.yaml", "--fresh", cwd=finished)
    assert result.code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) <= 40
    assert result.stdout == ""
    assert not [line for line in lines if "warn" in line.lower()]
    assert (finished / "runs" / "tiny-2" / "adapter").is_dir()


def test_events_are_json_lines(finished: Path, run_ft: RunFt) -> None:
    result = run_ft("train", "tiny.yaml", "--fresh", "--json", "--runs", "events", cwd=finished)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert result.stderr == ""
    assert kinds.count("metrics") == 6
    assert {"run", "evaluation", "finished"} <= set(kinds)


def test_a_killed_run_goes_on_to_the_same_adapter(finished: Path, tmp_path: Path, run_ft: RunFt) -> None:
    write_config(tmp_path)
    command = [sys.executable, "-m", "finetune.cli", "train", "tiny.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    run = tmp_path / "runs" / "tiny"
    deadline = time.monotonic() + 240
    while not list(run.glob("checkpoints/checkpoint-[0-9]")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "adapter").exists()
    result = run_ft("train", "tiny.yaml", cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert "going on from step" in result.stderr
    assert adapter_bytes(run) == adapter_bytes(finished / "runs" / "tiny")


def test_a_learning_rate_that_blows_up_stops_the_run_and_leaves_no_adapter(tmp_path: Path, run_ft: RunFt) -> None:
    write_config(tmp_path)
    result = run_ft("train", "tiny.yaml", "-s", "train.learning_rate=1e30", cwd=tmp_path)
    run = tmp_path / "runs" / "tiny"
    assert result.code == 1
    assert "error: the loss is no longer a finite number at step" in result.stderr
    assert "hint: lower train.learning_rate" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (run / "adapter").exists()
    assert json.loads((run / "manifest.json").read_text("utf-8"))["state"] == "failed"


def test_a_second_process_in_the_same_run_is_refused(tmp_path: Path, run_ft: RunFt) -> None:
    from finetune.runs.folder import RunFolder

    write_config(tmp_path)
    run = RunFolder(tmp_path / "runs" / "tiny")
    run.create()
    with run.lock():
        result = run_ft("train", "tiny.yaml", cwd=tmp_path)
    assert result.code == 1
    assert f"in use by process {os.getpid()}" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 6


def test_wandb_is_used_only_when_named_and_works_offline(
    finished: Path, tmp_path: Path, run_ft: RunFt, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(finished.rglob("wandb"))
    write_config(tmp_path, max_steps=2)
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run_ft("train", "tiny.yaml", "-s", "tracking=wandb", cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert list((tmp_path / "runs" / "tiny" / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_without_a_login_is_an_error_and_never_a_question(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = Config.model_validate({"base": "x", "data": [{"path": "y"}], "tracking": "wandb"})
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(WorldError, match="no login"):
        check_tracking(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError):
        check_tracking(config)
    check_tracking(config.model_copy(update={"tracking": "none"}))


def test_a_run_outlives_its_data(finished: Path, tmp_path: Path, run_ft: RunFt) -> None:
    import shutil

    shutil.copytree(finished / "runs" / "tiny", tmp_path / "moved")
    resolved = tmp_path / "moved" / "resolved.yaml"
    resolved.write_text(resolved.read_text("utf-8").replace("rows.jsonl", "gone.jsonl"), "utf-8")
    result = run_ft("export", tmp_path / "moved", "--to", "hf")
    assert result.code == 0, result.stderr
    assert (tmp_path / "moved" / "merged" / "model.safetensors").is_file()
