"""Falcon 7B, 40B, 180B and Falcon 2 11B (llama.cpp's `falcon`). Falcon 3 is a Llama.

Attention and feed-forward read the same input side by side; only the layer norms have biases. The 7B kind has one key
and one value head for all queries (`multi_query`) and one norm per layer; the new decoder architecture has several,
and, but for 11B, a norm for the attention and one for the feed-forward.
Source: llama.cpp, `src/models/falcon.cpp`; transformers, `FalconAttention._split_heads`, `FalconDecoderLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.export.gguf.family import Config, Family, Metadata, Rule
from finetune.export.gguf.llama import own_output
from finetune.export.gguf.neox import activation_notes, activation_refusals, split_groups
from finetune.export.gguf.rope import scaling_keys, scaling_problems

if TYPE_CHECKING:
    import torch


def _key_heads(config: Config) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _split_qkv(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return split_groups(weight, config.num_attention_heads, _key_heads(config))


def _two_norms(config: Config) -> bool:
    return bool(config.new_decoder_architecture) and config.num_ln_in_parallel_attn in (None, 2)


def _one_norm(config: Config) -> bool:
    return not _two_norms(config)


_LAYER, _BLOCK = "transformer.h.{layer}.", "blk.{layer}."

_RULES = (
    Rule("transformer.word_embeddings.weight", "token_embd.weight"),
    Rule("transformer.ln_f.weight", "output_norm.weight"),
    Rule("transformer.ln_f.bias", "output_norm.bias"),
    Rule("lm_head.weight", "output.weight", when=own_output),
    *(
        Rule(f"{_LAYER}{source}.{kind}", f"{_BLOCK}{target}.{kind}", when=when)
        for source, target, when in (
            ("input_layernorm", "attn_norm", _one_norm),
            ("ln_mlp", "attn_norm", _two_norms),  # llama.cpp's names: the first is what the feed-forward reads
            ("ln_attn", "attn_norm_2", _two_norms),
        )
        for kind in ("weight", "bias")
    ),
    Rule(f"{_LAYER}self_attention.query_key_value.weight", f"{_BLOCK}attn_qkv.weight", _split_qkv),
    Rule(f"{_LAYER}self_attention.dense.weight", f"{_BLOCK}attn_output.weight"),
    Rule(f"{_LAYER}mlp.dense_h_to_4h.weight", f"{_BLOCK}ffn_up.weight"),
    Rule(f"{_LAYER}mlp.dense_4h_to_h.weight", f"{_BLOCK}ffn_down.weight"),
)


def _metadata(config: Config) -> Metadata:
    rope = config.rope_parameters
    keys: Metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.ffn_hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": _key_heads(config),
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    keys |= scaling_keys(rope)
    return {f"falcon.{key}": value for key, value in keys.items()}


def _refusals(config: Config) -> list[str]:
    if config.alibi:
        return ["it knows positions by ALiBi, llama.cpp's Falcon by rotation"]
    problems = activation_refusals(config.activation)
    problems += scaling_problems(config.rope_parameters, ("default", "linear"))
    if not config.parallel_attn:
        problems.append("its feed-forward follows its attention (parallel_attn), in llama.cpp they are side by side")
    if config.bias:
        problems.append("its linear layers have biases, llama.cpp's have not")
    if _key_heads(config) < 1 or config.num_attention_heads % _key_heads(config):
        problems.append("its query heads are not a multiple of its key heads")
    return problems


def _unused_tensors(config: Config) -> Sequence[str]:
    unused = [r"transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq"]  # a table that old files carry along
    return unused if own_output(config) else [*unused, r"lm_head\.weight"]


FAMILY = Family(
    architecture="falcon",
    rules=_RULES,
    metadata=_metadata,
    refusals=_refusals,
    notes=activation_notes,
    ignored=_unused_tensors,
)
