"""From a torch tensor to the bytes of a GGUF tensor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from finetune.export.safetensors_io.writer import as_bytes

if TYPE_CHECKING:
    import torch

Quant = Literal["f32", "f16", "bf16", "q8_0"]

Q8_0_BLOCK = 32
"""Weights that share one scale; a row must be a whole number of blocks."""

_BYTES_PER_BLOCK = {"f32": (4, 1), "f16": (2, 1), "bf16": (2, 1), "q8_0": (2 + Q8_0_BLOCK, Q8_0_BLOCK)}

FILE_TYPES: dict[Quant, int] = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""`general.file_type`, from the enum `llama_ftype` of llama.h."""


def choose(shape: tuple[int, ...], quant: Quant) -> Quant:
    """How a tensor of this shape is stored. Vectors (norms, biases) stay float32, which llama.cpp computes them in;
    rows that are not a whole number of blocks are stored as float16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if quant == "q8_0" and shape[-1] % Q8_0_BLOCK else quant


def nbytes(shape: tuple[int, ...], quant: Quant) -> int:
    """Size of a tensor stored like this."""
    size, block = _BYTES_PER_BLOCK[quant]
    return math.prod(shape) // block * size


def encode(tensor: torch.Tensor, quant: Quant) -> memoryview | bytes:
    """The bytes of a tensor (or of some of its rows), rounded to nearest. The dtype given in does not matter."""
    import torch

    if quant == "q8_0":
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        return bytes(quantize(tensor.float().contiguous().numpy(), GGMLQuantizationType.Q8_0).tobytes())
    return as_bytes(tensor.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[quant]))
