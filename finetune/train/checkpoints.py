"""Checkpoints to go on from: which of them are whole, and which is the newest whole one."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from finetune.runs.files import write_json

SEAL = "whole.json"
"""Written last into a checkpoint: the size and SHA-256 of each of its files. Without it, a checkpoint is not whole."""

_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint: Path) -> None:
    """Record every file of a checkpoint that has just been written."""
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    write_json(checkpoint / SEAL, files)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is as it was written, and a sentence on each newer one that is not."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    faults: list[str] = []
    for _, path in sorted(found, reverse=True):
        fault = damage(path)
        if fault is None:
            return path, faults
        faults.append(f"{path} is passed over: {fault}")
    return None, faults


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((checkpoint / SEAL).read_text("utf-8"))
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return "it was not written to the end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
