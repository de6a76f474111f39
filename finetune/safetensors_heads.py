"""The heads of safetensors files: what a file or a model folder holds and where, with nothing taken on trust.

Whoever loads or copies weights asks here first: a truncated file is found in a millisecond, and not when half of a
model is in memory.

Format: 8 bytes little-endian length, that many bytes of JSON, then the tensors without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from finetune.errors import BaseError, StorageError
from finetune.given_files import LFS_HINT, LFS_MESSAGE, is_lfs_pointer, not_a_file

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound on the JSON part."""

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is called and what it looks like, wherever it is."""

    name: str
    dtype: str
    """The format's own name: F32, BF16, F16, …"""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8

    @property
    def rows(self) -> int:
        """The first dimension; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1

    @property
    def is_float(self) -> bool:
        """Whether this holds plain floating-point numbers (16 bit and wider), not codes of a quantiser."""
        return self.dtype in ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """One tensor in one file: `start` is its first byte in the file."""

    file: Path
    start: int


def itemsize(dtype: str) -> int:
    """Bytes per element of a dtype that has whole bytes."""
    bits = _BITS[dtype]
    assert bits % 8 == 0, dtype
    return bits // 8


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder: of `model.safetensors`, or of the shards that its index names.

    Raises BaseError if the folder has no such weights (weights in the pickle format are never read: a pickle runs
    code), StorageError if a file is missing or damaged.
    """
    if not folder.is_dir():
        raise BaseError("there is no such folder", place=str(folder))
    if (folder / "model.safetensors").is_file():
        return {tensor.name: tensor for tensor in parse_header(folder / "model.safetensors")}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise _no_weights(folder)
    placed = _read_index(index)
    shards = sorted(set(placed.values()))
    if missing := [name for name in shards if not (folder / name).is_file()]:
        named = ", ".join(missing[:5]) + (f" … ({len(missing)} in all)" if len(missing) > 5 else "")
        raise StorageError(f"these files are missing: {named}", place=str(folder), hint="download them again")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in parse_header(folder / shard):
            if placed.get(tensor.name, shard) != shard:
                continue
            if tensor.name in tensors:
                raise StorageError(f"`{tensor.name}` is in more than one file", place=str(folder), hint=_AGAIN)
            tensors[tensor.name] = tensor
    if lost := sorted(set(placed) - set(tensors)):
        raise StorageError(
            f"`{lost[0]}` is not in {placed[lost[0]]}, where it should be", place=str(index), hint=_AGAIN
        )
    return tensors


def parse_header(path: Path) -> list[StoredTensor]:
    """Every tensor of a file, in the order of its bytes.

    Raises StorageError for anything that is not a whole, well-formed safetensors file.
    """
    if what := not_a_file(path):
        raise StorageError(f"is {what}, not a file", place=str(path), hint=_AGAIN)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            if is_lfs_pointer(head + file.peek(40)):
                raise StorageError(LFS_MESSAGE, place=str(path), hint=LFS_HINT)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, "its first bytes are not the head of a safetensors file, or it is cut short")
            raw = file.read(length)
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", place=str(path)) from error
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid: {error}") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a table")
    entries.pop("__metadata__", None)
    begin = 8 + length
    tensors = sorted((_entry(path, name, entry, begin) for name, entry in entries.items()), key=_position)
    position = begin
    for tensor in tensors:
        if tensor.start != position:
            raise _damaged(path, f"`{tensor.name}` does not follow the tensor before it")
        position += tensor.nbytes
    if position != size:
        raise _damaged(path, f"its header speaks of {position:,} bytes and the file has {size:,}")
    return tensors


def _no_weights(folder: Path) -> BaseError:
    if (what := not_a_file(folder / "model.safetensors")) is not None:
        return BaseError(f"model.safetensors is {what}, not a file", place=str(folder), hint="download the model again")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return BaseError(
            "its weights are in the pickle format, which can run code when it is opened",
            place=str(folder),
            hint="use a revision that has safetensors files",
        )
    return BaseError(
        "there are no weights here (model.safetensors)",
        place=str(folder),
        hint="download the model again, or use a revision of it with safetensors files",
    )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name → file name. A file name may not lead out of the folder."""
    try:
        text = index.read_bytes()
        if is_lfs_pointer(text):
            raise StorageError(LFS_MESSAGE, place=str(index), hint=LFS_HINT)
        content = json.loads(text)
        placed = content["weight_map"]
        pairs = list(placed.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError("is not a valid index of weights", place=str(index), hint=_AGAIN) from error
    for name, shard in pairs:
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set('/\\:\0"'):
            raise StorageError(
                f"`{name}` is said to be in {str(shard)[:100]!r}, which is not a file name",
                place=str(index),
                hint="use a model of somebody whom you trust: this one points out of its folder",
            )
    if not pairs:
        raise StorageError("names no tensors", place=str(index), hint=_AGAIN)
    return dict(pairs)


def _entry(path: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the entry of `{name}` is not a table")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"`{name}` has the unknown type {dtype!r}")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the shape or place of `{name}` is not valid")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _damaged(path, f"`{name}` has {end - start:,} bytes, which its shape {shape} does not")
    return StoredTensor(name, dtype, tuple(shape), path, begin + start)


def _position(tensor: StoredTensor) -> tuple[int, int]:
    # An empty tensor shares its place with the next one and goes first.
    return tensor.start, tensor.nbytes


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**62 for number in value)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    for name in table:
        name.encode("utf-8")  # half a surrogate pair, which JSON can spell, raises a ValueError
    return table


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(why, place=str(path), hint=_AGAIN)
