"""Being asked to stop, by Ctrl-C, SIGTERM or SIGHUP: at once, or as soon as nothing is lost by it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

RESUMABLE = 75
"""The exit code of a command that was stopped and goes on when it is given again: EX_TEMPFAIL of sysexits.h."""

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(BaseException):
    """A signal asked this process to stop. Not an error: the same command goes on from what is on the disk.

    Nor is it a KeyboardInterrupt, which libraries turn into other things.
    """


class Stopper:
    """What a command asks whether it should stop. A signal raises `Stopped` where it arrives, unless it is `held`."""

    def __init__(self) -> None:
        self.asked: str | None = None
        """The name of the signal that came, if one did: `SIGINT`, `SIGTERM` or `SIGHUP`."""
        self._held = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a signal is only noted in `asked`: whoever works there looks at it, and stops in good order."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def stop_if_asked(self) -> None:
        """Raise `Stopped` if a signal was noted."""
        if self.asked is not None:
            raise Stopped(self.asked)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        # Who sends a second one does not want to wait: from now on the system answers, wherever this process is.
        # Nothing on the disk depends on its ending well.
        for each in _signals():
            if signal.getsignal(each) == self._receive:
                signal.signal(each, signal.SIG_DFL)
        if not self._held:
            raise Stopped(self.asked)


@contextlib.contextmanager
def stoppable() -> Iterator[Stopper]:
    """Answer signals for as long as the block runs. The first is `Stopper`'s to answer, a second ends the process.

    Only a main thread can answer signals; elsewhere, and for a signal that is ignored (`nohup`), nothing changes.
    """
    stopper = Stopper()
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in _signals():
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stopper._receive)
    try:
        yield stopper
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signals() -> list[signal.Signals]:
    return [signal.Signals[name] for name in _NAMES if hasattr(signal, name)]
