"""The system calls that change what is on a disk (numbers of Linux on x86-64), and what one that waits is about."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_PIDFD_GETFD = 438


@dataclass(frozen=True)
class Call:
    """How to read one system call. The numbers are places among its arguments."""

    kind: str
    fd: int | None = None
    """The file that it is about, or the folder that `path` is relative to; None: the current folder."""
    path: int | None = None
    to: tuple[int | None, int] | None = None
    """For those with two names: folder and path of the second."""
    size: int | None = None
    bits: tuple[int, int] | None = None
    """An argument and the bits of which at least one must be set in it for the call to be an event."""


_CREATES = os.O_CREAT | os.O_TRUNC

CALLS = {
    1: Call("write", fd=0, size=2),
    18: Call("pwrite", fd=0, size=2),
    20: Call("writev", fd=0, size=2),
    296: Call("pwritev", fd=0, size=2),
    328: Call("pwritev", fd=0, size=2),
    40: Call("sendfile", fd=0, size=3),
    326: Call("copy_file_range", fd=2, size=4),
    2: Call("open", path=0, bits=(1, _CREATES)),
    257: Call("open", fd=0, path=1, bits=(2, _CREATES)),
    85: Call("open", path=0),
    76: Call("truncate", path=0),
    77: Call("truncate", fd=0),
    285: Call("allocate", fd=0),
    74: Call("fsync", fd=0),
    75: Call("fsync", fd=0),
    82: Call("rename", path=0, to=(None, 1)),
    264: Call("rename", fd=0, path=1, to=(2, 3)),
    316: Call("rename", fd=0, path=1, to=(2, 3)),
    87: Call("unlink", path=0),
    263: Call("unlink", fd=0, path=1),
    84: Call("unlink", path=0),
    83: Call("mkdir", path=0),
    258: Call("mkdir", fd=0, path=1),
    86: Call("link", path=0, to=(None, 1)),
    265: Call("link", fd=0, path=1, to=(2, 3)),
    88: Call("symlink", path=1),
    266: Call("symlink", fd=1, path=2),
    # Not counted, only looked at: what is written through shared memory would escape us.
    9: Call("map", fd=4, bits=(3, mmap.MAP_SHARED)),
}
"""x86-64's number of each system call that changes what is on a disk → how to read it."""


@dataclass(frozen=True)
class Waiting:
    """A system call that waits for our answer."""

    id: int
    """The kernel's name for it."""
    thread: int
    call: Call
    arguments: tuple[int, ...]

    def path(self) -> str:
        """What it is about, absolute."""
        if self.call.path is None:
            assert self.call.fd is not None
            return self._link(f"fd/{self._descriptor(self.call.fd)}")
        return self._name(self.call.fd, self.call.path)

    def target(self) -> str | None:
        """The second name, of those that have one."""
        return None if self.call.to is None else self._name(*self.call.to)

    def size(self) -> int:
        """How many bytes it would write; 0 for what writes none."""
        if self.call.size is None:
            return 0
        if self.call.kind in ("writev", "pwritev"):
            return sum(length for _, length in self._vector())
        count = self.arguments[self.call.size]
        if self.call.kind in ("sendfile", "copy_file_range"):  # asked for far more than the source has
            with self._opened() as pidfd, self._source(pidfd) as (source, at):
                return max(0, min(count, os.fstat(source).st_size - at))
        return count

    def maps_to_write(self) -> bool:
        """Whether a map may be written through."""
        return bool(self.arguments[2] & mmap.PROT_WRITE)

    def empties(self) -> bool:
        """Whether an `open` throws away what is in the file."""
        return self.call.bits is None or bool(self.arguments[self.call.bits[0]] & os.O_TRUNC)

    def write_some(self, count: int) -> None:
        """Write the first bytes of what it would have written, where it would have."""
        assert self.call.fd is not None
        kind, arguments = self.call.kind, self.arguments
        with self._opened() as pidfd, _taken(pidfd, self._descriptor(self.call.fd)) as target:
            if kind in ("sendfile", "copy_file_range"):
                with self._source(pidfd) as (source, at):
                    data = os.pread(source, count, at)
            elif kind in ("writev", "pwritev"):
                data = b"".join(self._memory(place, length) for place, length in self._vector())[:count]
            else:
                data = self._memory(arguments[1], count)
            placed = kind in ("pwrite", "pwritev")
            assert count == (os.pwrite(target, data, arguments[3]) if placed else os.write(target, data))

    @contextlib.contextmanager
    def _source(self, pidfd: int) -> Iterator[tuple[int, int]]:
        """The file that is copied from, and the position."""
        descriptor, position = (1, 2) if self.call.kind == "sendfile" else (0, 1)
        with _taken(pidfd, self._descriptor(descriptor)) as source:
            place = self.arguments[position]
            yield source, struct.unpack("q", self._memory(place, 8))[0] if place else os.lseek(source, 0, os.SEEK_CUR)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        pidfd = os.pidfd_open(process_of(self.thread))
        try:
            yield pidfd
        finally:
            os.close(pidfd)

    def _vector(self) -> list[tuple[int, int]]:
        data = self._memory(self.arguments[1], 16 * self.arguments[2])
        return [struct.unpack_from("QQ", data, 16 * index) for index in range(self.arguments[2])]

    def _name(self, folder: int | None, argument: int) -> str:
        name = self._text(self.arguments[argument])
        if name.startswith("/"):
            return os.path.normpath(name)
        descriptor = None if folder is None else self._descriptor(folder)
        here = "cwd" if descriptor is None or descriptor < 0 else f"fd/{descriptor}"
        return os.path.normpath(os.path.join(self._link(here), name))

    def _descriptor(self, argument: int) -> int:
        return struct.unpack("i", struct.pack("I", self.arguments[argument] & 0xFFFFFFFF))[0]  # type: ignore[no-any-return]

    def _link(self, name: str) -> str:
        try:
            return os.readlink(f"/proc/{self.thread}/{name}")
        except OSError:
            return ""  # no such descriptor, or the process is gone: the call itself will fail

    def _memory(self, place: int, count: int) -> bytes:
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            data = os.pread(memory.fileno(), count, place)
        assert len(data) == count
        return data

    def _text(self, place: int) -> str:
        """Text up to its zero byte. Read page by page: what lies beyond may not be mapped."""
        found = b""
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            while b"\0" not in found:
                at = place + len(found)
                found += os.pread(memory.fileno(), mmap.PAGESIZE - at % mmap.PAGESIZE, at)
        return os.fsdecode(found.partition(b"\0")[0])


def process_of(thread: int) -> int:
    """The process that a thread belongs to; 0 if it is gone."""
    try:
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Tgid:"))
    except (OSError, StopIteration):
        return 0


@contextlib.contextmanager
def _taken(pidfd: int, descriptor: int) -> Iterator[int]:
    """Another process's open file: the same position, the same flags."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: int = libc.syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    try:
        yield found
    finally:
        os.close(found)
