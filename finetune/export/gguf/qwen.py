"""Qwen 2 and 2.5 (llama.cpp's `qwen2`), and Qwen 3 (`qwen3`): dense models, DeepSeek-R1-Distill-Qwen among them.

Unlike the Llama family's, llama.cpp rotates their queries and keys in halves, as transformers does, so no row moves.
Qwen 2 has biases on queries, keys and values; Qwen 3 normalises queries and keys per head instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.export.gguf.family import Config, Family, Rule
from finetune.export.gguf.llama import metadata, own_output, unused_tensors
from finetune.export.gguf.rope import scaling_problems

_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."

_SHARED = (
    Rule("model.embed_tokens.weight", "token_embd.weight"),
    Rule("model.norm.weight", "output_norm.weight"),
    Rule("lm_head.weight", "output.weight", when=own_output),
    Rule(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}attn_norm.weight"),
    Rule(f"{_LAYER}self_attn.q_proj.weight", f"{_BLOCK}attn_q.weight"),
    Rule(f"{_LAYER}self_attn.k_proj.weight", f"{_BLOCK}attn_k.weight"),
    Rule(f"{_LAYER}self_attn.v_proj.weight", f"{_BLOCK}attn_v.weight"),
    Rule(f"{_LAYER}self_attn.o_proj.weight", f"{_BLOCK}attn_output.weight"),
    Rule(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}ffn_norm.weight"),
    Rule(f"{_LAYER}mlp.gate_proj.weight", f"{_BLOCK}ffn_gate.weight"),
    Rule(f"{_LAYER}mlp.up_proj.weight", f"{_BLOCK}ffn_up.weight"),
    Rule(f"{_LAYER}mlp.down_proj.weight", f"{_BLOCK}ffn_down.weight"),
)

_BIASES = (
    Rule(f"{_LAYER}self_attn.q_proj.bias", f"{_BLOCK}attn_q.bias"),
    Rule(f"{_LAYER}self_attn.k_proj.bias", f"{_BLOCK}attn_k.bias"),
    Rule(f"{_LAYER}self_attn.v_proj.bias", f"{_BLOCK}attn_v.bias"),
)

_NORMS = (
    Rule(f"{_LAYER}self_attn.q_norm.weight", f"{_BLOCK}attn_q_norm.weight"),
    Rule(f"{_LAYER}self_attn.k_norm.weight", f"{_BLOCK}attn_k_norm.weight"),
)


def _refusals(config: Config) -> list[str]:
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"its activation is {config.hidden_act}, llama.cpp's is silu")
    problems += scaling_problems(config.rope_parameters, ("default", "linear", "yarn"))
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append("its query heads are not a multiple of its key heads")
    if getattr(config, "use_sliding_window", False):
        problems.append("some of its layers attend to a window only (use_sliding_window), in llama.cpp to all")
    return problems


def _refusals_qwen3(config: Config) -> Sequence[str]:
    biased = ["its attention has biases, which llama.cpp's has not"] if config.attention_bias else []
    return [*_refusals(config), *biased]


QWEN2 = Family(
    architecture="qwen2",
    rules=(*_SHARED, *_BIASES),
    metadata=lambda config: metadata("qwen2", config),
    refusals=_refusals,
    ignored=unused_tensors,
)

QWEN3 = Family(
    architecture="qwen3",
    rules=(*_SHARED, *_NORMS),
    metadata=lambda config: metadata("qwen3", config),
    refusals=_refusals_qwen3,
    ignored=unused_tensors,
)
