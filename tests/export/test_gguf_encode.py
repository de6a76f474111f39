"""The bytes of GGUF tensors, against the reference implementation in the `gguf` package."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.export.gguf.encode import Quant, choose, encode, nbytes
from finetune.export.gguf.rope import interleave_halves, llama3_factors

gguf = pytest.importorskip("gguf")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    quant=st.sampled_from(["f32", "f16", "bf16", "q8_0"]),
)
def test_the_bytes_are_those_of_the_reference(seed: int, scale: float, dtype: torch.dtype, quant: Quant) -> None:
    from gguf.quants import quantize

    torch.manual_seed(seed)
    tensor = (torch.randn(7, 96) * scale).to(dtype)
    tensor[0] = 0
    tensor[1, ::3] = torch.randint(-4, 5, (32,)) / 2  # exact halves
    expected = quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[quant.upper()]).tobytes()
    assert bytes(encode(tensor, quant)) == expected
    assert len(expected) == nbytes((7, 96), quant)


def test_halves_are_rounded_away_from_zero_in_eight_bits() -> None:
    row = torch.zeros(32)
    row[:6] = torch.tensor([127.0, 0.5, -0.5, 1.5, -2.5, 0.49999997])
    encoded = torch.frombuffer(bytearray(encode(row, "q8_0")), dtype=torch.int8)
    assert encoded[2:8].tolist() == [127, 1, -1, 2, -3, 0]


def test_vectors_and_rows_that_cannot_be_cut_are_not_quantised() -> None:
    assert choose((64,), "q8_0") == "f32"
    assert choose((64,), "f16") == "f32"
    assert choose((64, 172), "q8_0") == "f16"
    assert choose((172, 64), "q8_0") == "q8_0"
    assert choose((172, 64), "bf16") == "bf16"


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
