"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: transformers' `Phi3ForCausalLM`, llama.cpp's `phi3`.

Sources: `modeling_phi3.py` of transformers, `src/models/phi3.cpp` of llama.cpp. Queries, keys and values are one matrix
in both, and so are gate and up. Models for long texts divide the frequencies of their positions by one of two lists of
factors (LongRoPE, https://arxiv.org/abs/2402.13753); both lists are tensors of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.export.gguf.family import Config, Family, Metadata, Rule
from finetune.export.gguf.llama import metadata, own_output, unused_tensors
from finetune.export.gguf.rope import longrope_keys, scaling_problems

if TYPE_CHECKING:
    import torch

_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."

_RULES = (
    Rule("model.embed_tokens.weight", "token_embd.weight"),
    Rule("model.norm.weight", "output_norm.weight"),
    Rule("lm_head.weight", "output.weight", when=own_output),
    Rule(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}attn_norm.weight"),
    Rule(f"{_LAYER}self_attn.qkv_proj.weight", f"{_BLOCK}attn_qkv.weight"),
    Rule(f"{_LAYER}self_attn.o_proj.weight", f"{_BLOCK}attn_output.weight"),
    Rule(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}ffn_norm.weight"),
    Rule(f"{_LAYER}mlp.gate_up_proj.weight", f"{_BLOCK}ffn_up.weight"),
    Rule(f"{_LAYER}mlp.down_proj.weight", f"{_BLOCK}ffn_down.weight"),
)


def _head_dim(config: Config) -> int:
    return int(config.hidden_size // config.num_attention_heads)


def _rotated(config: Config) -> int:
    """How many dimensions of a head turn with the position: the first ones; three quarters in Phi-4-mini."""
    return int(_head_dim(config) * config.rope_parameters["partial_rotary_factor"])


def _is_long(config: Config) -> bool:
    return bool(config.rope_parameters["rope_type"] == "longrope")


def _metadata(config: Config) -> Metadata:
    keys = metadata("phi3", config)
    keys["phi3.rope.dimension_count"] = _rotated(config)
    if _is_long(config):
        long = longrope_keys(config.rope_parameters, config.max_position_embeddings)
        keys |= {f"phi3.{key}": value for key, value in long.items()}
    return keys


def _extra(config: Config) -> dict[str, torch.Tensor]:
    import torch

    if not _is_long(config):
        return {}
    lists = {"long": config.rope_parameters["long_factor"], "short": config.rope_parameters["short_factor"]}
    return {f"rope_factors_{name}.weight": torch.tensor(values).float() for name, values in lists.items()}


def _refusals(config: Config) -> Sequence[str]:
    problems = []
    if config.hidden_act != "silu":
        problems.append(f"its activation is {config.hidden_act}, llama.cpp's is silu")
    if getattr(config, "head_dim", None) not in (None, _head_dim(config)):
        problems.append(
            f"its heads have {config.head_dim} dimensions each, llama.cpp's phi3 expects {_head_dim(config)}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append("its query heads are not a multiple of its key heads")
    if _rotated(config) % 2 or not 0 < _rotated(config) <= _head_dim(config):
        problems.append(f"it rotates {_rotated(config)} of the {_head_dim(config)} dimensions of each head")
    for name in ("long_factor", "short_factor") if _is_long(config) else ():
        if len(config.rope_parameters.get(name) or []) != _rotated(config) // 2:
            problems.append(f"its rope type is 'longrope', but it has no `{name}` of {_rotated(config) // 2} numbers")
    return [*problems, *scaling_problems(config.rope_parameters, ("default", "longrope"))]


def _notes(config: Config) -> Sequence[str]:
    notes = []
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        window = config.sliding_window
        notes.append(f"the model attends to the last {window} tokens; llama.cpp will attend to all, also beyond them")
    if _is_long(config):
        original = config.rope_parameters["original_max_position_embeddings"]
        notes.append(
            f"llama.cpp takes the model's positions for long texts whenever it is run with a context of more than "
            f"{original} tokens, the model only for texts that are longer: give it no more context than texts need"
        )
    return notes


FAMILY = Family(
    architecture="phi3",
    rules=_RULES,
    metadata=_metadata,
    refusals=_refusals,
    notes=_notes,
    extra=_extra,
    ignored=unused_tensors,
)
