"""Writing a model folder's tensors one after the other: the heads of the files are known before the first byte.

Memory holds what is being written and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from finetune.export.partial import write_text
from finetune.export.safetensors_io.header import TensorInfo, build_header, itemsize

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
"""Files of at most 5 GB, unless a single tensor is larger."""


class CheckpointWriter:
    """Writes `model.safetensors`, or shards and their index, into a folder. Use as a context manager.

    `order` is the order in which `write` must be called: the plan's, except that wider dtypes go first within a file,
    which keeps every tensor aligned.
    """

    def __init__(self, folder: Path, planned: Sequence[TensorInfo], *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shards = [
            sorted(shard, key=lambda tensor: -itemsize(tensor.dtype)) for shard in _split(planned, shard_bytes)
        ]
        self._heads = [
            build_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]) for shard in self._shards
        ]
        self.order = [tensor for shard in self._shards for tensor in shard]
        self.total_bytes = sum(map(len, self._heads)) + sum(tensor.nbytes for tensor in self.order)
        self._steps = self._walk()
        self._file: IO[bytes] | None = None

    def write(self, name: str, chunks: Iterable[torch.Tensor]) -> None:
        """Append the next tensor of `order`, given in pieces along its first dimension and in its planned dtype."""
        tensor = next(self._steps)
        assert tensor.name == name, f"{name} is written where {tensor.name} was planned"
        assert self._file is not None
        written = 0
        for chunk in chunks:
            data = as_bytes(chunk)
            self._file.write(data)
            written += len(data)
        assert written == tensor.nbytes, f"{name}: {written} bytes written, {tensor.nbytes} planned"

    def finish(self) -> None:
        """Sync the last file and write the index. All planned tensors must have been written."""
        left = next(self._steps, None)
        assert left is None, f"{left} was planned and not written"
        if len(self._shards) > 1:
            placed = {tensor.name: self._name(i) for i, shard in enumerate(self._shards) for tensor in shard}
            size = sum(tensor.nbytes for tensor in self.order)
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
            write_text(self._folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            if self._file is not None:
                self._file.close()

    def _walk(self) -> Iterator[TensorInfo]:
        """The planned tensors in order; opens and closes the files between them."""
        for number, (shard, head) in enumerate(zip(self._shards, self._heads, strict=True)):
            self._file = (self._folder / self._name(number)).open("wb")
            self._file.write(head)
            yield from shard
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's elements as they lie in memory, row by row, without a copy where it is contiguous already."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _split(planned: Sequence[TensorInfo], shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in planned:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards
