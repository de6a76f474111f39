"""ggml's quantiser, called through the library: its bytes, its self-test, its threads, and what happens without it."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest

from finetune.errors import MissingExtraError
from finetune.llamacpp import library as library_module
from finetune.llamacpp import quantize
from finetune.llamacpp.quantize import FORMATS, has_quantiser, quantise, require_quantiser
from tests.export.golden.make_quantised import GOLDEN, MODELS, digest, weights

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ERRORS = {
    "q4_0": 0.1, "q4_1": 0.09, "q5_0": 0.05, "q5_1": 0.045, "q8_0": 0.006, "q2_k": 0.33, "q3_k": 0.16, "q4_k": 0.08,
    "q5_k": 0.04, "q6_k": 0.02, "iq4_nl": 0.08, "iq4_xs": 0.08,
}  # fmt: skip
"""Relative error (root mean squares) of normally distributed weights: 1.05 to 1.3 × what was measured."""


@pytest.fixture
def fresh() -> Iterator[None]:
    """The library is looked for, and tested, again; before and after."""
    for cached in (quantize._load_and_test, library_module.library):
        cached.cache_clear()
    yield
    for cached in (quantize._load_and_test, library_module.library):
        cached.cache_clear()


def normal(rows: int, width: int) -> numpy.ndarray[Any, Any]:
    return numpy.random.RandomState(0).standard_normal((rows, width)).astype(numpy.float32)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="others may fuse multiplication and addition")
def test_the_bytes_are_those_of_llama_cpps_own_program() -> None:
    digests = json.loads(GOLDEN.read_text("utf-8"))["digests"]
    compared = set()
    for model in (model for model in MODELS.values() if model.tall):
        for name, shape in model.tensors().items():
            for kind, expected in digests.get(f"{model.width}/{name}", {}).items():
                if kind in FORMATS:
                    assert digest(quantise(weights(name, shape), kind).tobytes()) == expected, (name, kind)
                    compared.add(kind)
    assert compared == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_decoded_again_is_near_the_weights(name: str) -> None:
    from gguf.quants import dequantize

    rows = normal(32, 512)
    decoded = dequantize(quantise(rows, name), gguf.GGMLQuantizationType[name.upper()])
    error = numpy.sqrt(numpy.square(decoded - rows).mean() / numpy.square(rows).mean())
    assert 0.7 * ERRORS[name] < error < ERRORS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_may_be_quantised_in_any_groups_and_from_any_thread(name: str) -> None:
    rows = normal(64, 256)
    whole = quantise(rows, name)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: quantise(rows[start : start + 3], name), range(0, 64, 3)))
    assert numpy.array_equal(numpy.concatenate(parts), whole)


def test_the_sizes_are_those_of_the_gguf_package() -> None:
    for name, layout in FORMATS.items():
        kind = gguf.GGMLQuantizationType[name.upper()]
        assert (kind.value, *gguf.GGML_QUANT_SIZES[kind]) == (layout.number, layout.block, layout.size)


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (numpy.zeros((2, 256)), "q8_0"),
        (numpy.zeros((256, 2), numpy.float32).T, "q8_0"),
        (numpy.zeros((2, 48), numpy.float32), "q8_0"),
        (numpy.zeros((2, 288), numpy.float32), "q4_k"),
    ],
    ids=["float64", "transposed", "half a block", "a block too short"],
)
def test_what_would_be_read_as_something_else_never_reaches_c(rows: numpy.ndarray[Any, Any], name: str) -> None:
    with pytest.raises(AssertionError):
        quantise(rows, name)


# -- a library that is not the one we know ------------------------------------------------------------------------


def test_another_version_is_refused_by_name(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "_version", lambda: "2031.1.1")
    with pytest.raises(MissingExtraError, match=r"xllamacpp 2031\.1\.1 is installed") as caught:
        require_quantiser()
    assert caught.value.problems[0].hint == f'pip install "xllamacpp=={library_module.KNOWN_VERSIONS[-1]}"'
    assert not has_quantiser()


def test_a_missing_wheel_is_said_to_be_missing(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"llama\.cpp is not installed"):
        require_quantiser()


class Changed:
    """The library, but one function is another."""

    def __init__(self, **functions: Callable[..., Any] | None) -> None:
        self.functions = functions
        self.real = library_module.library()

    def __getattr__(self, name: str) -> Any:
        if name not in self.functions:
            return getattr(self.real, name)
        if self.functions[name] is None:
            raise AttributeError(name)
        return self.functions[name]


def _swapped(number: int, source: int, target: int, start: int, count: int, width: int, importance: None) -> int:
    """What a version would do that takes the weights per row first and writes nothing sensible."""
    ctypes.memset(target, 1, 64)
    return 64


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"ggml_quantize_chunk": None}, "no function of this name: ggml_quantize_chunk"),
        ({"ggml_quantize_chunk": _swapped}, "does not quantise to q4_0 as we know it"),
        ({"ggml_type_name": lambda number: b"q4_9"}, "stores q4_0 in another way"),
        ({"ggml_type_name": lambda number: None}, "stores q4_0 in another way"),
        ({"ggml_blck_size": lambda number: 64}, "stores q4_0 in another way"),
    ],
)
def test_a_library_that_does_something_else_is_refused(
    fresh: None, monkeypatch: pytest.MonkeyPatch, functions: dict[str, Any], message: str
) -> None:
    changed = Changed(**functions)
    monkeypatch.setattr(quantize, "library", lambda: changed)
    with pytest.raises(MissingExtraError, match=message):
        require_quantiser()


def test_other_rounding_is_not_another_format(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that rounds single weights otherwise has other digests; the error tells it from a wrong format."""
    others = {name: dataclasses.replace(layout, digest="?") for name, layout in FORMATS.items()}
    monkeypatch.setattr(quantize, "FORMATS", others)
    require_quantiser()
    monkeypatch.setattr(quantize, "FORMATS", others | {"q6_k": dataclasses.replace(others["q6_k"], error=0.01)})
    quantize._load_and_test.cache_clear()
    with pytest.raises(MissingExtraError, match="does not quantise to q6_k"):
        require_quantiser()
