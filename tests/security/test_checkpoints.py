"""A checkpoint of somebody else's: hostile files, under a seal that was made to match them."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest

from finetune.train.checkpoints import seal

from .conftest import World


def unfinished(world: World) -> Path:
    """Make the run one that was interrupted after its first step. Returns that step's checkpoint."""
    shutil.rmtree(world.run / "adapter")
    shutil.rmtree(world.run / "checkpoints" / "checkpoint-2")
    world.merge_json("runs/c/manifest.json", state="interrupted")
    return world.run / "checkpoints" / "checkpoint-1"


def as_torch_writes_it(pickled: bytes) -> bytes:
    """The zip file that torch.save makes, with a pickle of ours in it."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    return sink.getvalue()


def test_an_untouched_checkpoint_is_gone_on_from(finished: World) -> None:
    """What the other tests rely on: resealed, a good checkpoint is one."""
    seal(unfinished(finished))
    outcome = finished.ft("train", "c.yaml")
    assert outcome.code == 0, outcome.said
    assert "going on" in outcome.said


@pytest.mark.parametrize("form", ["bare", "zip"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickles_under_a_good_seal(finished: World, name: str, form: str) -> None:
    checkpoint = unfinished(finished)
    evil = finished.evil_pickle()
    (checkpoint / name).write_bytes(evil if form == "bare" else as_torch_writes_it(evil))
    seal(checkpoint)
    finished.refused("train", "c.yaml")


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin",
        "pytorch_model.bin",
        "adapter_model.bin",
        "scaler.pt",
        "optimizer.bin",
        "a/adapter_model.bin",
    ],
)
def test_pickles_that_no_checkpoint_has(finished: World, name: str) -> None:
    checkpoint = unfinished(finished)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(finished.evil_pickle())
    (checkpoint / name).with_name("adapter_config.json").write_text('{"peft_type": "LORA", "auto_mapping": {}}')
    seal(checkpoint)
    finished.ft("train", "c.yaml")


@pytest.mark.parametrize("name", ["../../../../rows.jsonl", "/etc/passwd", "a/../../b"])
def test_a_seal_that_names_files_elsewhere(finished: World, name: str) -> None:
    checkpoint = unfinished(finished)
    seal(checkpoint)
    finished.merge_json("runs/c/checkpoints/checkpoint-1/whole.json", **{name: {"bytes": 1, "sha256": "0" * 64}})
    outcome = finished.ft("train", "c.yaml")
    assert "going on" not in outcome.said


def test_a_state_that_names_callbacks(finished: World) -> None:
    checkpoint = unfinished(finished)
    (finished.folder / "evil_module.py").write_text(finished.evil_code())
    path = "runs/c/checkpoints/checkpoint-1/trainer_state.json"
    finished.merge_json(path, stateful_callbacks={"evil_module.Evil": {"args": {}, "attributes": {}}})
    seal(checkpoint)
    finished.ft("train", "c.yaml")
