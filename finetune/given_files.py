"""What lies where somebody says that a file is: before it is opened, and by its first bytes.

Opening a pipe waits for whoever writes into it, and a device may never end. Nothing here reads more than it must.
"""

from __future__ import annotations

import stat
from pathlib import Path

LFS_HINT = "`git lfs pull` in its folder fetches the file itself; or download it again"

LFS_MESSAGE = "is a Git LFS pointer: the note that stands for a file which was not fetched"

_LFS = b"version https://git-lfs.github.com/spec/"
"""How a pointer begins (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def not_a_file(path: Path) -> str | None:
    """What is there instead of a file, links followed: `a pipe`, `a link that leads nowhere`, …

    None for a file, and where there is nothing at all or nothing that can be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "a link that leads nowhere" if _is_link(path) else None
    return next((name for fits, name in _KINDS if fits(mode)), None)


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file of these first bytes (40 at least) is what Git leaves where Git LFS is not installed."""
    return beginning.startswith(_LFS)


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False
