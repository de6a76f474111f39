"""What carries its final name is whole: files and folders are made as `NAME.partial`, then renamed.

An exception on the way removes the `.partial`; a killed process leaves it behind, and the next attempt clears it away.
An OSError inside becomes a StorageError that names the path.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import ExportError, StorageError


@contextlib.contextmanager
def partial_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `final` when the block ends well.

    Every file in it must have been synced by whoever wrote it. Raises ExportError if `final` exists already.
    """
    refuse_existing(final)
    partial = partial_of(final)
    with _storage_errors(partial):
        _remove(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            sync(partial)
            promote(partial, final)
        except BaseException:
            _remove(partial)
            raise


@contextlib.contextmanager
def partial_file(final: Path) -> Iterator[Path]:
    """Yield a path to write to; the file takes the name `final` when the block ends well. Otherwise as above."""
    refuse_existing(final)
    partial = partial_of(final)
    with _storage_errors(partial):
        _remove(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            promote(partial, final)
        except BaseException:
            _remove(partial)
            raise


def partial_of(final: Path) -> Path:
    """What `final` is called until it is whole and, where that is asked for, proven."""
    return final.with_name(final.name + ".partial")


def discard(path: Path) -> None:
    """Remove a file or folder that an earlier attempt left, if there is one."""
    with _storage_errors(path):
        _remove(path)


def promote(partial: Path, final: Path) -> None:
    """Give a whole file or folder its final name. Raises ExportError if something has it already."""
    with _storage_errors(partial):
        refuse_existing(final)
        partial.rename(final)
        sync(final.parent)


def refuse_existing(final: Path) -> None:
    """Raise ExportError if something carries the name already."""
    if os.path.lexists(final):
        raise ExportError("this exists already", place=str(final), hint="remove it, or choose another name")


def write_text(path: Path, text: str) -> None:
    """Write and sync a small file."""
    path.write_text(text, encoding="utf-8", newline="\n")
    sync(path)


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file byte by byte and sync the copy. Times and permissions are not carried over."""
    shutil.copyfile(source, target)
    sync(target)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, outlast a power cut."""
    if path.is_dir():
        # Windows cannot open a folder to sync it; renames are journalled there.
        with contextlib.suppress(PermissionError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def require_space(folder: Path, needed: int) -> None:
    """Raise StorageError unless the disk that `folder` is (or will be) on has `needed` bytes free."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{needed / 1e9:.1f} GB are needed here and {free / 1e9:.1f} GB are free",
            place=str(folder),
            hint="free some space, or write to another disk",
        )


@contextlib.contextmanager
def _storage_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(place)
        raise StorageError(error.strerror or str(error), place=where) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
