"""Checkpoints to go on from: written whole or not at all, checked before they are used, kept by step and not by date.

A checkpoint is a folder `checkpoint-<step>`. It is written as `checkpoint-<step>.partial`, sealed with the size and the
hash of each of its files, synced, and renamed: what carries the name is whole, unless the disk damages it later, which
the seal tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import StorageError
from finetune.runs.files import discard, partial_of, replace_folder, storage_errors, write_json

SEAL = "whole.json"
"""Written last into a checkpoint: the size and SHA-256 of each of its files. Without it, a checkpoint is not whole."""

NEEDED = frozenset(
    {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "fingerprint.json",
    }
)
"""What going on needs; without any one of them the library would go on all the same, to another result."""

KNOWN = NEEDED | {"scaler.pt"}
"""What a checkpoint may hold. The library loads some other names in place of these, which nobody here has written."""

_NAME = re.compile(r"checkpoint-(\d+)")


def write(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Write the checkpoint of a step: `fill` puts its files into a folder that then gets its name.

    Raises StorageError; the checkpoints before it are as they were.
    """
    final = folder / f"checkpoint-{step}"
    partial = partial_of(final)
    try:
        with storage_errors(partial):
            discard(partial)
            partial.mkdir(parents=True)
            fill(partial)
            seal(partial)
            replace_folder(partial, final)
    except StorageError:
        with contextlib.suppress(StorageError):
            discard(partial)  # on a full disk, its bytes are what somebody needs now
        raise
    return final


def rotate(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Remove what the checkpoint of `step`, which was just written, makes superfluous.

    Kept are the `keep` newest that are whole, by step, and the `best`. Those of later steps are of a past that was
    taken back, by going on from an older one. Dates play no part: clocks are set back, and files copied.
    """
    found = _found(folder)
    kept = [number for number in sorted(found, reverse=True) if number <= step and _looks_whole(found[number])][:keep]
    for number, path in found.items():
        if number not in kept and (number != best or number > step):
            with storage_errors(path):
                # Renamed first: a removal that is cut off must not leave what looks like a damaged checkpoint.
                gone = partial_of(path)
                discard(gone)
                path.rename(gone)
                discard(gone)


def clear_leftovers(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for partial in folder.glob("checkpoint-*.partial"):
        discard(partial)


def seal(checkpoint: Path) -> None:
    """Record every file of a checkpoint that has just been written."""
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    write_json(checkpoint / SEAL, files)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is as it was written, and a sentence on each newer one that is not."""
    faults: list[str] = []
    for _, path in sorted(_found(folder).items(), reverse=True):
        fault = damage(path)
        if fault is None:
            return path, faults
        faults.append(f"{path} is passed over: {fault}")
    return None, faults


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = _sealed(checkpoint)
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file() or path.is_symlink():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
                return f"{name} is not what was written"
        strange = sorted(path.name for path in checkpoint.iterdir() if path.name not in {*files, SEAL})
        if strange:
            return f"{strange[0]} is not part of it"
    except FileNotFoundError:
        return f"it was not written to the end ({SEAL} is missing)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{SEAL} cannot be read"
    return None


def size_on_disk(folder: Path) -> int:
    """Bytes of all checkpoints."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _found(folder: Path) -> dict[int, Path]:
    """Step → checkpoint."""
    return {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}


def _looks_whole(checkpoint: Path) -> bool:
    """Whether the files are there, with the right sizes: what can be seen without reading them all."""
    try:
        files = _sealed(checkpoint)
        return all((checkpoint / name).stat().st_size == expected["bytes"] for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _sealed(checkpoint: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((checkpoint / SEAL).read_text("utf-8"))
    if not NEEDED <= files.keys() <= KNOWN:
        raise ValueError("not the files of a checkpoint")
    return files


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
