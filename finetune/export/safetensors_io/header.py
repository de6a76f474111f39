"""The head of a safetensors file that is about to be written. Heads that are read: `finetune/safetensors_heads.py`."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

from finetune.safetensors_heads import MAX_HEADER_BYTES, StoredTensor, TensorInfo, itemsize

__all__ = ["MAX_HEADER_BYTES", "StoredTensor", "TensorInfo", "build_header", "itemsize"]


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
