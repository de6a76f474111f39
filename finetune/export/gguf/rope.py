"""Rotary position embeddings: what llama.cpp wants to know about them, computed from the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.export.gguf.family import Metadata

if TYPE_CHECKING:
    import torch


def interleave_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection (weight or bias), head by head.

    transformers rotates dimension i with i + d/2; llama.cpp's `llama` architecture rotates 2i with 2i + 1. Row i of
    the first half therefore goes to 2i and row i of the second half to 2i + 1. Shape and dtype stay.
    """
    rows = weight.shape[0]
    halves = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def llama3_factors(parameters: dict[str, Any], head_dim: int) -> torch.Tensor:
    """By how much each frequency of a Llama 3.1 model is divided: (head_dim / 2,) float32.

    Formula: `transformers.modeling_rope_utils._compute_llama3_parameters`. Wavelengths that fit often into the
    original context stay as they are, those that hardly fit are stretched by `factor`, the ones between get a blend.
    """
    import torch

    theta, factor = parameters["rope_theta"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context = parameters["original_max_position_embeddings"]
    divisors = []
    for i in range(head_dim // 2):
        turns = context / (2 * math.pi * theta ** (2 * i / head_dim))  # how often the wave fits into the context
        if turns < low:
            divisors.append(factor)
        elif turns > high:
            divisors.append(1.0)
        else:
            blend = (turns - low) / (high - low)
            divisors.append(1.0 / ((1.0 - blend) / factor + blend))
    return torch.tensor(divisors, dtype=torch.float32)


# -- models stretched to longer texts -----------------------------------------------------------------------------


def scaling_problems(rope: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """What keeps these `rope_parameters` from being converted, for an architecture that does the `known` types."""
    kind = rope["rope_type"]
    if kind not in known:
        return [f"its rope type {kind!r} cannot be converted yet"]
    problems = []
    if kind in ("linear", "yarn") and not (rope.get("factor") or 0) > 0:
        problems.append(f"its rope type is {kind!r}, but it has no `factor`")
    if kind == "llama3":
        problems += _llama3_problems(rope)
    if kind in ("yarn", "longrope") and not (rope.get("original_max_position_embeddings") or 0) > 1:
        problems.append(f"its rope type is {kind!r}, but it has no `original_max_position_embeddings`")
    if kind == "yarn" and ((rope.get("beta_fast") or 32) != 32 or (rope.get("beta_slow") or 1) != 1):
        problems.append("its YaRN has other borders than 32 and 1 (beta_fast, beta_slow), llama.cpp has these")
    if kind == "yarn" and not rope.get("truncate", True):
        problems.append("its YaRN does not round its borders (truncate), llama.cpp's does")
    return problems


def _llama3_problems(rope: Mapping[str, Any]) -> list[str]:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if not rope.get(name)]
    if missing:
        return [f"its rope type is 'llama3', but it has no `{name}`" for name in missing]
    if rope["low_freq_factor"] >= rope["high_freq_factor"]:
        return ["its `low_freq_factor` is not below its `high_freq_factor`"]
    return []


def scaling_keys(rope: Mapping[str, Any]) -> Metadata:
    """The `rope.scaling` keys, without the architecture before them. Of a linear or YaRN model; else there are none."""
    if rope["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        return _yarn_keys(rope)
    return {}


def _yarn_keys(rope: Mapping[str, Any]) -> Metadata:
    """YaRN (https://arxiv.org/abs/2309.00071), as in `modeling_rope_utils._compute_yarn_parameters`.

    Both compute the same frequencies. The magnitude of what is rotated is 1 + ln(factor) / 10 in llama.cpp, times
    `attn_factor`, which therefore is what the model has beyond that.
    """
    factor = float(rope["factor"])
    magnitude = usual = _yarn_magnitude(factor, 1.0)
    if rope.get("attention_factor") is not None:
        magnitude = rope["attention_factor"]
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        magnitude = _yarn_magnitude(factor, rope["mscale"]) / _yarn_magnitude(factor, rope["mscale_all_dim"])
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "rope.scaling.attn_factor": float(magnitude / usual),
    }


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def context_length(rope: Mapping[str, Any], stated: int) -> int:
    """How many tokens the model can read. YaRN is often switched on in config.json without the length being changed:
    Qwen 2.5's documentation does it so. llama.cpp would not read more than what the file says."""
    if rope["rope_type"] != "yarn":
        return stated
    return max(stated, int(rope["factor"] * rope["original_max_position_embeddings"]))


def longrope_keys(rope: Mapping[str, Any], length: int) -> Metadata:
    """From which length on the long factors hold, and the magnitude of what is rotated, at any length.

    Formula: `modeling_rope_utils._compute_longrope_parameters`. `length` is the model's, in tokens.
    """
    original = int(rope["original_max_position_embeddings"])
    factor = rope.get("factor") or length / original
    magnitude = rope.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(magnitude)}
