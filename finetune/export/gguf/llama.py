"""The Llama family: Llama 1 to 3.3, TinyLlama, SmolLM, DeepSeek-R1-Distill-Llama and others of its shape, and Mistral.

llama.cpp's architecture `llama`; keys as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.export.gguf.family import Config, Family, Metadata, Rule
from finetune.export.gguf.rope import (
    context_length,
    interleave_halves,
    llama3_factors,
    scaling_keys,
    scaling_problems,
)

if TYPE_CHECKING:
    import torch


def _reorder_queries(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return interleave_halves(weight, config.num_attention_heads)


def _reorder_keys(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return interleave_halves(weight, config.num_key_value_heads)


def _attention_bias(config: Config) -> bool:
    return bool(getattr(config, "attention_bias", False))


def _mlp_bias(config: Config) -> bool:
    return bool(getattr(config, "mlp_bias", False))


def own_output(config: Config) -> bool:
    """Whether the output head has weights of its own, apart from the embedding's."""
    return not config.tie_word_embeddings


_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."

RULES = (
    Rule("model.embed_tokens.weight", "token_embd.weight"),
    Rule("model.norm.weight", "output_norm.weight"),
    Rule("lm_head.weight", "output.weight", when=own_output),
    Rule(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}attn_norm.weight"),
    Rule(f"{_LAYER}self_attn.q_proj.weight", f"{_BLOCK}attn_q.weight", _reorder_queries),
    Rule(f"{_LAYER}self_attn.k_proj.weight", f"{_BLOCK}attn_k.weight", _reorder_keys),
    Rule(f"{_LAYER}self_attn.v_proj.weight", f"{_BLOCK}attn_v.weight"),
    Rule(f"{_LAYER}self_attn.o_proj.weight", f"{_BLOCK}attn_output.weight"),
    Rule(f"{_LAYER}self_attn.q_proj.bias", f"{_BLOCK}attn_q.bias", _reorder_queries, _attention_bias),
    Rule(f"{_LAYER}self_attn.k_proj.bias", f"{_BLOCK}attn_k.bias", _reorder_keys, _attention_bias),
    Rule(f"{_LAYER}self_attn.v_proj.bias", f"{_BLOCK}attn_v.bias", when=_attention_bias),
    Rule(f"{_LAYER}self_attn.o_proj.bias", f"{_BLOCK}attn_output.bias", when=_attention_bias),
    Rule(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}ffn_norm.weight"),
    Rule(f"{_LAYER}mlp.gate_proj.weight", f"{_BLOCK}ffn_gate.weight"),
    Rule(f"{_LAYER}mlp.up_proj.weight", f"{_BLOCK}ffn_up.weight"),
    Rule(f"{_LAYER}mlp.down_proj.weight", f"{_BLOCK}ffn_down.weight"),
    Rule(f"{_LAYER}mlp.gate_proj.bias", f"{_BLOCK}ffn_gate.bias", when=_mlp_bias),
    Rule(f"{_LAYER}mlp.up_proj.bias", f"{_BLOCK}ffn_up.bias", when=_mlp_bias),
    Rule(f"{_LAYER}mlp.down_proj.bias", f"{_BLOCK}ffn_down.bias", when=_mlp_bias),
)


def head_dim(config: Config) -> int:
    """Dimensions per attention head: stated, or an equal share of the hidden size."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def metadata(architecture: str, config: Config, rope: Mapping[str, Any] | None = None) -> Metadata:
    """The keys of a dense decoder with RMS norms and rotary positions, which several families have in common.

    rope  the positions' parameters; None takes the configuration's, for models that have the same in every layer
    """
    rope = config.rope_parameters if rope is None else rope
    keys: Metadata = {
        "context_length": context_length(rope, config.max_position_embeddings),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    keys |= scaling_keys(rope)
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _extra(config: Config) -> dict[str, torch.Tensor]:
    if config.rope_parameters["rope_type"] != "llama3":
        return {}
    return {"rope_freqs.weight": llama3_factors(config.rope_parameters, head_dim(config))}


def _refusals(config: Config) -> list[str]:
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"its activation is {config.hidden_act}, llama.cpp's is silu")
    rope = config.rope_parameters
    problems += scaling_problems(rope, ("default", "linear", "llama3", "yarn"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("it rotates a part of each head only")
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append("its query heads are not a multiple of its key heads")
    return problems


def _notes(config: Config) -> list[str]:
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        return [f"the model attends to the last {window} tokens; llama.cpp will attend to all, also beyond them"]
    return []


def unused_tensors(config: Config) -> Sequence[str]:
    """What may lie in the files although the model does not read it."""
    unused = [r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"]  # a table that old files carry along
    if not own_output(config):
        unused.append(r"lm_head\.weight")  # equal to the embedding, or it would not be tied (`head.py`)
    return unused


FAMILY = Family(
    architecture="llama",
    rules=RULES,
    metadata=lambda config: metadata("llama", config),
    refusals=_refusals,
    notes=_notes,
    extra=_extra,
    ignored=unused_tensors,
)
