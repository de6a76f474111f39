"""float32 rows → the bytes that llama.cpp's own quantiser makes of them, through `ggml_quantize_chunk` in its library.

A quantised row is a string of blocks; a block is a fixed number of weights in a fixed number of bytes. ggml quantises
each row by itself, so rows may be handed over in any groups and from any thread: the bytes are the same. The call gives
Python's lock back, which is what lets a pool of threads keep every core busy.

None of the formats here needs an importance matrix, and none needs ggml's tables to be set up first
(`ggml_quantize_init` does something for the iq1, iq2 and iq3 formats alone).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import MissingExtraError
from finetune.llamacpp.library import KNOWN_VERSIONS, library

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class Format:
    """How one of ggml's types stores weights."""

    number: int
    """In the enum `ggml_type` of ggml.h."""
    block: int
    """Weights per block; a row is a whole number of blocks."""
    size: int
    """Bytes per block."""
    digest: str
    """First quarter of the SHA-256 of what the self-test's rows become, on x86-64."""
    error: float
    """Bound on the self-test's rounding error, as a share of the values (root mean squares): 1.25 × measured."""


FORMATS: Mapping[str, Format] = {
    "q4_0": Format(2, 32, 18, "0d37c74fd6138891", 0.14),
    "q4_1": Format(3, 32, 20, "b7978201a85b08f6", 0.13),
    "q5_0": Format(6, 32, 22, "490f1f5ce8363979", 0.1),
    "q5_1": Format(7, 32, 24, "41ad63a77ede6d0d", 0.057),
    "q8_0": Format(8, 32, 34, "02c122d565002c98", 0.014),
    "q2_k": Format(10, 256, 84, "197a11d5568ca40b", 0.26),
    "q3_k": Format(11, 256, 110, "ca3670f60339b88c", 0.15),
    "q4_k": Format(12, 256, 144, "9036a9b752dcd915", 0.12),
    "q5_k": Format(13, 256, 176, "a7a1eb315e9cab3a", 0.059),
    "q6_k": Format(14, 256, 210, "b06449e6d60488fa", 0.041),
    "iq4_nl": Format(20, 32, 18, "cd5b40ba00a575de", 0.13),
    "iq4_xs": Format(23, 256, 136, "34afba74c5d8d359", 0.13),
}
"""Sizes from the block structs in ggml-common.h. Digests and errors were measured with xllamacpp 2026.10.11549;
llama.cpp 0.5.0, compiled with and without fused multiply-add, gives the same digests."""

_Chunk = Callable[[int, int, int, int, int, int, None], int]
_LOCK = threading.Lock()


def quantise(rows: numpy.ndarray[Any, Any], name: str) -> numpy.ndarray[Any, Any]:
    """(rows, weights) float32, finite, contiguous → (rows, bytes per row) uint8. In the calling thread; any may call.

    `name` is a key of FORMATS, and the rows are a whole number of its blocks. What is not finite must not come here:
    ggml ends the process over it.

    Raises MissingExtraError if there is no library, or one that does not do what we know.
    """
    import numpy

    layout = FORMATS[name]
    count, width = rows.shape
    assert rows.dtype == numpy.float32, rows.dtype
    assert rows.flags.c_contiguous
    assert width % layout.block == 0, f"{width} weights are no whole number of {name} blocks"
    out = numpy.empty((count, width // layout.block * layout.size), dtype=numpy.uint8)
    written = _tested_chunk()(layout.number, rows.ctypes.data, out.ctypes.data, 0, count, width, None)
    assert written == out.nbytes, f"{name}: {written} bytes written, {out.nbytes} expected"
    return out


def require_quantiser() -> None:
    """Raise MissingExtraError unless `quantise` can do its work. The first call tests every format (3 ms)."""
    _tested_chunk()


def has_quantiser() -> bool:
    """Whether `quantise` can do its work."""
    try:
        require_quantiser()
    except MissingExtraError:
        return False
    return True


def _tested_chunk() -> _Chunk:
    with _LOCK:
        return _load_and_test()


@functools.cache
def _load_and_test() -> _Chunk:
    """`ggml_quantize_chunk`, after it has shown for every format that it is the function we know."""
    import numpy

    loaded = library()
    try:
        chunk = loaded.ggml_quantize_chunk
        type_name, block, size = loaded.ggml_type_name, loaded.ggml_blck_size, loaded.ggml_type_size
    except AttributeError as error:
        raise _unknown(f"has no function of this name: {error}") from error
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    type_name.restype, block.restype, size.restype = ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
    rows = _probe()
    for name, layout in FORMATS.items():
        said = (type_name(layout.number), block(layout.number), size(layout.number))
        if ((said[0] or b"").lower(), *said[1:]) != (name.encode(), layout.block, layout.size):
            raise _unknown(f"stores {name} in another way: {said}")
        out = numpy.empty((len(rows), rows.shape[1] // layout.block * layout.size), dtype=numpy.uint8)
        chunk(layout.number, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
        if _digest(out) != layout.digest and not _rounding_error(rows, out, name) < layout.error:
            raise _unknown(f"does not quantise to {name} as we know it")
    return chunk


def _probe() -> numpy.ndarray[Any, Any]:
    """(4, 256) float32: bell-shaped values, zeros, one sign only, one outlier. Multiples of 1/64, so that products of
    two of them are exact."""
    import numpy

    steps = numpy.arange(4 * 256, dtype=numpy.int64)
    spread = steps * 5 % 61 + steps * 11 % 61 + steps * 13 % 61 - 90
    rows = (spread.reshape(4, 256) / 64).astype(numpy.float32)
    rows[1, :64] = 0.0
    rows[2] = abs(rows[2])
    rows[3, 100] = -20.0
    return rows


def _digest(encoded: numpy.ndarray[Any, Any]) -> str:
    return hashlib.sha256(encoded.tobytes()).hexdigest()[:16]


def _rounding_error(rows: numpy.ndarray[Any, Any], encoded: numpy.ndarray[Any, Any], name: str) -> float:
    """Root mean square of the error over that of the values, decoded by the `gguf` package.

    Compilers for other processors may fuse multiplications and additions, which rounds some weights to a neighbour
    (up to 4 % of a q2_k tensor's bytes differ, none of a q8_0 tensor's). That is not another format.
    """
    import numpy
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    decoded = dequantize(encoded, GGMLQuantizationType[name.upper()])
    return float(numpy.sqrt(numpy.square(decoded - rows).mean() / numpy.square(rows).mean()))


def _unknown(what: str) -> MissingExtraError:
    return MissingExtraError(
        f"the installed llama.cpp {what}", hint=f'pip install "xllamacpp=={KNOWN_VERSIONS[-1]}", or choose q8_0 or f16'
    )
