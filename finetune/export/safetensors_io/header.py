"""The head of a safetensors file: what is in it and where, with nothing taken on trust.

Format: 8 bytes little-endian length, that many bytes of JSON, then the tensors without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from finetune.errors import StorageError

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


def parse_header(path: Path) -> list[StoredTensor]:
    """Every tensor of a file, in the order of its bytes.

    Raises StorageError for anything that is not a whole, well-formed safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
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


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The head of a file that holds these (name, dtype, shape) in this order, ready to be followed by their bytes.

    Padded with spaces to a multiple of 8, so that the tensors are aligned.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * itemsize(dtype)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


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
