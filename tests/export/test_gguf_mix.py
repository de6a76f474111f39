"""Which encoding each tensor gets, against what llama.cpp's own quantiser chose (golden/make_quantised.py says how)."""

from __future__ import annotations

import json
import random
from typing import Any, get_args

import pytest

from finetune.export.gguf.encode import Encoding, Quant
from finetune.export.gguf.mix import QUANTS, ModelShape, choose
from tests.export.golden.make_quantised import GOLDEN, MODELS, spell

LLAMA = ModelShape("llama", layers=2, heads=8, kv_heads=2, experts=0)


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(GOLDEN.read_text("utf-8"))["encodings"]


@pytest.mark.parametrize("title", MODELS)
def test_every_tensor_is_stored_as_llama_cpp_stores_it(title: str, golden: Any) -> None:
    model = MODELS[title]
    made = {quant: spell(choose(quant, model.tensors().items(), model.shape).encodings) for quant in QUANTS}
    assert made == golden[title]


def test_the_golden_tables_hold_every_quant_and_every_encoding(golden: Any) -> None:
    assert set(QUANTS) == set(get_args(Quant))
    assert {title: set(quants) for title, quants in golden.items()} == {title: set(QUANTS) for title in MODELS}
    model = MODELS["llama of 16 layers"]
    made = {kind for quant in QUANTS for kind in choose(quant, model.tensors().items(), model.shape).encodings.values()}
    assert made == set(get_args(Encoding))


@pytest.mark.parametrize("quant", ["q4_k_m", "q3_k_m", "q4_k_s"])
def test_the_order_in_which_tensors_are_named_does_not_matter(quant: Quant) -> None:
    model = MODELS["llama of 16 layers"]
    tensors = list(model.tensors().items())
    expected = choose(quant, tensors, model.shape).encodings
    random.Random(0).shuffle(tensors)
    shuffled = choose(quant, tensors, model.shape).encodings
    assert shuffled == expected
    assert list(shuffled) == [name for name, _ in tensors]


def test_vectors_stay_in_float32_and_leading_dimensions_of_one_do_not_make_a_matrix() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "blk.0.attn_norm.weight": (256,),
        "blk.0.ffn_gate_inp_shexp.weight": (1, 256),
        "blk.0.attn_q_norm.weight": (8, 256),
        "blk.0.ffn_gate_inp.weight": (8, 256),
        "blk.0.attn_q.bias": (2, 256),
        "rope_freqs.weight": (32,),
        "position_embd.weight": (64, 256),
        "blk.0.scalar.weight": (),
    }
    for quant in QUANTS:
        assert set(choose(quant, shapes.items(), LLAMA).encodings.values()) == {"f32"}


def test_what_does_not_fit_is_said() -> None:
    shapes = {"output.weight": (8, 288), "blk.0.attn_q.weight": (8, 288), "blk.1.attn_q.weight": (8, 172)}
    mix = choose("q4_k_m", shapes.items(), LLAMA)
    assert mix.encodings == {
        "output.weight": "q8_0",  # wanted so by llama.cpp, not a fallback
        "blk.0.attn_q.weight": "q5_0",
        "blk.1.attn_q.weight": "f16",
    }
    assert mix.counts() == {"q8_0": 1, "q5_0": 1, "f16": 1}
    assert mix.notes() == [
        "1 tensor is q5_0 rather than q4_k: its rows are no whole number of blocks",
        "1 tensor is f16 rather than q4_k: its rows are no whole number of blocks",
    ]
    assert choose("q4_0", [("blk.0.attn_q.weight", (8, 288))], LLAMA).notes() == []


def test_nothing_but_float32_is_ever_made_of_a_float32_file() -> None:
    model = MODELS["mixtral"]
    assert set(choose("f32", model.tensors().items(), model.shape).encodings.values()) == {"f32"}
