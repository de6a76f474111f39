"""Bounds for a chat template: it is a program that came with a model, and may loop for ever or fill the memory.

Time is the processor's, so that a machine that is busy with other things refuses nothing. Memory is what is asked of
the system beyond what the process has already; the kernel says no, and Python turns that into a MemoryError. So neither
needs to know by which operation a template grows (`'a' * 10**10`, `center`, a list of lists written as JSON …).

Signals reach the main thread of a process alone, and only Linux bounds memory: elsewhere a template runs without the
one or the other. One operation of Python that neither returns nor takes memory (comparing lists that hold each other
many times over) is not interrupted; it wastes time until somebody ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from finetune.errors import BaseError

SECONDS = 20.0
"""For one rendering. A conversation of 100,000 tokens in 1,000 messages takes most real templates 0.01 to 0.5 s, and
those that look through all messages for each (Gemma 4, Qwen 3.5) 8 s, on symbols."""

BYTES = 2**31
"""More memory than the conversations of a chunk take while they are rendered: a chunk is 4 MB of text, or one row."""

CHARACTERS = 2**25
"""The longest conversation that a template may write: some eight million tokens."""

_AGAIN_SECONDS = 0.5
"""After so long the signal comes again: an exception that is raised while an object is taken down is lost."""

_HINT = "give another template with `chat_template: chatml | plain | path.jinja`"

Made = TypeVar("Made")

_bound = False
"""Whether a `bounds` is open in this process."""

_working = False
"""Whether the clock is running: only then is the signal about a template."""


class _OutOfTime(BaseException):
    """Raised by the signal; not an Exception, which Jinja takes for an attribute that is not there."""


@contextlib.contextmanager
def bounds(place: str) -> Iterator[None]:
    """Where templates are run: opened once for many renderings, because opening costs 40 µs. May be nested.

    Raises BaseError, with `place`, where more memory was wanted than BYTES.
    """
    global _bound
    if _bound or threading.current_thread() is not threading.main_thread():
        yield
        return
    limit, handler = _bound_memory(), _catch_signal()
    _bound = True
    try:
        yield
    except MemoryError:
        raise BaseError(
            f"the chat template was stopped: it wants more than {BYTES >> 20:,} MB of memory for one conversation",
            place=place,
            hint=_HINT,
        ) from None
    finally:
        _bound = False
        _leave_signal(handler)
        _unbound_memory(limit)


def bounded(place: str, work: Callable[[], Made]) -> Made:
    """What `work` returns. Raises BaseError, with `place` as the name of the template, for too much time or memory."""
    global _working
    if not _bound:
        with bounds(place):
            return bounded(place, work) if _bound else work()
    try:
        # Twice, because the signal may come where the work has just ended.
        try:
            _working = True
            _start_clock()
            return work()
        finally:
            _working = False
    except _OutOfTime:
        raise BaseError(
            f"the chat template was stopped after {SECONDS:g} seconds on one conversation: it may loop for ever",
            place=place,
            hint=_HINT,
        ) from None
    finally:
        _working = False


def check_length(characters: int, place: str) -> None:
    """Raise BaseError for a text that no conversation can need."""
    if characters > CHARACTERS:
        raise BaseError(
            f"the chat template makes {characters:,} characters of one conversation", place=place, hint=_HINT
        )


# -- the clock ----------------------------------------------------------------------------------------------------

if sys.platform != "win32":

    def _start_clock() -> None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS, _AGAIN_SECONDS)

    def _catch_signal() -> object:
        return signal.signal(signal.SIGPROF, _stop)

    def _leave_signal(before: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)  # type: ignore[arg-type]  # whatever stood there may stand there again

    def _stop(number: int, frame: FrameType | None) -> None:
        if _working:
            raise _OutOfTime

else:

    def _start_clock() -> None:
        return

    def _catch_signal() -> object:
        return None

    def _leave_signal(before: object) -> None:
        return


# -- the memory ---------------------------------------------------------------------------------------------------

if sys.platform == "linux":
    import resource

    def _bound_memory() -> tuple[int, int]:
        """Allow this process BYTES more than it has. Returns the limits before."""
        soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
        try:
            pages = int(os.read(descriptor, 64).split(b" ", 1)[0])
        finally:
            os.close(descriptor)
        limit = pages * resource.getpagesize() + BYTES
        if soft == resource.RLIM_INFINITY or soft > limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        return before

    def _unbound_memory(before: tuple[int, int]) -> None:
        resource.setrlimit(resource.RLIMIT_AS, before)

else:

    def _bound_memory() -> tuple[int, int]:
        return (0, 0)

    def _unbound_memory(before: tuple[int, int]) -> None:
        return
