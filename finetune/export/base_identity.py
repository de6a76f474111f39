"""Is this the base that the adapter was trained on?

Shapes alone do not tell: an instruct model and its base, or two revisions of one, have the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ExportError, Problem, StorageError
from finetune.export.safetensors_io.header import MAX_HEADER_BYTES

IDENTIFYING = ("config.json", "model.safetensors.index.json", "model.safetensors")
"""What is hashed: the configuration, and the index of the weights or the head of their only file."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint(base: Path) -> dict[str, str]:
    """File name → sha256, of those files of IDENTIFYING that the folder has. No weights are read.

    Of `model.safetensors` only the head counts (names, dtypes, shapes, and the maker's notes), so this takes
    milliseconds and tells kinds and layouts apart, not values.
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
            Problem("is not the file that the adapter was trained on", str(base / name))
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
