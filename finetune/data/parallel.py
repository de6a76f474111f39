"""Encoding chunks on all cores: in processes of their own, or here where there is too little to share out."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from finetune.data.encode import Encoded, Encoder, Task
from finetune.errors import WorldError

INLINE_CHUNKS = 3
"""Up to so many chunks are encoded here: starting processes takes as long as encoding one."""

MAX_PROCESSES = 16

AHEAD = 2
"""Chunks under way for each process: enough to keep it busy, few enough to keep memory flat."""

_PR_SET_PDEATHSIG = 1

_encoder: Encoder | None = None
"""What a worker encodes with. Set before the processes are forked, so that they share its vocabulary's memory."""


def encoded(encoder: Encoder, tasks: Iterable[Task]) -> Iterator[Encoded]:
    """The encoded chunks, in the order of the tasks."""
    remaining = iter(tasks)
    first = list(islice(remaining, INLINE_CHUNKS + 1))
    processes = min(available_cores(), MAX_PROCESSES)
    if len(first) > INLINE_CHUNKS:
        encoder.expect_many()
    if len(first) <= INLINE_CHUNKS or processes == 1 or sys.platform != "linux":
        # Elsewhere processes do not begin as copies of this one, and the tokenizer's own threads do the sharing.
        for task in chain(first, remaining):
            yield encoder.encode(task)
        return
    global _encoder
    _encoder = encoder
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(os.getpid(),)) as pool:
            under_way: deque[Future[Encoded]] = deque()
            try:
                for task in chain(first, remaining):
                    under_way.append(pool.submit(_encode, task))
                    if len(under_way) >= processes * AHEAD:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            except BrokenProcessPool as error:
                raise WorldError(
                    "a process that prepares data was killed",
                    hint="the system ends processes when memory runs out: close other programs and run it again",
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        _encoder = None


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(parent: int) -> None:
    # A signal for the terminal's group reaches every process in it; the one that the person started answers it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # That one may be killed. Who waits for its next task would then wait for ever, and hold the run's lock.
    _end_with(parent)
    # The tokenizer's own threads would compete with the other processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with(parent: int) -> None:
    """Have the system kill this process when the one that forked it ends (prctl(2), Linux alone)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this
        os._exit(1)


def _encode(task: Task) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(task)
