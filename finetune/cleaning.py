"""What a run no longer needs, and the plain text of its data: `ft clean`.

The text of the data gets into four places below the folder of the runs: the prepared data (tokens, and the held-out
conversations as they are), the answers in evaluation.json, what the libraries say (log.txt, a tracker's folder), and
the words of an error or of a dropped row in manifest.json. After `ft clean` it is in none of them. What was made of it
stays: the adapter and what was exported. (A model can say what it was trained on; no cleaning changes that.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.console import Console, size
from finetune.data.cache import is_being_written
from finetune.errors import FinetuneError, RunError
from finetune.pipeline import CACHE
from finetune.runs.files import discard, storage_errors, sync_folder, write_json
from finetune.runs.folder import RunFolder, list_runs

_WITH_TEXT = ("log.txt", "wandb")
"""What is removed whole: any line of it may have been said about a row. The numbers are in metrics.jsonl as well."""

_KINDS_OF_TEXT = ("dropped", "first_dropped")
"""Parts of the manifest's accounting whose keys say what was wrong with a row, in its own words."""

_WHOLE_RUN = (
    "config.yaml",
    "resolved.yaml",
    "metrics.jsonl",
    "evaluation.json",
    "verification.json",
    "adapter",
    "merged",
    "gguf",
)
"""What `--all` removes besides. The manifest and the lock go last."""


@dataclass(frozen=True)
class Removed:
    """What `ft clean` took away."""

    what: tuple[str, ...]
    nbytes: int
    """Bytes of disk space that are free again, as the files' sizes say."""
    left: tuple[str, ...] = ()
    """With `--all`: what lies in the run's folder and is not of the run."""


def clean(run: RunFolder, console: Console, *, everything: bool) -> Removed:
    """`ft clean`: checkpoints, leftovers and the text of the data, or (`everything`) the whole run.

    Raises StorageError for a run that another process works on, RunError for one whose checkpoints are still needed.
    """
    run = RunFolder(Path(os.path.abspath(run.path)))  # `.` has no parent to look for the prepared data in
    with run.lock():
        _require_run(run, everything=everything)
        removed = _clean(run, everything=everything)
    console.event("cleaned", run=str(run.path), removed=removed.what, bytes=removed.nbytes, left=removed.left)
    if not console.json_events:
        for name in removed.what:
            console.say(f"removed {name}")
        console.say(f"{size(removed.nbytes)} are free again" if removed.what else "there was nothing to remove")
        if removed.left:
            console.say(f"left in {run.path}, because it is not of the run: {', '.join(removed.left)}")
    return removed


def _require_run(run: RunFolder, *, everything: bool) -> None:
    """Only what `ft train` made is cleaned, and what it can go on with only when that is asked for."""
    manifest = run.read_manifest()
    if not isinstance(manifest.get("format"), int) or not isinstance(manifest.get("state"), str):
        raise RunError(
            "this manifest.json was not written by ft train", place=str(run.path), hint="`ft runs` lists the runs"
        )
    if manifest["state"] != "finished" and not everything:
        config = manifest.get("config_path", "CONFIG")
        raise RunError(
            "this run is not finished, and goes on from its checkpoints",
            place=str(run.path),
            hint=f"`ft train {config}` finishes it; --all gives it up and removes all of it",
        )


def _clean(run: RunFolder, *, everything: bool) -> Removed:
    within = run.path / CACHE  # where earlier versions put it when the run was given as `.`
    paths = [run.checkpoints, *_leftovers(run), *(run.path / name for name in _WITH_TEXT), *_prepared(run), within]
    if everything:
        paths += [run.path / name for name in _WHOLE_RUN]
    what: list[str] = []
    nbytes = 0
    for path in paths:
        if os.path.lexists(path):
            nbytes += _bytes_of(path)
            discard(path)
            what.append(_shown(path))
    if everything:
        return _remove_folder(run, what, nbytes)
    for part, of, cleaned in ((run.evaluation, "the answers in", _scores), (run.manifest, "words of", _facts)):
        nbytes_saved = _rewrite(part, cleaned)
        if nbytes_saved is not None:
            what.append(f"{of} {_shown(part)}")
            nbytes += nbytes_saved
    return Removed(tuple(what), nbytes)


