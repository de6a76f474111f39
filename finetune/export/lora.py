"""The mathematics of putting a LoRA into the weight it was trained on, as PEFT does it.

All of it is what `peft` 0.21 computes in `merge_and_unload()` for an adapter and a base on the CPU, operation for
operation, so that the results are the same bits: `peft/tuners/lora/layer.py` (`Linear`, `Embedding`, `ParamWrapper`)
and `peft/tuners/lora/variants.py` (`DoraLinearVariant`, `DoraEmbeddingVariant`).

A weight is merged in blocks of rows that stay in the processor's cache: 1.9 ns per element on one core, where the
whole product takes 7.5. The bits stay the same, because each element of B·A is one sum over the rank, taken in the
same order whatever the block; only a block of a single row or column is another routine (a vector's), which rounds
differently. `row_blocks` therefore never makes small ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 2**19
"""About 2 MB in float32: what a core's own cache holds. Twice and half of it are as fast, four times is slower."""

SMALLEST_BLOCK = 16
"""Rows. Blocks of one row differ in the last bit; from two on none was seen to."""


@dataclass(frozen=True)
class LoraModule:
    """The adapter of one weight. `a` is (rank, in), `b` is (out, rank), both float32."""

    name: str
    """The module's name in the live model, without PEFT's prefix: `model.layers.0.self_attn.q_proj`."""
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool
    """The base stores this weight as (in, out) rather than (out, in): embeddings, and GPT-2's Conv1D."""
    magnitude: torch.Tensor | None
    """DoRA's magnitude vector, (out,) float32."""
    rounded: bool = False
    """The change is rounded to the weight's dtype before it is added: embeddings and experts. Else the sum is formed in
    float32 and rounded once."""

    @property
    def needs_whole(self) -> bool:
        """Whether no row can be merged without the others: DoRA's norm over a weight that is stored the other way."""
        return self.transposed and self.magnitude is not None


def scaling(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """How strongly B·A counts: alpha / r (Hu et al. 2021, arXiv:2106.09685, 4.1), or alpha / √r with rsLoRA
    (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank


def delta(module: LoraModule, first: int = 0, count: int | None = None) -> torch.Tensor:
    """What the adapter adds to `count` rows of the stored weight from `first` on: scaling · B·A in float32."""
    rows = slice(first, None if count is None else first + count)
    if module.transposed:
        return (module.b @ module.a[:, rows]).mul_(module.scaling).T
    return (module.b[rows] @ module.a).mul_(module.scaling)


def merge_weight(weight: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """The merged weight, in the dtype and shape of `weight`, which stays as it is."""
    return merge_rows(weight, weight, module, 0)


def merge_rows(rows: torch.Tensor, base: torch.Tensor, module: LoraModule, first: int) -> torch.Tensor:
    """Some rows of the merged weight, from row `first` on, in their dtype.

    `rows` are the weight's as they are now; `base` the same rows before any adapter, which DoRA's norm is taken of (it
    is `rows` for the first adapter). Modules that need the whole weight must be given all rows.
    """
    change = delta(module, first, len(rows))
    if module.magnitude is not None:
        return _merge_dora(rows, base, change, module.magnitude, first, transposed=module.transposed)
    if module.rounded:
        change = change.to(rows.dtype)
    return change.add_(rows).to(rows.dtype)


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the blocks that a weight is merged in, none of them small unless the weight is."""
    step = max(SMALLEST_BLOCK, BLOCK_ELEMENTS // max(1, columns))
    first = 0
    while first < rows:
        left = rows - first
        count = left if left < step + SMALLEST_BLOCK else step
        yield first, count
        first += count


def _merge_dora(
    rows: torch.Tensor,
    base: torch.Tensor,
    change: torch.Tensor,
    magnitude: torch.Tensor,
    first: int,
    *,
    transposed: bool,
) -> torch.Tensor:
    """m · (W + ΔW) / ‖W + ΔW‖, the norm taken over the inputs of each output (Liu et al. 2024, arXiv:2402.09353)."""
    import torch

    before = base.T + change.T if transposed else base + change
    norm: torch.Tensor = torch.linalg.norm(before, dim=1)
    if transposed:
        return change.add_(rows).mul_((magnitude / norm).view(1, -1)).to(rows.dtype)
    factor = magnitude[first : first + len(rows)] / norm
    return change.add_(rows).mul_(factor.view(-1, 1)).to(rows.dtype)
