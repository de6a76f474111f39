"""Writing so that what carries its final name is whole: a `.partial` sibling, fsync, rename.

A name that ends in `.partial` belongs to an attempt that did not end; whoever makes the same thing again removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.console import finite
from finetune.errors import ExportError
from finetune.runs.files.room import storage_errors

# -- small files --------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8, `\\n` line ends) or leave the old one in place."""
    partial = partial_of(path)
    try:
        with storage_errors(path):
            # A name that the file system holds in another encoding is written as an escape.
            with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
    except BaseException:
        _clear_away(partial)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file that a person can read. A number that is none is written as null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file byte by byte and sync the copy. Times and permissions are not carried over."""
    with storage_errors(target):
        shutil.copyfile(source, target)
        sync(target)


# -- large files and folders --------------------------------------------------------------------------------------


@contextlib.contextmanager
def partial_folder(final: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Yield an empty folder that takes the name `final` when the block ends well, and is removed when it does not.

    Every file in it must have been synced by whoever wrote it. `needed` is for the message of a full disk, in bytes.
    Raises ExportError if `final` exists already.
    """
    with partial_file(final, needed=needed) as partial:
        partial.mkdir()
        yield partial


@contextlib.contextmanager
def partial_file(final: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Yield a path to write to; the file takes the name `final` when the block ends well. Otherwise as above."""
    refuse_existing(final)
    partial = partial_of(final)
    discard(partial)
    try:
        with storage_errors(partial, needed=needed):
            partial.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync(partial)
            promote(partial, final)
    except BaseException:
        _clear_away(partial)
        raise


def partial_of(final: Path) -> Path:
    """What `final` is called until it is whole and, where that is asked for, proven."""
    return final.with_name(final.name + ".partial")


def promote(partial: Path, final: Path) -> None:
    """Give a whole file or folder its final name. Raises ExportError if something has it already."""
    with storage_errors(partial):
        refuse_existing(final)
        partial.rename(final)
        sync_folder(final.parent)


def replace_folder(partial: Path, final: Path) -> None:
    """Give a whole folder its final name, in place of a folder that has it.

    Everything below `partial` is synced first. A folder cannot be renamed onto another: for a moment, the old one is
    called `NAME.old.partial` and nothing has the name. Whoever is killed then makes the new one again, and the next
    call removes what was left.
    """
    with storage_errors(partial):
        for folder, _, names in os.walk(partial):
            for name in names:
                sync(Path(folder, name))
            sync_folder(Path(folder))
        old = partial_of(final.with_name(final.name + ".old"))
        _remove(old)
        if os.path.lexists(final):
            final.rename(old)
        partial.rename(final)
        sync_folder(final.parent)
        _remove(old)


def refuse_existing(final: Path) -> None:
    """Raise ExportError if something carries the name already."""
    if os.path.lexists(final):
        raise ExportError("this exists already", place=str(final), hint="remove it, or choose another name")


def discard(path: Path) -> None:
    """Remove a file or folder that an earlier attempt left, if there is one."""
    with storage_errors(path):
        _remove(path)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, outlast a power cut."""
    if path.is_dir():
        sync_folder(path)
        return
    # Windows syncs only what is open for writing; elsewhere a file may be one that is not to be written any more.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system lets one sync a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _clear_away(path: Path) -> None:
    """Remove what failed; the failure is what is said, not that a disk which has become read-only keeps its remains."""
    with contextlib.suppress(OSError):
        _remove(path)
