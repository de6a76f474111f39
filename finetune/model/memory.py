"""What to do when memory runs out: recognise it, and do the same work in smaller pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says, in any of the ways there are, that the memory of GPU or machine ran out."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("not enough memory", "out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def in_fitting_batches(
    batches: Iterable[Sequence[Item]], work: Callable[[Sequence[Item]], Result]
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Each batch, in order, with what `work` makes of it. One that memory does not suffice for is halved.

    Raises what `work` raises on a batch of one.
    """
    waiting = deque(batches)
    while waiting:
        batch = waiting.popleft()
        try:
            result = work(batch)
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            half = len(batch) // 2
            waiting.extendleft((batch[half:], batch[:half]))
            continue
        yield batch, result
