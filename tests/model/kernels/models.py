"""Small random models of real families with a LoRA on them, and rows to train them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from finetune.data.store import TokenRow
from finetune.train.batches import Collator

VOCABULARY = 211

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.02}

WINDOW = 7
"""Shorter than most rows of these tests."""

OWN_ATTENTION = ("gemma2", "falcon", "gpt_oss")
"""Families that varlen attention is not for."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW, "use_bias": True},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7},
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {},
    "falcon": {"head_dim": None, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mixtral": {"num_local_experts": 4, "sliding_window": WINDOW, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1, **EXPERTS},
    "gpt_oss": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "num_local_experts": 4,
        "sliding_window": WINDOW,
        **EXPERTS,
    },
}


def base(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights, the same every time, large enough to prefer some tokens to others."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**SMALL, "initializer_range": 0.2, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **{name: value for name, value in settings.items() if value is not None})
    implementation = "sdpa" if AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa else "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    return model.requires_grad_(False)


def adapted(model: Any, **lora: Any) -> Any:
    """With a LoRA on all linear layers that already does something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).train()


def row(length: int, seed: int, prompt: int | None = None) -> TokenRow:
    """Random tokens, of which those after the prompt (by default a third) carry loss."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, size=length).astype(np.int32)
    return TokenRow(ids, np.arange(length) >= (length // 3 if prompt is None else prompt), "here")


def batch(sequences: Sequence[Sequence[int]], end_to_end: bool) -> dict[str, Any]:
    """What the collator makes of sequences of rows with so many tokens each."""
    lengths = [length for sequence in sequences for length in sequence]
    rows = [row(length, seed) for seed, length in enumerate(lengths)]
    numbers = iter(range(len(rows)))
    examples = [{"rows": [next(numbers) for _ in sequence]} for sequence in sequences]
    made = Collator(rows.__getitem__, 0, "line" if end_to_end else "padded")(examples)
    made.pop("rows")
    return made


def plain_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What everybody computes: all logits, in float32 (or better), and torch's cross entropy."""
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    labels = inputs["labels"][:, 1:].reshape(-1)
    logits = outputs.logits[:, :-1].reshape(len(labels), -1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum()
    config = model.config
    if getattr(config, "output_router_logits", False):
        loss = loss + config.router_aux_loss_coef * outputs.aux_loss
    return loss


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every trained parameter, by name."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def distance(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The greatest difference of two sets of gradients, each parameter's relative to its own greatest entry."""
    assert mine.keys() == other.keys()
    assert mine
    return max(
        float((mine[name].double() - grad.double()).abs().max() / grad.double().abs().max().clamp(min=1e-30))
        for name, grad in other.items()
    )
