"""The files that a local data path names: one file, all that lie in a folder, or what a pattern matches.

Here, on the lowest floor that knows about data, because the loader checks them, a run's manifest hashes them and
`data/read` reads them: all three must mean the same files, in the same order.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune.config.schema import DATA_SUFFIXES, PACKED_SUFFIXES, data_kind
from finetune.errors import DataError

KNOWN_ENDINGS = f"known endings: {', '.join(DATA_SUFFIXES)} (also packed: {', '.join(PACKED_SUFFIXES)})"

_WILDCARD = re.compile(r"[*?[]")

_SAVED_BESIDE = {"dataset_info.json", "dataset_dict.json", "state.json"}
"""What `save_to_disk` of `datasets` writes beside the rows; state.json even looks like a list of rows."""


def has_wildcards(path: str) -> bool:
    """Whether a path can be a pattern, which no Hub id can."""
    return _WILDCARD.search(path) is not None


def is_pattern(path: str) -> bool:
    """Whether a path stands for what it matches. A file or folder that is really called so wins."""
    return has_wildcards(path) and not os.path.lexists(path)


def source_files(path: str, shown: str | None = None) -> list[Path]:
    """The files that a local path names, sorted. Raises DataError for a folder or a pattern without any.

    A path that is neither is one file, whether it exists or not: whoever opens it says what is wrong with it.
    `shown` is how the path is called in the error.
    """
    folder = os.path.isdir(path)
    if not folder and not is_pattern(path):
        return [Path(path)]
    found = list(_below(path)) if folder else sorted(file for file in _matches(path) if os.path.isfile(file))
    known = [file for file in found if data_kind(file.name) is not None and not _is_saved_beside(file)]
    kept = list(_inside(known, path if folder else _fixed_part(path)))
    if kept:
        return kept
    if known:
        hint = "links that lead out of the folder are not followed: name the files that they lead to"
    elif not folder and not found:
        raise DataError(
            "no file matches this pattern",
            place=shown or path,
            hint="`*` stands for a part of a name, `**` for any folders; hidden files are left out",
        )
    else:
        hint = KNOWN_ENDINGS
    raise DataError(
        "no data file is in this folder" if folder else "no data file matches", place=shown or path, hint=hint
    )


def _below(folder: str) -> Iterator[Path]:
    """Every file under a folder, hidden ones left out, in the order of their paths."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return iter(sorted(file for file in found if os.path.isfile(file)))


def _matches(pattern: str) -> list[Path]:
    try:
        return [Path(name) for name in glob.iglob(pattern, recursive=True)]
    except ValueError:  # a null character, which no name can have
        return []


def _fixed_part(pattern: str) -> str:
    """The folder that all matches of a pattern lie in: its parts before the first that holds a wildcard."""
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if has_wildcards(part))
    return str(Path(*parts[:first]))


def _inside(files: Iterable[Path], folder: str) -> Iterator[Path]:
    """Less what is a link to somewhere else, and each file once, however many links lead to it."""
    root = os.path.realpath(folder)
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real not in seen and os.path.commonpath([root, real]) == root:
            seen.add(real)
            yield file


def _is_saved_beside(file: Path) -> bool:
    """Whether a file is what `datasets` notes about the rows that it saved in the same folder."""
    return file.name in _SAVED_BESIDE and any(
        (file.parent / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")
    )