def _leftovers(run: RunFolder) -> Iterator[Path]:
    """What an interrupted command left under a name that only unfinished things have."""
    for folder in (run.path, run.gguf):
        if folder.is_dir() and not folder.is_symlink():
            yield from sorted(folder.glob("*.partial"))


def _prepared(run: RunFolder) -> Iterator[Path]:
    """The prepared data of this run, and what no other run says is its own.

    That is more than one entry where the data was looked at with other settings (`ft data`): the text is the same. What
    goes in vain is made again by whoever needs it. An unfinished entry is left to the process that writes it.
    """
    cache = run.path.parent / CACHE
    with storage_errors(cache):
        entries = sorted(cache.iterdir()) if cache.is_dir() else []
    own = run.read_manifest().get("prepared")
    others = {_prepared_key(other) for other in list_runs(run.path.parent) if other.path != run.path} - {own}
    for entry in entries:
        unfinished = entry.name.endswith(".partial") and is_being_written(entry)
        if entry.is_dir() and entry.name not in others and not unfinished:
            yield entry


def _prepared_key(run: RunFolder) -> str | None:
    try:
        key = run.read_manifest().get("prepared")
    except FinetuneError:
        return None
    return key if isinstance(key, str) else None


def _rewrite(path: Path, cleaned: Any) -> int | None:
    """Write a JSON file anew without its texts. The bytes saved, or None where there was nothing to take out."""
    if not os.path.lexists(path):
        return None
    nbytes = _bytes_of(path)
    try:
        before = json.loads(path.read_text("utf-8"))
        after = cleaned(before)
    except (OSError, ValueError, RecursionError):
        before, after = "", None  # what cannot be read may be anything
    if after == before:
        return None
    if after is None:
        discard(path)
        return nbytes
    write_json(path, after)
    return nbytes - _bytes_of(path)


def _scores(evaluation: Any) -> Any:
    """evaluation.json without the prompts, the references and the answers; None where it is not what we wrote."""
    return {**evaluation, "samples": []} if isinstance(evaluation, dict) else None


def _facts(manifest: Any) -> Any:
    """manifest.json without the words of errors and of dropped rows; how many rows were dropped stays."""
    facts = {name: value for name, value in manifest.items() if name != "error"}
    accounting = facts.get("accounting")
    if isinstance(accounting, dict) and accounting.get("dropped"):
        dropped = accounting["dropped"]
        counts = [count for count in dropped.values() if isinstance(count, int)] if isinstance(dropped, dict) else []
        kept = {name: value for name, value in accounting.items() if name not in _KINDS_OF_TEXT}
        facts["accounting"] = kept | {"dropped": {"removed by ft clean": sum(counts)}}
    return facts


def _remove_folder(run: RunFolder, what: list[str], nbytes: int) -> Removed:
    """The manifest, the lock and the folder, unless something lies in it that is not of the run."""
    own = {run.manifest.name, ".lock"}
    with storage_errors(run.path):
        left = sorted(entry.name for entry in run.path.iterdir() if entry.name not in own)
        nbytes += _bytes_of(run.manifest)
        discard(run.manifest)
        discard(run.path / ".lock")
        if not left:
            run.path.resolve().rmdir()
            if run.path.is_symlink():
                run.path.unlink()
            sync_folder(run.path.parent)
    return Removed((*what, _shown(run.manifest if left else run.path)), nbytes, tuple(left))


def _shown(path: Path) -> str:
    """As a person would write it: from the current folder, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _bytes_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder. A link counts for itself: what it leads to is not removed."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)
