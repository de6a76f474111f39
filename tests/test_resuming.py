"""`ft train`, again and again: what goes on, what begins anew, what is refused, and that two do not meet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.console import Console
from finetune.errors import ConfigError, RunError, StorageError
from finetune.pipeline import Finished, train
from finetune.runs.folder import RunFolder
from finetune.stopping import Stopped, Stopper
from tests.train.conftest import tiny_base  # noqa: F401 - a fixture

SAMPLES = Path(__file__).parents[1] / "data" / "samples"

CONFIG = """
base: {base}
data: [{{path: rows.jsonl}}]
evaluation: {{split: 2, samples: 0}}
quantization: none
lora: {{rank: 4}}
train: {{max_steps: 4, save_every: 2, micro_batch_size: 2, gradient_accumulation_steps: 1, packing: false}}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_base: Path) -> Path:  # noqa: F811
    rows = (SAMPLES / "contract-clauses.jsonl").read_text("utf-8").splitlines()[:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "c.yaml").write_text(CONFIG.format(base=tiny_base))
    return tmp_path / "c.yaml"


def start(config: Path, *overrides: str, fresh: bool = False, allow: tuple[str, ...] = ()) -> Finished:
    return train(config, overrides, config.parent / "runs", Console(), fresh=fresh, allow_changed=allow)


