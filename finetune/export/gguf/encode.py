"""From rows of torch tensors to the bytes of GGUF tensors, on all cores.

Formats with blocks come from ggml (`llamacpp.quantize`). q8_0 and q4_0 are also here, in torch, for machines without
it: the same bytes at about half the speed.
"""

from __future__ import annotations

import collections
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finetune.errors import ExportError
from finetune.export.safetensors_io import largest
from finetune.export.safetensors_io.writer import as_bytes
from finetune.llamacpp.quantize import FORMATS, has_quantiser, quantise, require_quantiser

if TYPE_CHECKING:
    import torch

Encoding = Literal[
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip
"""How one tensor is stored."""

Quant = Literal[
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1",
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip
"""How a file is stored: what a person asks for. The names are those of `llama-quantize`."""

PIECE_WEIGHTS = 2**18
"""About how many weights are encoded at a time: 1 MB in float32 stays in a core's cache. 2**16 to 2**20 are as fast."""

_AHEAD_WEIGHTS = 2**24
"""How many weights may wait for the encoders while the next tensor is read and merged: a second's work with q4_k on two
cores, 64 MB at most in float32."""

_SCRATCH = threading.local()

_PLAIN_BYTES: dict[Encoding, int] = {"f32": 4, "f16": 2, "bf16": 2}

_BLOCK = 32
"""Weights per block of q8_0 and q4_0."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor, to be encoded."""

    tensor: str
    """Its name, for messages."""
    rows: torch.Tensor
    """(…, weights per row), any floating-point dtype."""
    encoding: Encoding
    first: bool
    """Whether the tensor begins here."""
    place: str
    """Where it comes from, for messages."""


def nbytes(shape: tuple[int, ...], encoding: Encoding) -> int:
    """Size of a tensor stored like this. Its rows are a whole number of blocks."""
    if encoding in _PLAIN_BYTES:
        return math.prod(shape) * _PLAIN_BYTES[encoding]
    return math.prod(shape) // FORMATS[encoding].block * FORMATS[encoding].size


def require_encoders(encodings: set[Encoding]) -> None:
    """Raise MissingExtraError unless all of these can be made here."""
    if encodings - {*_PLAIN_BYTES, "q8_0", "q4_0"}:
        require_quantiser()


def cut(tensor: str, chunks: Iterator[torch.Tensor], encoding: Encoding, place: str) -> Iterator[Piece]:
    """A tensor's chunks (along its first dimension) as pieces of whole rows, about PIECE_WEIGHTS each."""
    import torch

    first = True
    for chunk in chunks:
        rows = chunk.reshape(-1, chunk.shape[-1]) if chunk.ndim else chunk.reshape(1, 1)
        for part in torch.split(rows, max(1, PIECE_WEIGHTS // max(1, rows.shape[-1]))):
            yield Piece(tensor, part, encoding, first, place)
            first = False


def encode_all(pieces: Iterator[Piece]) -> Iterator[tuple[Piece, memoryview]]:
    """Every piece with its bytes, in order. One thread per core encodes while the caller's gets the next pieces.

    Raises what getting a piece raises, and ExportError for values that an encoding cannot hold.
    """
    waiting: collections.deque[tuple[Piece, Future[memoryview]]] = collections.deque()
    weights = 0
    with ThreadPoolExecutor(_cores(), thread_name_prefix="encode") as pool:
        try:
            for piece in pieces:
                waiting.append((piece, pool.submit(encode, piece)))
                weights += piece.rows.numel()
                while weights > _AHEAD_WEIGHTS or (waiting and waiting[0][1].done()):
                    done, future = waiting.popleft()
                    weights -= done.rows.numel()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- one piece ----------------------------------------------------------------------------------------------------


def encode(piece: Piece) -> memoryview:
    """The bytes of some rows, rounded to nearest. Raises ExportError for values that the encoding cannot hold."""
    import torch

    rows, encoding = piece.rows, piece.encoding
    found = largest(rows)
    # A block's scales are float16. While the values fit into one, so do the scales of every format.
    limit = torch.finfo({"f32": torch.float32, "bf16": torch.bfloat16}.get(encoding, torch.float16)).max
    if not found <= limit:  # NaN is not less or equal either; ggml would end the process
        raise ExportError(
            f"`{piece.tensor}` has values that {encoding} cannot hold ({found:g})",
            place=piece.place,
            hint="convert to bf16 or f32",
        )
    if encoding in _PLAIN_BYTES:
        return as_bytes(rows.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[encoding]))
    if has_quantiser():
        return quantise(_float32(rows).reshape(-1, rows.shape[-1]).numpy(), encoding).reshape(-1).data
    return as_bytes(quantise_q8_0(rows) if encoding == "q8_0" else quantise_q4_0(rows))


def _float32(rows: torch.Tensor) -> torch.Tensor:
    """The rows in float32, in memory that this thread uses again for its next piece: new memory would take ten times as
    long to fill (2.3 ns per weight instead of 0.2), a third of what q8_0 takes in all."""
    import torch

    if getattr(_SCRATCH, "values", None) is None or _SCRATCH.values.numel() < rows.numel():
        _SCRATCH.values = torch.empty(rows.numel(), dtype=torch.float32)
    values: torch.Tensor = _SCRATCH.values[: rows.numel()].reshape(rows.shape)
    return values.copy_(rows)


def quantise_q8_0(tensor: torch.Tensor) -> torch.Tensor:
    """(…, n) of any floating dtype, n a multiple of 32 → (blocks, 34) bytes: a float16 scale and 32 signed bytes each.

    The scale is the block's largest value / 127; halves are rounded away from zero. The same bytes as ggml's
    `quantize_row_q8_0_ref`.
    """
    import torch

    blocks = tensor.float().reshape(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    exact = blocks * torch.where(scales == 0, 0.0, 1.0 / scales)
    size = exact.abs()
    whole = size.floor()
    # floor(2 · fraction) is 1 from a half on; adding a half first would round 0.49999997 up.
    rounded = size.sub_(whole).mul_(2).floor_().add_(whole).copysign_(exact)
    return torch.cat([scales.half().view(torch.uint8), rounded.to(torch.int8).view(torch.uint8)], dim=1)


def quantise_q4_0(tensor: torch.Tensor) -> torch.Tensor:
    """(…, n), n a multiple of 32 → (blocks, 18) bytes: a float16 scale and 16 bytes with two weights each.

    The scale is the value furthest from zero (the first of equals) / −8, so that this one is exact; the first sixteen
    weights are in the low halves. The same bytes as ggml's `quantize_row_q4_0_ref` on x86-64.
    """
    import torch

    blocks = tensor.float().reshape(-1, _BLOCK)
    furthest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scales = (furthest + 0.0) / -8  # ggml begins its search with +0
    steps = (blocks * torch.where(scales == 0, 0.0, 1.0 / scales)).add_(8.5).to(torch.int8).clamp_(max=15)
    packed = (steps[:, :16] | (steps[:, 16:] << 4)).view(torch.uint8)
    return torch.cat([scales.half().view(torch.uint8), packed], dim=1)
