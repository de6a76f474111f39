"""Work in batches that fit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.model.memory import in_fitting_batches, is_out_of_memory


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=9), max_size=5), st.integers(1, 9))
def test_everything_is_done_once_and_in_order_whatever_fits(batches: list[list[int]], fits: int) -> None:
    def work(batch: Sequence[int]) -> int:
        if len(batch) > fits:
            raise MemoryError
        return len(batch)

    done = list(in_fitting_batches(batches, work))
    assert [item for batch, _ in done for item in batch] == [item for batch in batches for item in batch]
    assert all(len(batch) == count <= fits for batch, count in done)


def test_what_does_not_fit_alone_and_what_is_no_lack_of_memory_is_raised() -> None:
    def work(batch: Sequence[int]) -> int:
        raise MemoryError if batch[0] == 0 else ValueError

    with pytest.raises(MemoryError):
        list(in_fitting_batches([[0]], work))
    with pytest.raises(ValueError, match=r"^$"):
        list(in_fitting_batches([[1, 2]], work))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_the_ways_in_which_it_is_said(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
