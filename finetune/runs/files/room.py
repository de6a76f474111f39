"""What the operating system says when a disk, a quota or a limit is full, or a folder is somebody else's.

It becomes a StorageError that says how much there is, how much was wanted, and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from finetune.console import size
from finetune.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write says that would have gone well with more room: the disk, the quota, the largest file."""

_HINTS = {
    errno.ENOSPC: "free some disk space and run the same command again",
    errno.EDQUOT: "your disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "raise the limit (`ulimit -f unlimited`), or use a disk that takes larger files",
    errno.EACCES: "check who owns this folder, or name another one with --runs",
    errno.EPERM: "check who owns this folder, or name another one with --runs",
    errno.EROFS: "this disk is read-only: name another folder with --runs",
    errno.ENOTDIR: "a file is where a folder should be: move it away",
    errno.EEXIST: "a file is where a folder should be: move it away",
}


@contextlib.contextmanager
def storage_errors(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Translate what the operating system says about `path` into a StorageError that says what to do.

    needed  bytes that everything written inside takes, for the message of a full disk

    tokenizers and safetensors are written in Rust and raise exceptions of their own, which end in `(os error 28)`.
    `torch.save` raises a RuntimeError that says no more than where in its code it happened.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _hidden_errno(error)
        if number is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number is not None else str(error)
        place = error.filename if isinstance(error, OSError) and error.filename else path
        raise StorageError(
            f"cannot be written: {reason}{_room(number, path, needed)}",
            place=os.fsdecode(place) if isinstance(place, bytes) else str(place),
            hint=_HINTS.get(number or 0, "check the path and the disk, and run the same command again"),
        ) from error


def require_space(folder: Path, needed: int, what: str, *, largest: int = 0) -> None:
    """Raise StorageError unless `folder`, which need not exist yet, has room for `needed` bytes.

    what     names what is about to be written: "the merged model"
    largest  bytes of its largest file; 0 if no limit on files can matter
    """
    with storage_errors(folder):
        free = _free(folder)
    if free < needed:
        raise StorageError(
            f"there is not enough room for {what}: {size(needed)} needed, {size(free)} free",
            place=str(folder),
            hint="free some disk space, or use a folder on another disk",
        )
    limit = _largest_file()
    if limit is not None and limit < largest:
        raise StorageError(
            f"a file of {what} has {size(largest)}, and this process may write files of {size(limit)} at most",
            place=str(folder),
            hint="raise the limit: `ulimit -f unlimited`",
        )


@contextlib.contextmanager
def temporary_storage() -> Iterator[None]:
    """Raise StorageError where the system refuses a temporary file or folder."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"no temporary file can be made: {error.strerror}",
            hint="make room there, lift the limit (`ulimit -f unlimited`), or set TMPDIR to another folder",
        ) from error


def _hidden_errno(error: Exception) -> int | None:
    """The errno in what Rust's standard library says about a failed call; of torch's, the likely one."""
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):
        return errno.ENOSPC if _largest_file() is None else errno.EFBIG
    return None


def _room(number: int | None, path: Path, needed: int | None) -> str:
    """What there is where it was not enough, in brackets."""
    if number == errno.EFBIG:
        limit = _largest_file()
        # Without a limit of the process it is the file system's: FAT32 ends at 4 GiB.
        return f" (files may have {size(limit)} at most)" if limit is not None else ""
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    try:
        free = f"{size(_free(path))} free"
        if _no_more_files(path):
            free += ", and no more files fit on this disk"
    except OSError:
        return ""
    return f" ({free}{f'; {size(needed)} needed in all' if needed else ''})"


def _existing(path: Path) -> Path:
    """The folder that is there of those that would hold `path`."""
    folder = path.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _free(path: Path) -> int:
    """Bytes that this user can still write on the disk that `path` is, or will be, on."""
    return shutil.disk_usage(_existing(path)).free


def _no_more_files(path: Path) -> bool:
    if sys.platform == "win32":
        return False
    found = os.statvfs(_existing(path))
    return found.f_files > 0 and found.f_favail == 0


def _largest_file() -> int | None:
    """Bytes of the largest file that this process may write; None without a limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
