"""Is this the base that the adapter was trained on?

Shapes alone do not tell: an instruct model and its base, or two revisions of one, have the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ExportError, Problem, StorageError
from finetune.export.safetensors_io.header import MAX_HEADER_BYTES

IDENTIFYING = ("config.json", "model.safetensors.index.json", "model.safetensors", "weights")
"""What is hashed: the configuration, the index of the weights or the head of their only file, and some of their values
(`weights`, which is no file)."""

BLOCKS, BLOCK_BYTES = 64, 4096
"""How much of each file of weights is looked at."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint(base: Path) -> dict[str, str]:
    """Name → sha256, of what the folder has of IDENTIFYING. Takes milliseconds, whatever the size.

    Of `model.safetensors` only the head counts (names, dtypes, shapes, and the maker's notes). `weights` is a sample of
    the values in all files: it tells two models apart that were trained differently, not an edit of a few tensors.
    """
    found = {}
    for name in IDENTIFYING:
        path = base / name
        try:
            if path.is_file():
                found[name] = hashlib.sha256(
                    _head(path) if path.suffix == ".safetensors" else path.read_bytes()
                ).hexdigest()
        except OSError as error:
            raise StorageError(f"cannot be read: {error.strerror}", place=str(path)) from error
    files = sorted(base.glob("*.safetensors"))
    if files:
        found["weights"] = _sample(files)
    return found


def check_base(recorded: Mapping[str, Any], base: Path) -> None:
    """Raise ExportError unless `base` can be what a run's manifest says that it was trained on.

    recorded  the manifest: `revision`, the commit that was trained on, and `base_files`, its `fingerprint`. What is
              missing is not compared: older manifests, and local folders, have no commit.
    """
    from finetune.base_files import resolved_revision  # which loads pydantic, a third of a second

    problems = []
    revision, here = recorded.get("revision"), resolved_revision(base)
    if isinstance(revision, str) and _COMMIT.fullmatch(revision) and here and here != revision:
        problems.append(Problem(f"is revision {here}, and the adapter was trained on {revision}", str(base)))
    files = recorded.get("base_files")
    if isinstance(files, Mapping):
        now = fingerprint(base)
        problems += [
            Problem("has other weights than the base that the adapter was trained on", str(base))
            if name == "weights"
            else Problem("is not the file that the adapter was trained on", str(base / name))
            for name, digest in files.items()
            if name in IDENTIFYING and now.get(name) != digest
        ]
    if problems:
        hint = "fetch the revision that the run's manifest names, or train again on this one"
        raise ExportError([Problem(problem.message, problem.place, hint) for problem in problems])


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.read(8)
        return size + file.read(min(int.from_bytes(size, "little"), MAX_HEADER_BYTES))


def _sample(files: Sequence[Path]) -> str:
    """A hash over the sizes of files and blocks evenly spread over each, the last one included."""
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                for number in range(BLOCKS):
                    file.seek(max(0, size - BLOCK_BYTES) * number // (BLOCKS - 1))
                    digest.update(file.read(BLOCK_BYTES))
        except OSError as error:
            raise StorageError(f"cannot be read: {error.strerror}", place=str(path)) from error
    return digest.hexdigest()
