"""The head of a GGUF file, looked at before llama.cpp is: is this a whole file of that kind?

llama.cpp checks the same and says it in its own words, mostly; now and then it aborts. Here nothing is loaded, no count
is believed before the bytes are there, and the message says what to do. What the entries mean stays llama.cpp's
business.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from finetune.errors import StorageError
from finetune.given_files import LFS_HINT, LFS_MESSAGE, is_lfs_pointer, not_a_file

_VERSIONS = (2, 3)
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value → its bytes. 8 is text, 9 a list."""
_TEXT, _LIST = 8, 9

_MAX_TENSORS = 100_000
_MAX_ENTRIES = 10_000
_MAX_NESTED = 4
"""Lists within lists. Real files have none."""
_MAX_SIDES = 4

_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    20: (32, 18), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2),
}  # fmt: skip
"""Type of a tensor → numbers in a block, bytes of a block (ggml.h and ggml-common.h); others have no check of size."""


class _Damaged(Exception):
    """What is wrong with the file."""


def check_gguf(path: Path) -> None:
    """Raise StorageError unless a file is whole, as far as its head tells: entries, tensors, and where they end."""
    if (what := not_a_file(path)) or not path.is_file():
        raise StorageError(f"is {what}, not a file" if what else "there is no such file", place=str(path), hint=_AGAIN)
    try:
        with open(path, "rb") as file:
            _Head(file).check()
    except _Damaged as error:
        hint = LFS_HINT if str(error) == LFS_MESSAGE else _AGAIN
        raise StorageError(str(error), place=str(path), hint=hint) from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", place=str(path), hint=_AGAIN) from error


_AGAIN = "remove it and export it again"


class _Head:
    """Reads a head from its first byte to its last."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._alignment = 32

    def check(self) -> None:
        magic = self._file.read(4)
        if is_lfs_pointer(magic + self._file.read(60)):
            raise _Damaged(LFS_MESSAGE)
        self._file.seek(4)
        if magic != b"GGUF":
            raise _Damaged("is not a GGUF file: its first bytes are others")
        (version,) = self._numbers("I")
        if version not in _VERSIONS:
            raise _Damaged(f"is GGUF of version {version}, and only 2 and 3 are known")
        tensors, entries = self._numbers("QQ")
        if tensors > _MAX_TENSORS or entries > _MAX_ENTRIES:
            raise _Damaged(f"claims to have {tensors:,} tensors and {entries:,} entries")
        for _ in range(entries):
            name = self._text()
            (kind,) = self._numbers("I")
            if name == b"general.alignment" and kind == 4:
                (self._alignment,) = self._numbers("I")
            else:
                self._skip_value(kind)
        ends = [self._tensor() for _ in range(tensors)]
        if not 0 < self._alignment <= 1 << 20:
            raise _Damaged(f"claims an alignment of {self._alignment:,} bytes")
        begin = -(-self._file.tell() // self._alignment) * self._alignment
        if ends and begin + max(ends) > self._size:
            raise _Damaged(f"is cut short: its tensors end at byte {begin + max(ends):,} and it has {self._size:,}")

    def _tensor(self) -> int:
        """Where a tensor ends, counted from the first tensor's begin."""
        self._text()
        (sides,) = self._numbers("I")
        if sides > _MAX_SIDES:
            raise _Damaged(f"claims to have a tensor of {sides:,} dimensions")
        shape = self._numbers("Q" * sides)
        kind, offset = self._numbers("IQ")
        numbers, size = _BLOCKS.get(kind, (1, 0))
        return int(offset) + math.prod(shape) // numbers * size

    def _skip_value(self, kind: int, nested: int = 0) -> None:
        if kind == _TEXT:
            self._text()
        elif kind in _FIXED:
            self._skip(_FIXED[kind])
        elif kind == _LIST and nested < _MAX_NESTED:
            inner, count = self._numbers("IQ")
            if inner in _FIXED:
                self._skip(_FIXED[inner] * count)
                return
            if count * 8 > self._size:  # each takes eight bytes at least
                raise _Damaged(f"claims to have a list of {count:,} texts")
            for _ in range(count):
                self._skip_value(inner, nested + 1)
        else:
            raise _Damaged(f"has an entry of the unknown type {kind}")

    def _text(self) -> bytes:
        (length,) = self._numbers("Q")
        if length > 200:  # a template, a token: not what anything here asks for
            self._skip(length)
            return b""
        return self._read(length)

    def _numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(f"<{layout}", self._read(struct.calcsize(f"<{layout}")))

    def _read(self, count: int) -> bytes:
        found = self._file.read(count)
        if len(found) < count:
            raise _Damaged("is cut short: it ends within its head")
        return found

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise _Damaged("is cut short: it ends within its head")
        self._file.seek(count, os.SEEK_CUR)
