"""verification.json: which bytes a name in the run carries, which adapter they were made of, and what a proof found.

It lies beside what it speaks of, and may be a stranger's: nothing in it is believed but hashes that are compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.runs.folder import RunFolder
from finetune.runs.manifest import sha256


def recorded(run: RunFolder) -> dict[str, Any]:
    """Name in the run → what is known about it. A file that cannot be read says nothing, and is written anew."""
    try:
        known = json.loads(run.verification.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def hashes(path: Path) -> str | dict[str, str]:
    """The SHA-256 of a file, or of every file in a folder, by name."""
    if path.is_file():
        return sha256(path)
    return {file.name: sha256(file) for file in sorted(path.iterdir()) if file.is_file()}


def of_another_adapter(run: RunFolder, paths: Sequence[Path]) -> set[Path]:
    """Those that were made, as their record says, of another adapter than the run has now: it was trained on since.

    The adapter is read once, and only where there is something to compare it with.
    """
    known = recorded(run)
    entries = {path: known.get(path.relative_to(run.path).as_posix()) for path in paths}
    made_of = {path: entry.get("adapter") for path, entry in entries.items() if isinstance(entry, dict)}
    made_of = {path: adapter for path, adapter in made_of.items() if isinstance(adapter, dict)}
    if not made_of or not run.adapter.is_dir():
        return set()
    now = hashes(run.adapter)
    return {path for path, adapter in made_of.items() if adapter != now}
