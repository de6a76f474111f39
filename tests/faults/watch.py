"""Watching one command: what it writes below a folder, and the fault that is to happen to it."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, field

from tests.faults import seccomp
from tests.faults.calls import Waiting, process_of

GROWS = ("open", "write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range", "allocate", "mkdir", "symlink")
"""What a full disk refuses. It still renames, syncs and removes."""

WRITES = ("write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range")
"""What writes bytes, and can be torn."""


@dataclass(frozen=True)
class Event:
    """Something that changes what is on the disk."""

    kind: str
    """`open` makes or empties a file, `append` opens one that is there; others as in `calls.CALLS`."""
    path: str
    """Relative to the watched folder."""
    to: str | None = None
    """The new name, of a rename."""
    size: int = 0
    """Bytes, of a write."""
    alters: bool = True
    """Whether it makes a difference to what is on the disk: a sync makes none, nor what was there, or gone, before."""

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" + (
            f" → {self.to}" if self.to else f" ({self.size} bytes)" if self.size else ""
        )


@dataclass(frozen=True)
class Kill:
    """A signal at an event (counted from 0), before it happens.

    torn   after half the bytes of a write
    power  everything that was not synced is lost too, as when the power fails: files are as long as they were at their
           last sync. (Renames are taken to have reached the disk, which is the worse case.)
    """

    at: int
    torn: bool = False
    power: bool = False
    signal: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class Fail:
    """An event fails with an errno; with `stays`, all that follow too (a full disk: those that need space)."""

    at: int
    errno: int
    stays: bool = False


@dataclass(frozen=True)
class Full:
    """A disk that takes this many more bytes. What is removed makes no room."""

    nbytes: int


Fault = Kill | Fail | Full


@dataclass
class Watch:
    """One command under the filter: counts its events and lets the fault happen."""

    listener: int
    process: int
    folder: str
    fault: Fault | None
    events: list[Event] = field(default_factory=list)
    written: int = 0
    threads: set[int] = field(default_factory=set)
    """Those of the command itself; its children's calls are none of ours."""
    unsynced: dict[str, int] = field(default_factory=dict)
    """Files that were changed since they were last synced, with their size then."""

    def answer(self) -> None:
        waiting = seccomp.receive(self.listener)
        if waiting is None:
            return
        event = self._event(waiting)
        if event is None:
            seccomp.let_happen(self.listener, waiting)
            return
        number = len(self.events)
        self.events.append(event)
        match self.fault:
            case Kill() as kill if kill.at == number:
                if kill.torn and event.kind in WRITES:
                    waiting.write_some(event.size // 2)
                os.kill(self.process, kill.signal)
                if kill.power:
                    self._lose()
                if kill.signal != signal.SIGKILL:
                    seccomp.let_happen(self.listener, waiting)
            case Fail() as fail if self._fails(fail, number, event):
                seccomp.refuse(self.listener, waiting, fail.errno)
            case Full(nbytes) if event.kind in WRITES and self.written + event.size > nbytes:
                self._overflow(waiting, nbytes)
            case _:
                self._note(event)
                self.written += event.size
                seccomp.let_happen(self.listener, waiting)

    def _fails(self, fail: Fail, number: int, event: Event) -> bool:
        if number == fail.at or not fail.stays:
            return number == fail.at
        return number > fail.at and (fail.errno != errno.ENOSPC or event.kind in GROWS)

    def _overflow(self, waiting: Waiting, nbytes: int) -> None:
        """As a full disk does: write what fits and say how much that was, the next time refuse."""
        fits = nbytes - self.written
        if fits:
            waiting.write_some(fits)
            self.written = nbytes
            seccomp.pretend(self.listener, waiting, fits)
        else:
            seccomp.refuse(self.listener, waiting, errno.ENOSPC)

    def _event(self, waiting: Waiting) -> Event | None:
        """What it is, if it is the command's own and below its folder."""
        if waiting.thread not in self.threads:
            if process_of(waiting.thread) != self.process:
                return None
            self.threads.add(waiting.thread)
        path, to = waiting.path(), waiting.target()
        if not any(name is not None and self._inside(name) for name in (path, to)):
            return None
        kind = waiting.call.kind
        if kind == "map":
            assert not waiting.maps_to_write(), f"{path} is written through shared memory, which cannot be counted"
            return None
        relative = None if to is None else os.path.relpath(to, self.folder)
        exists = os.path.lexists(path)
        if kind == "open" and exists and not waiting.empties():
            kind = "append"
        alters = kind not in ("fsync", "append") and not (kind == "mkdir" and exists)
        alters = alters and not (kind == "unlink" and not exists)
        return Event(kind, os.path.relpath(path, self.folder), relative, waiting.size(), alters)

    def _note(self, event: Event) -> None:
        """Keep account of what a power cut would take away."""
        path = os.path.join(self.folder, event.path)
        if event.kind == "fsync":
            self.unsynced.pop(path, None)
        elif event.kind == "open":
            self.unsynced[path] = 0
        elif event.kind in ("truncate", "allocate", *WRITES):
            self.unsynced.setdefault(path, os.path.getsize(path) if os.path.exists(path) else 0)
        elif event.kind == "rename" and event.to is not None:
            new = os.path.join(self.folder, event.to)
            moved = {name: size for name, size in self.unsynced.items() if name == path or name.startswith(path + "/")}
            for name, size in moved.items():
                del self.unsynced[name]
                self.unsynced[new + name[len(path) :]] = size

    def _lose(self) -> None:
        for path, size in self.unsynced.items():
            if os.path.exists(path):
                os.truncate(path, min(size, os.path.getsize(path)))

    def _inside(self, path: str) -> bool:
        return path == self.folder or path.startswith(self.folder + "/")
