"""Writing a model folder's tensors, each to its place: the heads of the files are known before the first byte.

Memory holds what is being written and nothing else, and several threads may write at once.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from finetune.export.safetensors_io.header import TensorInfo, build_header, itemsize
from finetune.runs.files import write_text

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
"""Files of at most 5 GB, unless a single tensor is larger."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)


@dataclass
class _Shard:
    """One file: open from its first byte to its last."""

    path: Path
    head: bytes
    nbytes: int
    left: int
    """Bytes of tensors that are not written yet."""
    descriptor: int | None = None


class CheckpointWriter:
    """Writes `model.safetensors`, or shards and their index, into a folder. Use as a context manager.

    `order` is the tensors as they lie in the files: the plan's order, except that wider dtypes go first within a file,
    which keeps every tensor aligned. Any order of writing will do; that one leaves the fewest files open.
    """

    def __init__(self, folder: Path, planned: Sequence[TensorInfo], *, shard_bytes: int = SHARD_BYTES) -> None:
        groups = [sorted(group, key=lambda tensor: -itemsize(tensor.dtype)) for group in _split(planned, shard_bytes)]
        self._folder = folder
        self._shards: list[_Shard] = []
        self._places: dict[str, tuple[_Shard, int]] = {}
        for number, group in enumerate(groups):
            head = build_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in group])
            size = sum(tensor.nbytes for tensor in group)
            shard = _Shard(folder / _file_name(number, len(groups)), head, len(head) + size, size)
            self._shards.append(shard)
            position = len(head)
            for tensor in group:
                self._places[tensor.name] = (shard, position)
                position += tensor.nbytes
        self._left = {tensor.name: tensor.nbytes for group in groups for tensor in group}
        self._lock = threading.Lock()
        self.order = [tensor for group in groups for tensor in group]
        self.total_bytes = sum(shard.nbytes for shard in self._shards)
        self.largest_bytes = max((shard.nbytes for shard in self._shards), default=0)
        """Of all files, the largest one's size."""

    def write(self, name: str, chunks: Iterable[torch.Tensor]) -> None:
        """Write a whole tensor, given in pieces along its first dimension and in its planned dtype."""
        offset = 0
        for chunk in chunks:
            offset += self.write_at(name, offset, chunk)

    def write_at(self, name: str, offset: int, piece: torch.Tensor) -> int:
        """Write a piece of a tensor `offset` bytes from its beginning; the number of bytes it has. Thread-safe."""
        shard, start = self._places[name]
        data = as_bytes(piece)
        with self._lock:
            self._left[name] -= len(data)
            assert self._left[name] >= 0, f"{name}: {-self._left[name]} bytes more than planned"
            descriptor = self._opened(shard)
        written = len(data)
        self._put(descriptor, data, start + offset)
        _begin_writeback(descriptor, start + offset, written)
        with self._lock:
            shard.left -= written
            done = shard.left == 0
        if done:
            self._close(shard)
        return written

    def finish(self) -> None:
        """Sync what is open and write the index. All planned tensors must have been written."""
        for name, left in self._left.items():
            assert not left, f"{name} was planned, and {left} bytes of it were not written"
        for shard in self._shards:
            if shard.path.exists() and shard.descriptor is None:
                continue
            self._opened(shard)  # a file without a byte of tensors
            self._close(shard)
        if len(self._shards) > 1:
            placed = {name: shard.path.name for name, (shard, _) in self._places.items()}
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
            for shard in self._shards:
                if shard.descriptor is not None:
                    os.close(shard.descriptor)
                    shard.descriptor = None

    def _opened(self, shard: _Shard) -> int:
        if shard.descriptor is None:
            shard.descriptor = os.open(shard.path, _CREATE, 0o666)
            os.write(shard.descriptor, shard.head)
        return shard.descriptor

    def _put(self, descriptor: int, data: memoryview, position: int) -> None:
        if not hasattr(os, "pwrite"):  # Windows
            with self._lock:
                os.lseek(descriptor, position, os.SEEK_SET)
                while data:
                    data = data[os.write(descriptor, data) :]
            return
        while data:
            count = os.pwrite(descriptor, data, position)
            data, position = data[count:], position + count

    def _close(self, shard: _Shard) -> None:
        descriptor, shard.descriptor = shard.descriptor, None
        assert descriptor is not None
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's elements as they lie in memory, row by row, without a copy where it is contiguous already."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _begin_writeback(descriptor: int, start: int, count: int) -> None:
    """Have the disk begin with these bytes now, so that the sync at the end does not find all of them waiting.

    On Linux, saying that they are not needed any more starts writing them out; being dirty, they stay in the cache.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


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
