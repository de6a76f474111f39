"""A model folder's tensors, read one at a time (or a few rows at a time) from one file or many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ExportError, StorageError
from finetune.safetensors_heads import StoredTensor, TensorInfo, folder_tensors, parse_header

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 8 * 2**20
"""How much of a tensor `chunks` holds at once. 4 and 16 MB are as fast; more only takes memory."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder (or one file) holds. `tensors` keeps the order of the files; nothing is read until asked for."""

    place: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU, in its stored dtype and shape."""
        stored = self.tensors[name]
        return self._read(stored, stored.start, stored.nbytes).reshape(stored.shape)

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` rows of a tensor along its first dimension, from row `first` on."""
        stored = self.tensors[name]
        if (first, count) == (0, stored.rows):
            return self.read(name)
        row = stored.nbytes // stored.rows
        return self._read(stored, stored.start + first * row, count * row).reshape(count, *stored.shape[1:])

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The same tensor in groups of rows, see `pieces`."""
        for first, count in pieces(self.tensors[name]):
            yield self.rows(name, first, count)

    def _read(self, stored: StoredTensor, start: int, nbytes: int) -> torch.Tensor:
        import torch

        dtype = _torch_dtypes().get(stored.dtype)
        if dtype is None:
            raise ExportError(f"`{stored.name}` is stored as {stored.dtype}", place=str(stored.file))
        # Not a bytearray: that would be filled with zeros first.
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        view, filled = buffer.numpy().data, 0
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(start)
                while filled < nbytes and (count := file.readinto(view[filled:])):
                    filled += count
        except OSError as error:
            raise StorageError(f"cannot be read: {error.strerror}", place=str(stored.file)) from error
        if filled != nbytes:
            raise StorageError("became shorter while it was read", place=str(stored.file))
        return buffer.view(dtype)


def pieces(tensor: TensorInfo) -> list[tuple[int, int]]:
    """(first row, rows) of the groups that a tensor is worked on in: about CHUNK_BYTES each, one row at least.

    A scalar, or a tensor without elements, comes in one piece. The last group is never much smaller than the others:
    products with a single row round differently (`finetune/export/lora.py`).
    """
    if tensor.nbytes <= CHUNK_BYTES:
        return [(0, tensor.rows)]
    count = min(tensor.rows, -(-tensor.nbytes // CHUNK_BYTES))
    edges = [tensor.rows * number // count for number in range(count + 1)]
    return [(first, last - first) for first, last in itertools.pairwise(edges)]


def open_file(path: Path) -> Checkpoint:
    """One safetensors file. Raises StorageError if it is missing or damaged."""
    if not path.is_file():
        raise StorageError("there is no such file", place=str(path))
    return Checkpoint(path, {tensor.name: tensor for tensor in parse_header(path)})


def open_checkpoint(folder: Path) -> Checkpoint:
    """The weights of a model folder. Raises BaseError and StorageError, as `folder_tensors` says."""
    return Checkpoint(folder, folder_tensors(folder))


def largest(tensor: torch.Tensor) -> float:
    """The largest absolute value; NaN if there is one anywhere, 0 for a tensor without elements.

    Comparing this with a limit is an order of magnitude faster than `isfinite()` for every element.
    """
    if not tensor.numel():
        return 0.0
    low, high = tensor.aminmax()
    return float("nan") if bool(low.isnan()) else max(-float(low), float(high))


def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
