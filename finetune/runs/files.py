"""Writing files so that what carries its final name is whole: a `.partial` sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.console import finite
from finetune.errors import StorageError


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Translate what the operating system says about `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some disk space and run the same command again",
            errno.EDQUOT: "your disk quota is used up: free some space and run the same command again",
            errno.EACCES: "check who owns this folder, or name another one with --runs",
            errno.EPERM: "check who owns this folder, or name another one with --runs",
            errno.EROFS: "this disk is read-only: name another folder with --runs",
            errno.ENOTDIR: "a file is where a folder should be: move it away",
            errno.EEXIST: "a file is where a folder should be: move it away",
        }
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot be written: {reason}",
            place=str(error.filename or path),
            hint=hints.get(error.errno or 0, "check the path and the disk, and run the same command again"),
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a whole text file (UTF-8, `\\n` line ends) or leave the old one in place."""
    with storage_errors(path):
        partial = path.with_name(path.name + ".partial")
        # A name that the file system holds in another encoding is written as an escape.
        with open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file that a person can read. A number that is none is written as null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system lets one sync a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
