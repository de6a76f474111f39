"""Checkpoints: whole or not there, checked before they are used, kept by step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import StorageError
from finetune.train.checkpoints import (
    NEEDED,
    SEAL,
    clear_leftovers,
    damage,
    newest_whole,
    rotate,
    step_of,
    write,
)

FILES = (*sorted(NEEDED), "scaler.pt", SEAL)


def fill(folder: Path) -> None:
    for name in FILES:
        if name != SEAL:
            (folder / name).write_bytes(f"{folder.name} {name} ".encode() * 40)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(b"")


def zero_fill(path: Path) -> None:
    """What a power cut leaves on some file systems: the right length, and nothing in it."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.fault("deleted, emptied, truncated, flipped or zero-filled file", "resume", "the older checkpoint is used")
@pytest.mark.parametrize("harm", [Path.unlink, zero, truncate, flip, zero_fill], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_and_the_older_checkpoint_used(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    older, newer = write(tmp_path, 2, fill), write(tmp_path, 4, fill)
    assert newest_whole(tmp_path) == (newer, [])
    harm(newer / name)
    found, faults = newest_whole(tmp_path)
    assert found == older
    assert len(faults) == 1
    assert str(newer) in faults[0]
    if name != SEAL or harm is Path.unlink:
        assert name in faults[0]
    else:
        assert any(known in faults[0] for known in FILES)


def test_a_file_that_nobody_wrote_makes_a_checkpoint_not_whole(tmp_path: Path) -> None:
    """The library would load a `model.safetensors` in place of the adapter."""
    checkpoint = write(tmp_path, 2, fill)
    (checkpoint / "model.safetensors").write_bytes(b"x")
    assert damage(checkpoint) == "model.safetensors is not part of it"
    names = json.loads((checkpoint / SEAL).read_text())
    (checkpoint / SEAL).write_text(json.dumps(names | {"model.safetensors": {"bytes": 1, "sha256": "x"}}))
    assert damage(checkpoint) == f"{SEAL} cannot be read"


def test_a_link_to_a_file_elsewhere_is_not_the_file(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "run", 2, fill)
    (checkpoint / "optimizer.pt").rename(tmp_path / "optimizer.pt")
    (checkpoint / "optimizer.pt").symlink_to(tmp_path / "optimizer.pt")
    assert damage(checkpoint) == "optimizer.pt is missing"


def test_what_cannot_be_written_leaves_the_ones_before_and_nothing_half(tmp_path: Path) -> None:
    before = write(tmp_path, 2, fill)

    def full(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder / "optimizer.pt"))

    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path, 4, full)
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    assert newest_whole(tmp_path) == (before, [])


def test_the_newest_are_kept_by_step_whatever_the_dates_say(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        checkpoint = write(tmp_path, step, fill)
        backwards = time.time() - step * 24 * 3600
        os.utime(checkpoint, (backwards, backwards))
    rotate(tmp_path, 8, keep=2, best=None)
    assert sorted(step_of(path) for path in tmp_path.iterdir()) == [6, 8]


def test_the_best_is_kept_besides(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step, fill)
    rotate(tmp_path, 8, keep=2, best=2)
    assert sorted(step_of(path) for path in tmp_path.iterdir()) == [2, 6, 8]


def test_only_whole_ones_count_as_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step, fill)
    truncate(tmp_path / "checkpoint-6" / "optimizer.pt")
    rotate(tmp_path, 8, keep=2, best=None)
    assert sorted(step_of(path) for path in tmp_path.iterdir()) == [4, 8]


def test_later_steps_are_of_a_past_that_was_taken_back(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step, fill)
    flip(tmp_path / "checkpoint-6" / "optimizer.pt")
    write(tmp_path, 5, fill)
    rotate(tmp_path, 5, keep=2, best=6)
    assert sorted(step_of(path) for path in tmp_path.iterdir()) == [4, 5]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 2, fill)
    (tmp_path / "checkpoint-4.partial").mkdir()
    fill(tmp_path / "checkpoint-4.partial")
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [checkpoint]
