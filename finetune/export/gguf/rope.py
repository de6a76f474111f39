"""Rotary position embeddings: what llama.cpp wants to know about them, computed from the configuration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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
