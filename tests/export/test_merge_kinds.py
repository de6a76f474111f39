"""Every kind of thing an adapter can hold, against what PEFT itself makes of it: the same bits, or the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError
from finetune.export.merge import merge

from .conftest import (
    LlamaMaker,
    assert_same_bits,
    merged_bits,
    peft_merged,
    save_adapter,
    train_adapter,
    unmerged_logits,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]

DTYPES: dict[Any, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "copies of modules": ({}, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "a copy of a whole block": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "biases of adapted layers": ({"attention_bias": True, "mlp_bias": True}, {"bias": "lora_only"}),
    "all biases": ({"attention_bias": True}, {"bias": "all", "target_modules": ["q_proj"]}),
    "the LoRA's own bias": ({"attention_bias": True}, {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
    "an embedding": ({}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "an embedding alone": ({}, {"target_modules": ["embed_tokens"]}),
    "an embedding with DoRA": ({}, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "embedding and output layer": ({}, {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "trained tokens": ({}, {"trainable_token_indices": [3, 90, 5]}),
    "trained tokens at both ends": ({}, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [7, 1]}}),
    "trained tokens of a shared weight": ({"tie_word_embeddings": True}, {"trainable_token_indices": [3, 5]}),
    "a copy of one end of a shared weight": ({"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    "a copy of the other end": ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_adapter_holds_is_merged_as_peft_merges_it(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, kind: str
) -> None:
    """In bfloat16, where every rounding shows."""
    shape, lora = KINDS[kind]
    base = make_llama(**({"tie_word_embeddings": False} | shape))
    adapter = train_adapter(base, tmp_path / "adapter", **lora)
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype="bfloat16")
    assert_same_bits(tmp_path / "merged", peft_merged(base, adapter, torch.bfloat16))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_conv1d_beside_a_linear_output_layer(make_llama: LlamaMaker, stories: Path, tmp_path: Path, dora: bool) -> None:
    """c_proj's weight is square: its shape does not tell which way round it lies, nor does the saved setting."""
    base = make_llama(
        architecture="GPT2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, tie_word_embeddings=False
    )
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=["c_proj", "lm_head", "c_attn"], use_dora=dora)
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    assert_same_bits(tmp_path / "merged", peft_merged(base, adapter, torch.float32))


