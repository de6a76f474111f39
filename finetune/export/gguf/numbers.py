"""The numbers of a configuration: what is checked before anything is computed from them, and before they are written.

config.json may hold anything where a number belongs. A GGUF file has room for whole numbers of 32 bits without a sign
and for single-precision floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.export.gguf.family import Config, Metadata

_MAX_COUNT = 2**32 - 1
_MAX_FLOAT = (2 - 2**-23) * 2.0**127
"""The largest single-precision number."""

_COUNTS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim",
    "intermediate_size", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
_FROM_ZERO = ("sliding_window", "num_experts", "num_experts_per_tok")
_FLOATS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "attn_logit_softcapping", "final_logit_softcapping",
    "query_pre_attn_scalar",
)  # fmt: skip
_OPTIONAL = ("head_dim", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_ROPE = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor", "mscale",
    "mscale_all_dim", "beta_fast", "beta_slow", "partial_rotary_factor",
)  # fmt: skip
_ROPE_LISTS = ("long_factor", "short_factor")


def config_problems(config: Config) -> list[str]:
    """What is no number, or none that a model can have, among the values that the families' modules read.

    A family has some of the names; what it has not is not looked at.
    """
    problems = []
    named = [name for name in (*_COUNTS, *_FROM_ZERO, *_FLOATS) if hasattr(config, name)]
    stated = {name: getattr(config, name) for name in named}
    for name, value in stated.items():
        least = 0 if name in _FROM_ZERO else 1
        if value is None and name in _OPTIONAL:
            continue
        if name not in _FLOATS and not (_is_whole(value) and least <= value <= _MAX_COUNT):
            problems.append(f"its `{name}` is {_shown(value)}, not a whole number from {least} to {_MAX_COUNT}")
        if name in _FLOATS and not _is_float(value):
            problems.append(f"its `{name}` is {_shown(value)}, not a number from 0 to {_MAX_FLOAT:.2g}")
    own_size = stated.get("head_dim") is not None
    if not problems and not own_size and config.hidden_size < config.num_attention_heads:
        problems.append(f"it has {config.num_attention_heads} heads in a hidden size of {config.hidden_size}")
    return problems + _rope_problems(config.rope_parameters)


def _rope_problems(parameters: object) -> list[str]:
    """`parameters` is one set of rotary positions, or a table of several by the kind of layer (Gemma 3)."""
    if not isinstance(parameters, Mapping):
        return [f"its `rope_parameters` are {_shown(parameters)}, not a table"]
    sets = [value for value in parameters.values() if isinstance(value, Mapping)]
    if not sets or "rope_type" in parameters:
        sets.append(parameters)
    problems: list[str] = []
    for rope in sets:
        if not isinstance(rope.get("rope_type"), str):
            problems.append(f"its `rope_type` is {_shown(rope.get('rope_type'))}, not a name")
        if not (_is_float(rope.get("rope_theta")) and rope["rope_theta"] > 0):
            problems.append(f"its `rope_theta` is {_shown(rope.get('rope_theta'))}, not a number above 0")
        for name in _ROPE:
            if rope.get(name) is not None and not _is_float(rope[name]):
                problems.append(f"its `{name}` is {_shown(rope[name])}, not a number from 0 to {_MAX_FLOAT:.2g}")
        for name in _ROPE_LISTS:
            values = rope.get(name)
            if values is not None and not (isinstance(values, list) and all(map(_is_float, values))):
                problems.append(f"its `{name}` is {_shown(values)}, not a list of numbers")
    return problems


def metadata_problems(metadata: Metadata) -> list[str]:
    """Which numbers do not fit into a GGUF file."""
    problems = []
    for key, value in metadata.items():
        numbers = [value] if isinstance(value, int | float) else value
        if isinstance(numbers, Sequence) and not all(isinstance(n, str) or _fits(n) for n in numbers):
            problems.append(f"`{key}` would be {_shown(value)}, for which a GGUF file has no room")
    return problems


def _fits(number: Any) -> bool:
    return _is_float(abs(number)) if isinstance(number, float) else 0 <= number <= _MAX_COUNT


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: object) -> bool:
    """Whether this is a number from 0 on that single precision can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and 0 <= value <= _MAX_FLOAT


def _shown(value: object) -> str:
    """A value as it stands in a message: what a hostile file holds may be long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
