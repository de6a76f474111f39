"""The bytes of GGUF tensors: ours in torch, ggml's, and how pieces of tensors pass through the threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import ExportError, MissingExtraError
from finetune.export.gguf import encode as encode_module
from finetune.export.gguf.encode import (
    PIECE_WEIGHTS,
    Encoding,
    Piece,
    cut,
    encode,
    encode_all,
    nbytes,
    quantise_q4_0,
    quantise_q8_0,
    require_encoders,
)
from finetune.export.gguf.rope import interleave_halves, llama3_factors
from finetune.llamacpp.quantize import FORMATS, quantise

gguf = pytest.importorskip("gguf")


def piece(rows: torch.Tensor, encoding: Encoding, tensor: str = "blk.0.attn_q.weight") -> Piece:
    return Piece(tensor, rows, encoding, first=True, place="model")


@pytest.fixture
def without_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has no `xllamacpp`."""

    def missing() -> None:
        raise MissingExtraError("llama.cpp is not installed")

    monkeypatch.setattr(encode_module, "has_quantiser", lambda: False)
    monkeypatch.setattr(encode_module, "require_quantiser", missing)


def awkward(seed: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Normal values with what rounding goes wrong on: zeros of either sign, exact halves, equals of either sign, and
    numbers too small for a float16 scale."""
    torch.manual_seed(seed)
    tensor = (torch.randn(9, 96) * scale).to(dtype)
    tensor[0] = 0
    tensor[1, ::3] = torch.randint(-4, 5, (32,)).to(dtype) / 2
    tensor[2] = torch.randint(-2, 3, (96,)).to(dtype)
    tensor[3, ::2] = -0.0
    tensor[4] = torch.randn(96).to(dtype) * 1e-30
    tensor[5, :32] = -0.0
    return tensor


CASES = {
    "seed": st.integers(0, 2**20),
    "scale": st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
}


@settings(max_examples=60, deadline=None)
@given(**CASES, encoding=st.sampled_from(["f32", "f16", "bf16", "q8_0"]))
def test_the_bytes_are_those_of_the_gguf_package(
    seed: int, scale: float, dtype: torch.dtype, encoding: Encoding
) -> None:
    from gguf.quants import quantize

    tensor = awkward(seed, scale, dtype)
    expected = quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[encoding.upper()]).tobytes()
    assert bytes(encode(piece(tensor, encoding))) == expected
    assert len(expected) == nbytes((9, 96), encoding)


@settings(max_examples=80, deadline=None)
@given(**CASES)
def test_our_own_quantisers_make_the_bytes_that_ggml_makes(seed: int, scale: float, dtype: torch.dtype) -> None:
    pytest.importorskip("xllamacpp")
    tensor = awkward(seed, scale, dtype)
    rows = tensor.float().numpy()
    assert quantise_q8_0(tensor).numpy().tobytes() == quantise(rows, "q8_0").tobytes()
    assert quantise_q4_0(tensor).numpy().tobytes() == quantise(rows, "q4_0").tobytes()


@pytest.mark.parametrize("encoding", ["q8_0", "q4_0"])
def test_two_formats_need_no_ggml(encoding: Encoding, without_ggml: None) -> None:
    tensor = awkward(0, 1.0, torch.float32)
    require_encoders({encoding, "f16", "f32", "bf16"})
    ours = quantise_q8_0(tensor) if encoding == "q8_0" else quantise_q4_0(tensor)
    assert bytes(encode(piece(tensor, encoding))) == ours.numpy().tobytes()


def test_the_others_say_that_they_need_it(without_ggml: None) -> None:
    for encoding in FORMATS.keys() - {"q8_0", "q4_0"}:
        with pytest.raises(MissingExtraError, match="not installed"):
            require_encoders({"f32", encoding})  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", FORMATS)
def test_ggmls_formats_come_from_ggml_whatever_the_dtype(encoding: Encoding) -> None:
    pytest.importorskip("xllamacpp")
    tensor = (torch.randn(2, 3, 256) * 0.1).to(torch.bfloat16)
    expected = quantise(tensor.float().numpy().reshape(6, 256), encoding).tobytes()
    assert bytes(encode(piece(tensor, encoding))) == expected
    assert bytes(encode(piece(tensor.transpose(0, 1).transpose(0, 1), encoding))) == expected
    assert len(expected) == nbytes((2, 3, 256), encoding)


def test_halves_are_rounded_away_from_zero_in_eight_bits() -> None:
    row = torch.zeros(32)
    row[:6] = torch.tensor([127.0, 0.5, -0.5, 1.5, -2.5, 0.49999997])
    assert quantise_q8_0(row)[0].view(torch.int8)[2:8].tolist() == [127, 1, -1, 2, -3, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 65520.0, -1e30])
@pytest.mark.parametrize("encoding", ["f16", *FORMATS])
def test_what_an_encoding_cannot_hold_is_refused_by_name(encoding: Encoding, bad: float) -> None:
    rows = torch.zeros(4, 256)
    rows[3, 77] = bad
    with pytest.raises(ExportError, match=f"`blk.0.attn_q.weight` has values that {encoding} cannot hold") as caught:
        encode(piece(rows, encoding))
    assert caught.value.problems[0].place == "model"


@pytest.mark.parametrize("encoding", ["f32", "bf16"])
def test_wide_encodings_hold_all_but_what_is_no_number(encoding: Encoding) -> None:
    assert encode(piece(torch.full((2, 2), 1e30), encoding))
    with pytest.raises(ExportError, match="cannot hold"):
        encode(piece(torch.full((2, 2), float("inf")), encoding))


@pytest.mark.parametrize("encoding", FORMATS)
def test_the_largest_values_that_are_let_through_have_finite_scales(encoding: Encoding) -> None:
    pytest.importorskip("xllamacpp")
    from gguf.quants import dequantize

    torch.manual_seed(0)
    rows = torch.randn(16, 256).sign() * 65504
    rows[8:] *= torch.rand(8, 256)
    rows[4:8] = rows[4:8].abs()
    data = torch.frombuffer(bytearray(encode(piece(rows, encoding))), dtype=torch.uint8)
    decoded = torch.from_numpy(dequantize(data.numpy(), gguf.GGMLQuantizationType[encoding.upper()]))
    assert bool(decoded.isfinite().all())
    assert float((decoded.reshape(16, 256) - rows).abs().max()) < 65504


@pytest.mark.parametrize("encoding", FORMATS)
def test_the_smallest_values_have_finite_scales(encoding: Encoding) -> None:
    """One divided by a scale of 1e-42 is infinite in float32."""
    pytest.importorskip("xllamacpp")
    from gguf.quants import dequantize

    torch.manual_seed(0)
    rows = torch.randn(16, 256) * torch.logspace(-45, -4, 16).unsqueeze(1)
    data = torch.frombuffer(bytearray(encode(piece(rows, encoding))), dtype=torch.uint8)
    decoded = torch.from_numpy(dequantize(data.numpy(), gguf.GGMLQuantizationType[encoding.upper()]))
    assert bool(decoded.isfinite().all())
    assert float(decoded.abs().max()) < 1e-3


def test_what_rounding_to_bf16_would_make_infinite_is_refused() -> None:
    """float32 ends a little beyond bf16."""
    beyond = torch.full((2, 2), torch.finfo(torch.float32).max)
    assert encode(piece(beyond, "f32"))
    with pytest.raises(ExportError, match="cannot hold"):
        encode(piece(beyond, "bf16"))
    assert encode(piece(torch.full((2, 2), torch.finfo(torch.bfloat16).max), "bf16"))


# -- pieces and threads -------------------------------------------------------------------------------------------


def test_tensors_are_cut_into_whole_rows() -> None:
    chunks = [torch.arange(2 * 3 * 7.0).reshape(2, 3, 7), torch.ones(1, 3, 7)]
    pieces = list(cut("t", iter(chunks), "f32", "model"))
    assert [p.first for p in pieces] == [True, False]
    assert torch.equal(torch.cat([p.rows for p in pieces]), torch.cat(chunks).reshape(9, 7))
    wide = list(cut("t", iter([torch.zeros(5, PIECE_WEIGHTS // 2)]), "f32", "model"))
    assert [len(p.rows) for p in wide] == [2, 2, 1]
    very_wide = list(cut("t", iter([torch.zeros(2, PIECE_WEIGHTS + 1)]), "f32", "model"))
    assert [len(p.rows) for p in very_wide] == [1, 1]
    assert [p.rows.shape for p in cut("t", iter([torch.tensor(3.0)]), "f32", "model")] == [(1, 1)]


def test_bytes_come_in_order_however_long_each_piece_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(one: Piece) -> memoryview:
        time.sleep(0.02 if float(one.rows[0, 0]) % 3 == 0 else 0)
        return memoryview(bytes([int(one.rows[0, 0])]))

    monkeypatch.setattr(encode_module, "encode", slow)
    pieces = [piece(torch.full((1, 32), float(i)), "f32") for i in range(40)]
    made = list(encode_all(iter(pieces)))
    assert b"".join(data for _, data in made) == bytes(range(40))
    assert [p for p, _ in made] == pieces


def test_only_so_much_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the model: pieces are not asked for before there is room for them."""
    monkeypatch.setattr(encode_module, "_AHEAD_WEIGHTS", 1000)
    gate, asked = threading.Event(), []

    def stuck(one: Piece) -> memoryview:
        gate.wait(10)
        return memoryview(b"")

    def pieces() -> Iterator[Piece]:
        for i in range(50):
            asked.append(i)
            if i == 12:
                gate.set()  # the pieces asked for until now have been waiting
            yield piece(torch.zeros(1, 100), "f32")

    monkeypatch.setattr(encode_module, "encode", stuck)
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    results = encode_all(pieces())
    next(results)
    assert len(asked) == 11  # one more than there is room for
    results.close()  # type: ignore[attr-defined]
    opener.join()


@pytest.mark.parametrize("where", ["reading", "encoding"])
def test_an_error_ends_it_and_leaves_no_thread_behind(where: str) -> None:
    def pieces() -> Iterator[Piece]:
        yield piece(torch.zeros(4, 32), "q8_0")
        if where == "reading":
            raise ExportError("cannot be read")
        for _ in range(100):
            yield piece(torch.full((4, 32), float("nan")), "q8_0")

    with pytest.raises(ExportError, match="cannot be read" if where == "reading" else "cannot hold"):
        list(encode_all(pieces()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encode")]


# -- positions ----------------------------------------------------------------------------------------------------


def test_rotating_halves_becomes_rotating_neighbours() -> None:
    """Both ways of pairing dimensions give the same scores: q·k does not change under a common permutation."""
    heads, dim = 2, 8
    rows = torch.arange(heads * dim)
    assert interleave_halves(rows, heads).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    weight = torch.randn(heads * dim, 5)
    assert torch.equal(interleave_halves(weight, heads), weight[interleave_halves(rows, heads)])


@pytest.mark.parametrize("dim", [8, 64, 128])
def test_llama3_factors_divide_the_frequencies_as_transformers_does(dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=dim, rope_parameters=rope)
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / (500000.0 ** (torch.arange(0, dim, 2).float() / dim))
    assert attention_factor == 1.0
    torch.testing.assert_close(plain / llama3_factors(rope, dim), expected, rtol=1e-6, atol=0)