def stopped_at(config: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was asked to stop in the middle of a step."""
    asked = 0

    def stop(self: Stopper) -> str | None:
        nonlocal asked
        asked += 1
        return "SIGTERM" if asked >= step else None

    with monkeypatch.context() as patch:
        patch.setattr(Stopper, "__init__", lambda self: setattr(self, "_held", False))
        patch.setattr(Stopper, "asked", property(stop), raising=False)
        with pytest.raises(Stopped):
            start(config)
    run = RunFolder(config.parent / "runs" / "c")
    assert run.state == "interrupted"
    assert (run.checkpoints / f"checkpoint-{step}").is_dir()
    return run


def adapter_of(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def manifest(run: RunFolder) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run.manifest.read_text())
    return value


def problems(caught: pytest.ExceptionInfo[RunError]) -> list[str]:
    return [problem.message for problem in caught.value.problems]


def test_a_run_of_which_nothing_was_trained_takes_the_config_as_it_is_now(config: Path) -> None:
    run = RunFolder(config.parent / "runs" / "c")
    run.create()
    run.update_manifest(state="failed", config_path=str(config))
    done = start(config, "train.learning_rate=0.01").run
    assert done == run
    assert "learning_rate: 0.01" in run.resolved.read_text()


def test_a_changed_setting_is_refused_named_and_taken_up_when_it_is_allowed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_at(config, 3, monkeypatch)
    before = run.resolved.read_text()
    with pytest.raises(RunError) as caught:
        start(config, "train.learning_rate=0.001", "lora.alpha=8.0")
    assert problems(caught) == [
        "lora.alpha was 32.0 and is 8.0 now (this run is at step 3)",
        "train.learning_rate was 0.0002 and is 0.001 now (this run is at step 3)",
    ]
    assert run.resolved.read_text() == before
    start(config, "train.learning_rate=0.001", allow=("train.learning_rate",))
    assert "learning_rate: 0.001" in run.resolved.read_text()
    assert manifest(run)["changes"] == [{"step": 3, "key": "train.learning_rate", "before": 0.0002, "now": 0.001}]
    rates = [json.loads(line)["learning_rate"] for line in run.metrics.read_text().splitlines() if "learning" in line]
    assert rates[3] == pytest.approx(0.001 / 4)  # where the cosine is at step 4, of the new rate


def test_changed_rows_and_a_changed_base_are_seen_under_the_same_names(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(next(line for line in config.read_text().splitlines() if "base" in line).split()[1], base)
    config.write_text(CONFIG.format(base=base))
    stopped_at(config, 3, monkeypatch)
    rows = tmp_path / "rows.jsonl"
    kept = rows.read_text()
    rows.write_text(kept.replace("the", "a"))
    with pytest.raises(RunError, match="data has changed"):
        start(config)
    rows.write_text(kept)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for position in range(len(content) // 2, len(content), 2):
        content[position] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match="base has changed"):
        start(config)
    start(config, allow=("base",))


def test_a_finished_run_goes_on_when_it_is_given_more_steps(config: Path) -> None:
    first = start(config)
    before = adapter_of(first.run)
    assert start(config).already
    again = start(config, "train.max_steps=6")
    assert again.run == first.run
    assert not again.already
    steps = [json.loads(line)["step"] for line in first.run.metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert any(not torch.equal(before[name], tensor) for name, tensor in adapter_of(first.run).items())
    assert start(config, "train.max_steps=6").already
    with pytest.raises(RunError, match=r"train.max_steps was 6 and is 4 now"):
        start(config)


def test_a_finished_run_without_checkpoints_does_not_go_on(config: Path) -> None:
    import shutil

    run = start(config).run
    shutil.rmtree(run.checkpoints)
    assert start(config).already
    with pytest.raises(RunError, match=r"finished with other settings \(train.max_steps\), and no checkpoint is left"):
        start(config, "train.max_steps=6")


def test_another_batch_is_refused_because_the_place_in_the_data_is_counted_in_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(config, 3, monkeypatch)
    with pytest.raises(RunError) as caught:
        start(config, "train.micro_batch_size=4", allow=("train.micro_batch_size",))
    assert problems(caught) == ["train.micro_batch_size was 2 and is 4 now (this run is at step 3)"]
    assert "--allow-changed" not in str(caught.value.problems[0].hint)
    start(config, "train.micro_batch_size=1", "train.gradient_accumulation_steps=2")


def test_a_change_that_nothing_is_left_to_train_with_is_refused(config: Path) -> None:
    run = start(config).run
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"step 4 was the last: nothing is left to train with lora\.alpha"):
        start(config, "lora.alpha=64.0", allow=("lora.alpha",))
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before
    assert json.loads((run.adapter / "adapter_config.json").read_text())["lora_alpha"] == 32


def test_a_finished_run_whose_data_was_edited_is_not_taken_for_done(config: Path, tmp_path: Path) -> None:
    import shutil

    run = start(config).run
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("the", "a"))
    with pytest.raises(RunError, match="data has changed"):
        start(config)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(RunError, match="finished with other data"):
        start(config)


@pytest.mark.fault("a trained adapter that is lost or damaged", "start", "made again from the last checkpoint")
@pytest.mark.parametrize("harm", ["removed", "truncated"])
def test_a_finished_run_without_its_adapter_gets_it_back(config: Path, harm: str) -> None:
    import shutil

    run = start(config).run
    weights = run.adapter / "adapter_model.safetensors"
    before = weights.read_bytes()
    if harm == "removed":
        shutil.rmtree(run.adapter)
    else:
        weights.write_bytes(before[:-100])
    assert not start(config).already
    assert weights.read_bytes() == before


def test_without_a_whole_checkpoint_training_begins_again_and_says_so(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped_at(config, 3, monkeypatch)
    for checkpoint in run.checkpoints.iterdir():
        (checkpoint / "optimizer.pt").unlink()
    capsys.readouterr()
    start(config)
    said = capsys.readouterr().err
    assert said.count("is passed over: optimizer.pt is missing") >= 2
    assert f"no checkpoint of {run.path} is whole: training begins again at step 0" in said
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = train(config, [], config.parent / "unbroken", Console()).run
    run = stopped_at(config, 3, monkeypatch)
    weights = run.checkpoints / "checkpoint-3" / "optimizer.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    start(config)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (unbroken.adapter / name).read_bytes()


def test_fresh_needs_nothing_of_the_run_before(config: Path) -> None:
    runs = config.parent / "runs"
    run = RunFolder(runs / "c")
    run.create()
    run.manifest.write_text("{")
    assert start(config, fresh=True).run == RunFolder(runs / "c-2")
    third = RunFolder(runs / "c-3")
    third.create()  # somebody is still tokenising
    with third.lock():
        assert start(config, fresh=True).run == RunFolder(runs / "c-4")


def test_a_key_to_allow_that_does_not_exist_is_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no key 'lora\.alhpa'"):
        start(config, allow=("lora.alhpa",))


def test_metrics_that_were_damaged_do_not_keep_a_run_from_going_on(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_at(config, 3, monkeypatch)
    with open(run.metrics, "ab") as file:
        file.write(b"\xff\xfe\n")
    start(config)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_lengthened_run_says_that_its_exports_are_of_the_adapter_before(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(config).run
    run.gguf.mkdir()
    capsys.readouterr()
    start(config, "train.max_steps=6")
    said = capsys.readouterr().err
    assert "lengthened from 4 to 6 steps" in said
    assert f"warning: gguf in {run.path} may hold the adapter as it was before" in said


def test_what_a_failed_attempt_left_in_the_manifest_goes_when_the_run_goes_on(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_at(config, 3, monkeypatch)
    run.update_manifest(state="failed", error="it broke")
    start(config)
    assert "error" not in manifest(run)
    assert manifest(run)["state"] == "finished"
    assert manifest(run)["steps"] == 4


def test_what_is_refused_leaves_no_folder(config: Path) -> None:
    with pytest.raises(Exception, match=r"evaluation.split"):
        start(config, "evaluation.split=12")
    assert not (config.parent / "runs" / "c").exists()


@pytest.mark.fault("a second `ft train` in a run", "start", "refused in under 2 s, the process is named")
def test_a_run_in_use_is_refused_at_once_and_names_the_process(config: Path) -> None:
    run = RunFolder(config.parent / "runs" / "c")
    run.create()
    began = time.monotonic()
    with run.lock(), pytest.raises(StorageError, match=f"in use by process {os.getpid()}"):
        start(config)
    assert time.monotonic() - began < 2
    assert not run.manifest.exists()


@pytest.mark.fault("kill -9", "any", "no lock stays behind")
def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    code = f"""
import os, signal
from pathlib import Path
from finetune.runs.folder import RunFolder
with RunFolder(Path({str(run.path)!r})).lock():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    with run.lock():
        assert (run.path / ".lock").read_text() == f"process {os.getpid()}"