@pytest.mark.parametrize(
    "targets",
    [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]],
    ids=["in", "out", "both"],
)
@pytest.mark.parametrize("tying", [False, True], ids=["", "ensure_weight_tying"])
def test_a_lora_on_a_shared_weight_unties_it(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, targets: list[str], tying: bool
) -> None:
    """Against the adapter itself, not merged: PEFT's own merge is wrong here, by 0.5 to 3 in the logits."""
    base = make_llama(tie_word_embeddings=True)
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=targets, ensure_weight_tying=tying)
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    merged = merged_bits(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(merged)
    wanted = unmerged_logits(base, adapter)
    # Two ways of adding up 64 float32 products: logits of about 10, 24 bits.
    assert (unmerged_logits(tmp_path / "merged", None) - wanted).abs().max() < 1e-4
    assert (unmerged_logits(base, None) - wanted).abs().max() > 0.1


@pytest.mark.parametrize(
    "lora", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [3, 5]}], ids=["lora", "tokens"]
)
def test_a_shared_weight_that_lies_on_disk_twice(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    base = make_llama(tie_word_embeddings=True)
    tensors = merged_bits(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = train_adapter(base, tmp_path / "adapter", **lora)
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    # As above.
    assert (unmerged_logits(tmp_path / "merged", None) - unmerged_logits(base, adapter)).abs().max() < 1e-4


# -- experts ------------------------------------------------------------------------------------------------------

MIXTRAL = {"architecture": "Mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
QWEN3 = {
    "architecture": "Qwen3Moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16,
}  # fmt: skip
QWEN2 = {
    "architecture": "Qwen2Moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1,
}  # fmt: skip
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": (MIXTRAL, {"target_parameters": BOTH}),
    "mixtral, one of the two": (MIXTRAL, {"target_parameters": BOTH[1:]}),
    "qwen 3": (QWEN3, {"target_parameters": BOTH, "alpha_pattern": {"experts.down_proj": 32}}),
    "qwen 3, rsLoRA, ranks": (QWEN3, {"target_parameters": BOTH, "rank_pattern": {"down_proj": 2}, "use_rslora": True}),
    "qwen 2 with its router": (QWEN2, {"target_parameters": [BOTH[0], "mlp.gate.weight"]}),
    "gpt-oss, stacked on disk": (
        {"architecture": "GptOss", "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16},
        {"target_parameters": BOTH, "target_modules": ["q_proj"]},
    ),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts(make_llama: LlamaMaker, stories: Path, tmp_path: Path, kind: str) -> None:
    shape, lora = EXPERTS[kind]
    base = make_llama(tie_word_embeddings=False, **shape)
    adapter = train_adapter(base, tmp_path / "adapter", **({"target_modules": ["q_proj"]} | lora))
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype="bfloat16")
    assert_same_bits(tmp_path / "merged", peft_merged(base, adapter, torch.bfloat16, as_saved=tmp_path / "peft"))


def test_experts_that_fit_nothing_are_refused(make_llama: LlamaMaker, stories: Path, tmp_path: Path) -> None:
    base = make_llama(tie_word_embeddings=False, **MIXTRAL)
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=BOTH)
    other = make_llama("other", tie_word_embeddings=False, **(MIXTRAL | {"intermediate_size": 80}))
    with pytest.raises(ExportError, match=r"mlp\.experts.*fits none of"):
        merge(other, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    assert not list(tmp_path.glob("merged*"))


def test_per_expert_adapters_of_before_find_their_tensors(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path
) -> None:
    """Trained when experts were modules of their own: the names are those on disk. Against the layer's formula."""
    base = make_llama(tie_word_embeddings=False, **MIXTRAL)
    name = "model.layers.0.block_sparse_moe.experts.1.w3"
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    a, b = torch.randn(4, 64), torch.randn(96, 4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, adapter / "adapter_model.safetensors")
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    before = load_file(base / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(merged_bits(tmp_path / "merged")[f"{name}.weight"], before + (b @ a) * 2.0)


# -- several adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_adapters_are_merged_one_after_the_other(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, dtype: Any
) -> None:
    base = make_llama(tie_word_embeddings=False)
    first = train_adapter(base, tmp_path / "first", seed=1)
    second = train_adapter(base, tmp_path / "second", seed=2, r=2, target_modules=["q_proj", "down_proj", "lm_head"])
    merge(base, [first, second], tmp_path / "merged", tokenizer=stories, dtype=dtype)
    merge(base, [second, first], tmp_path / "other", tokenizer=stories, dtype=dtype)
    assert_same_bits(tmp_path / "merged", peft_merged(base, first, DTYPES[dtype], then=second))
    if dtype == "bfloat16":
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(merged_bits(tmp_path / "merged")[name], merged_bits(tmp_path / "other")[name])


def test_a_dora_after_another_adapter_takes_its_norm_of_the_base(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path
) -> None:
    """PEFT unmerges and merges again to get at the base, which rounds: 24 bits, values of about 1."""
    base = make_llama(tie_word_embeddings=False)
    first = train_adapter(base, tmp_path / "first", seed=1)
    second = train_adapter(base, tmp_path / "second", seed=2, use_dora=True)
    merge(base, [first, second], tmp_path / "merged", tokenizer=stories, dtype="float32")
    merged = merged_bits(tmp_path / "merged")
    for name, tensor in peft_merged(base, first, torch.float32, then=second).items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_two_adapters_that_trained_the_same_thing_in_full_are_refused(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path
) -> None:
    base = make_llama(tie_word_embeddings=False)
    first = train_adapter(base, tmp_path / "first", modules_to_save=["norm"], trainable_token_indices=[1, 2])
    second = train_adapter(base, tmp_path / "second", seed=2, trainable_token_indices=[2, 3])
    third = train_adapter(base, tmp_path / "third", seed=3, modules_to_save=["norm"])
    with pytest.raises(ExportError, match="tokens that another adapter has trained"):
        merge(base, [first, second], tmp_path / "merged", tokenizer=stories, dtype=None)
    with pytest.raises(ExportError, match="in full, and another adapter has changed it"):
        merge(base, [first, third], tmp_path / "merged", tokenizer=stories, dtype=None)
    assert not list(tmp_path.glob("merged*"))


# -- names --------------------------------------------------------------------------------------------------------


def test_names_that_differ_between_memory_and_disk(make_llama: LlamaMaker, stories: Path, tmp_path: Path) -> None:
    """GPT-NeoX's `lm_head` is `embed_out` on disk."""
    base = make_llama(architecture="GPTNeoX", tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["query_key_value", "lm_head"])
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    expected = peft_merged(base, adapter, torch.float32)
    expected["embed_out.weight"] = expected.pop("lm_head.weight")
    assert_same_bits(tmp_path / "merged", expected)
