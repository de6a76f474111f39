"""Shapes against what transformers builds, what bitsandbytes quantises and what PEFT adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import BaseError, ConfigError
from finetune.model.families import quantisable_class
from finetune.plan.memory import adapter_parameters, parameters
from finetune.plan.shape import FAMILIES, shape_of

SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 112, "num_key_value_heads": 2}
VARIANTS: list[dict[str, Any]] = [
    {"model_type": "llama", **LLAMA},
    {"model_type": "llama", **LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"model_type": "llama", **LLAMA, "head_dim": 32, "num_key_value_heads": None},
    {"model_type": "mistral", **LLAMA},
    {"model_type": "mixtral", **LLAMA, "num_local_experts": 3},
    {"model_type": "qwen2", **LLAMA},
    {"model_type": "qwen3", **LLAMA, "head_dim": 32, "attention_bias": True},
    {"model_type": "qwen3_moe", **LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    {"model_type": "gemma", **LLAMA, "head_dim": 32},
    {"model_type": "gemma2", **LLAMA, "head_dim": 32},
    {"model_type": "gemma3_text", **LLAMA, "head_dim": 32},
    {"model_type": "phi3", **LLAMA, "pad_token_id": 0},
    {"model_type": "olmo2", **LLAMA},
    {"model_type": "granite", **LLAMA, "mlp_bias": True},
    {"model_type": "smollm3", **LLAMA, "tie_word_embeddings": False, "pad_token_id": 0},
    {"model_type": "gpt_neox", **SMALL, "intermediate_size": 112},
    {"model_type": "gpt_neox", **SMALL, "intermediate_size": 112, "attention_bias": False},
    {"model_type": "falcon", **SMALL},
    {"model_type": "falcon", **SMALL, "bias": True, "multi_query": False, "parallel_attn": False},
    {"model_type": "falcon", **SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    {"model_type": "falcon", **SMALL, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    {"model_type": "falcon", **SMALL, "ffn_hidden_size": 100, "tie_word_embeddings": False},
]
OF_PUBLISHED_SIZE = [{"model_type": name} for name in sorted(FAMILIES)]
"""With no key but the type: what transformers takes by default is a published size of every family."""


def build(facts: dict[str, Any]) -> Any:
    """The model without memory for its weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[facts["model_type"]](**{key: value for key, value in facts.items() if key != "model_type"})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def counted(model: Any) -> dict[str, int]:
    """Parameters by part, each parameter once."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    found = {"embedding": embedding.numel(), "head": 0 if head is embedding else head.numel(), "linear": 0, "other": 0}
    for parameter in model.parameters():
        if parameter is not embedding and parameter is not head:
            found["linear" if parameter.dim() > 1 else "other"] += parameter.numel()
    return found


@pytest.mark.parametrize("facts", VARIANTS + OF_PUBLISHED_SIZE, ids=lambda facts: facts["model_type"])
def test_parameters_are_those_of_the_model_part_by_part(facts: dict[str, Any]) -> None:
    shape, model = shape_of(facts, "config.json"), build(facts)
    parts = counted(model)
    assert parts["linear"] == shape.layers * sum(linear.parameters for linear in shape.linears)
    assert parts["embedding"] == shape.vocabulary * shape.hidden
    assert parts["head"] == (0 if shape.tied else shape.vocabulary * shape.hidden)
    assert parts["other"] == shape.layers * shape.vectors + shape.outside
    assert sum(parts.values()) == parameters(shape)
    assert shape.context == model.config.max_position_embeddings


@pytest.mark.parametrize("facts", VARIANTS, ids=lambda facts: facts["model_type"])
def test_adapters_are_those_that_peft_makes(facts: dict[str, Any]) -> None:
    import peft

    shape = shape_of(facts, "config.json")
    names = {linear.name for linear in shape.linears}
    some = ("q_proj", "v_proj") if "q_proj" in names else tuple(sorted(names))[:2]
    for targets in ("all-linear", some):
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=targets if isinstance(targets, str) else list(targets)
        )
        model = peft.get_peft_model(build(facts), lora)
        made = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert made == adapter_parameters(shape, 4, targets)


@pytest.mark.parametrize("names", [("w1", "w2", "w3"), ("gate", "q_proj")])
def test_experts_are_adapted_by_the_names_that_peft_takes(names: tuple[str, ...]) -> None:
    import peft

    facts = next(facts for facts in VARIANTS if facts["model_type"] == "mixtral")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(names))
    model = peft.get_peft_model(build(facts), lora)
    made = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert made == adapter_parameters(shape_of(facts, "x"), 4, names)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "falcon", "gpt_neox", "phi3"])
def test_quantised_layers_are_those_that_bitsandbytes_holds(kind: str, tmp_path: Path) -> None:
    """Stacked experts stay in 16 bit: seen here, not believed. (Falcon's own linear class would too.)"""
    from bitsandbytes.nn import Linear4bit
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

    facts = next(facts for facts in VARIANTS if facts["model_type"] == kind)
    config = CONFIG_MAPPING[kind](**{key: value for key, value in facts.items() if key != "model_type"})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = quantisable_class(config).from_pretrained(tmp_path, quantization_config=nf4, device_map={"": "cpu"})
    held = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert held == {linear.name for linear in shape_of(facts, "x").linears if linear.quantized}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": [64]}, "hidden_size"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"head_dim": -1}, "head_dim"),
    ],
)
def test_a_hostile_config_is_refused_by_the_key(change: dict[str, object], named: str) -> None:
    with pytest.raises(BaseError, match=named) as raised:
        shape_of({"model_type": "llama", **LLAMA, **change}, "models/x/config.json")
    assert raised.value.problems[0].place == "models/x/config.json"


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"model_type": "falcon", "num_attention_heads": 72}, "num_attention_heads"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 70}, "num_kv_heads"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window"),
    ],
)
def test_what_nobody_can_build_is_refused_by_the_key(facts: dict[str, object], named: str) -> None:
    with pytest.raises(BaseError, match=named):
        shape_of(facts, "config.json")


@pytest.mark.parametrize("model_type", ["rwkv", "", None, 7, ["llama"], "x" * 10_000])
def test_an_unknown_type_says_which_are_known(model_type: object) -> None:
    with pytest.raises(BaseError, match="does not know the model type") as raised:
        shape_of({"model_type": model_type}, "config.json")
    assert "qwen2" in str(raised.value.problems[0].hint)
    assert len(raised.value.problems[0].message) < 200


def test_a_window_is_one_that_every_layer_has() -> None:
    assert shape_of({"model_type": "mistral"}, "x").window == 4096  # as the first Mistral 7B
    assert shape_of({"model_type": "mistral", "sliding_window": None}, "x").window is None
    assert shape_of({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, "x").window is None
    assert shape_of({"model_type": "gemma2", "sliding_window": 4096}, "x").window is None


def test_a_target_that_is_no_layer_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no layer named qkv_proj"):
        adapter_parameters(shape_of({"model_type": "llama"}, "x"), 8, ("qkv_proj",))
