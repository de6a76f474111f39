"""Onto the weights that QLoRA training saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.config.schema import Config
from finetune.errors import BaseError
from finetune.export.lora import scaling
from finetune.export.merge import merge
from finetune.export.merged import BasePrecision
from finetune.export.nf4 import nf4_round_trip, quantised_modules
from finetune.export.source import read_config
from finetune.model.base import load_base
from finetune.model.hardware import detect

from .conftest import LlamaMaker, default_adapter, merged_bits, peft_allowed, save_adapter, unmerged_logits

SHAPES: dict[str, dict[str, Any]] = {
    "shared output layer": {"tie_word_embeddings": True},
    "own output layer": {"tie_word_embeddings": False},
    "conv1d": {"architecture": "GPT2", "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "experts": {"architecture": "Mixtral", "num_local_experts": 2, "num_hidden_layers": 1},
}


def _trained_on(base: Path) -> dict[str, torch.Tensor]:
    """Live name → the weight that training computes with, of each module that `ft train` quantises."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    config = Config.model_validate({"base": str(base), "data": [{"path": "x.jsonl"}], "quantization": "nf4"})
    model = load_base(config, base, detect()).model
    return {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


@pytest.mark.parametrize("kind", SHAPES)
def test_the_merged_weights_are_those_of_training_plus_the_adapter(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, kind: str
) -> None:
    base = make_llama(**SHAPES[kind])
    seen = _trained_on(base)
    assert seen
    assert set(seen) == quantised_modules(read_config(base))
    target = "c_attn" if kind == "conv1d" else "q_proj"
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=[target])
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None, base_precision="nf4")
    merged, stored = merged_bits(tmp_path / "merged"), merged_bits(base)
    lora = merged_bits(adapter)
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        wanted = seen.get(module, stored[name])
        if f"base_model.model.{module}.lora_A.weight" in lora:
            a, b = (lora[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
            change = (b @ a) * scaling(8, 4, rank_stabilised=False)
            wanted = wanted + change
        if kind == "conv1d" and module in seen:
            wanted = wanted.T
        assert torch.equal(tensor, wanted), name
    assert any(not torch.equal(merged[f"{module}.weight"], stored[f"{module}.weight"]) for module in seen)


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"architecture": "Mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen 3": {
        "architecture": "Qwen3Moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "head_dim": 16, "mlp_only_layers": [0],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_trained_as_they_are_stored_and_what_is_around_them_in_4_bit(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, family: str
) -> None:
    """On disk each expert is three linear layers, in memory all of them are two stacks, which bitsandbytes leaves."""
    base = make_llama(tie_word_embeddings=False, **EXPERTS[family])
    config = Config.model_validate({"base": str(base), "data": [{"path": "x.jsonl"}], "quantization": "nf4"})
    live = load_base(config, base, detect()).model
    kinds = {name.rpartition(".")[2]: parameter.dtype for name, parameter in live.named_parameters()}
    assert (kinds["gate_up_proj"], kinds["down_proj"]) == (torch.float32, torch.float32)
    assert set(_trained_on(base)) == quantised_modules(read_config(base))
    assert not any("experts" in name for name in quantised_modules(read_config(base)))

    adapter = default_adapter(base, tmp_path / "adapter", quantization="nf4")
    merged: dict[BasePrecision, torch.Tensor] = {}
    onto: BasePrecision
    for onto in ("nf4", "stored"):
        merge(base, adapter, tmp_path / onto, tokenizer=stories, dtype="float32", base_precision=onto)
        merged[onto] = unmerged_logits(tmp_path / onto, None)
    ids = torch.arange(24).unsqueeze(0) * 3 % 96
    with peft_allowed(), torch.no_grad():
        trained = PeftModel.from_pretrained(live, adapter).eval()(ids).logits
    # The same weights, and sums of 64 to 96 products in another order: logits of about 10, 24 bits.
    assert (merged["nf4"] - trained).abs().max() < 1e-3
    assert (merged["stored"] - trained).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_round_trip_leaves_its_argument_and_is_near_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 200).to(dtype)
    before = weight.clone()
    restored = nf4_round_trip(weight)
    assert torch.equal(weight, before)
    assert (restored.dtype, restored.shape) == (dtype, weight.shape)
    # Blocks of 64 values reach about 2.4 to 3.5; NF4's levels are at most 0.3 of that apart, an error is half of it.
    assert 0 < (restored.float() - weight.float()).abs().max() < 0.7


def test_a_family_that_transformers_does_not_know_is_refused() -> None:
    with pytest.raises(BaseError, match="model_type"):
        quantised_modules({"model_type": "of the future"})
