"""The mathematics of putting a LoRA into the weight it was trained on, as PEFT does it.

All of it is what `peft` 0.21 computes in `merge_and_unload()` for an adapter and a base on the CPU, operation for
operation, so that the results are the same bits: `peft/tuners/lora/layer.py` (`Linear.get_delta_weight`,
`Linear.merge`) and `peft/tuners/lora/variants.py` (`DoraLinearVariant.merge_unsafe`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoraModule:
    """The adapter of one linear layer. `a` is (rank, in), `b` is (out, rank), both float32."""

    name: str
    """The module's name in the live model, without PEFT's prefix: `model.layers.0.self_attn.q_proj`."""
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool
    """The base stores this weight as (in, out) rather than (out, in): GPT-2's Conv1D, PEFT's `fan_in_fan_out`."""
    magnitude: torch.Tensor | None
    """DoRA's magnitude vector, (out,) float32."""

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape the base weight must have."""
        out, into = int(self.b.shape[0]), int(self.a.shape[1])
        return (into, out) if self.transposed else (out, into)


def scaling(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """How strongly B·A counts: alpha / r (Hu et al. 2021, arXiv:2106.09685, 4.1), or alpha / √r with rsLoRA
    (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def delta(module: LoraModule) -> torch.Tensor:
    """What the adapter adds to the weight: scaling · B·A in float32, in the shape of the stored weight."""
    product = (module.b @ module.a).mul_(module.scaling)
    return product.T if module.transposed else product


def merge_weight(weight: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """The merged weight, in the dtype and shape of `weight`, which stays as it is.

    The sum is formed in float32 and rounded once to the weight's dtype.
    """
    change = delta(module)
    if module.magnitude is None:
        return change.add_(weight).to(weight.dtype)
    return _merge_dora(weight, change, module.magnitude, transposed=module.transposed)


def _merge_dora(
    weight: torch.Tensor, change: torch.Tensor, magnitude: torch.Tensor, *, transposed: bool
) -> torch.Tensor:
    """m · (W + ΔW) / ‖W + ΔW‖, the norm taken over the inputs of each output (Liu et al. 2024, arXiv:2402.09353)."""
    import torch

    whole = change.add_(weight)
    norm: torch.Tensor = torch.linalg.norm(whole.T if transposed else whole, dim=1)
    factor = (magnitude / norm).view(-1, 1)
    return whole.mul_(factor.T if transposed else factor).to(weight.dtype)
