"""A checkpoint of somebody else's: hostile files, under a seal that was made to match them."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import pytest

from finetune.train.checkpoints import SEAL, damage, seal

from .conftest import World

GO_ON = ("train", "c.yaml", "-s", "train.max_steps=2")


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
    outcome = finished.ft(*GO_ON)
    assert outcome.code == 0, outcome.said
    assert "going on" in outcome.said


@pytest.mark.parametrize("form", ["bare", "zip"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickles_under_a_good_seal(finished: World, name: str, form: str) -> None:
    checkpoint = unfinished(finished)
    evil = finished.evil_pickle()
    (checkpoint / name).write_bytes(evil if form == "bare" else as_torch_writes_it(evil))
    seal(checkpoint)
    finished.refused(*GO_ON)


STRAY = ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "a/adapter_model.bin")


def test_pickles_that_no_checkpoint_has(finished: World) -> None:
    """One is enough for a checkpoint to be none; with all of them, nothing looks into any."""
    checkpoint = unfinished(finished)
    seal(checkpoint)
    assert damage(checkpoint) is None
    for name in STRAY:
        other = checkpoint.with_name("other")
        shutil.copytree(checkpoint, other)
        (other / name).parent.mkdir(exist_ok=True)
        (other / name).write_bytes(finished.evil_pickle())
        seal(other)
        assert damage(other), name
        shutil.rmtree(other)
    (checkpoint / "a").mkdir()
    for name in STRAY:
        (checkpoint / name).write_bytes(finished.evil_pickle(f"canary-{name.replace('/', '-')}"))
        (checkpoint / name).with_name("adapter_config.json").write_text('{"peft_type": "LORA", "auto_mapping": {}}')
    seal(checkpoint)
    assert "going on" not in finished.ft(*GO_ON).said


def test_a_pickled_scaler(finished: World) -> None:
    """A checkpoint may have one, though this run makes none."""
    checkpoint = unfinished(finished)
    (checkpoint / "scaler.pt").write_bytes(finished.evil_pickle())
    seal(checkpoint)
    assert damage(checkpoint) is None
    finished.ft(*GO_ON)


def test_a_seal_that_names_files_elsewhere(finished: World) -> None:
    checkpoint = unfinished(finished)
    for name in ("/etc/passwd", "a/../../b", "../../../../rows.jsonl"):
        seal(checkpoint)
        assert damage(checkpoint) is None
        finished.merge_json(f"runs/c/checkpoints/checkpoint-1/{SEAL}", **{name: {"bytes": 1, "sha256": "0" * 64}})
        assert damage(checkpoint), name
    assert "going on" not in finished.ft(*GO_ON).said


def test_a_state_that_names_callbacks(finished: World) -> None:
    checkpoint = unfinished(finished)
    (finished.folder / "evil_module.py").write_text(finished.evil_code())
    path = "runs/c/checkpoints/checkpoint-1/trainer_state.json"
    finished.merge_json(path, stateful_callbacks={"evil_module.Evil": {"args": {}, "attributes": {}}})
    seal(checkpoint)
    finished.ft(*GO_ON)
