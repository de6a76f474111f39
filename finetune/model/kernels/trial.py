"""A library's kernels are tried before a step depends on them: here, in this dtype and width, forward and backward.

They are compiled when they are first called, by what is installed on the machine (Triton wants a C compiler and
Python's headers), have limits of their own (liger-kernel: 65,536 numbers side by side), and other releases other
results. Whatever fails, or computes something else than torch's functions do, is replaced by these, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetune.model.kernels.fused import TORCH, Kernels

Piece = Callable[..., Tensor | tuple[Tensor, Tensor]]

ROWS = 3


def norm_fails(kernels: Kernels, weight: Tensor, epsilon: float, gemma: bool, dtype: torch.dtype) -> str | None:
    """Why a norm with this weight is not to be computed by these kernels for inputs of a dtype; None if it may be."""
    weight = weight.detach()

    def piece(of: Kernels) -> Piece:
        return lambda x: of.norm(x, weight, epsilon, gemma)

    return _fails(kernels, piece, [numbers(1, ROWS, weight.numel()).to(weight.device, dtype)])


def swiglu_fails(kernels: Kernels, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """The same of silu(gate) · up of so many numbers a token."""
    gate, up = (numbers(1, ROWS, width).add(shift).to(device, dtype) for shift in (0.1, 0.4))
    return _fails(kernels, lambda of: of.swiglu, [gate, up])


def rotate_fails(
    kernels: Kernels, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The same of a rotary embedding of so many heads of queries and of keys. cos and sin have equal halves, as in
    transformers: liger-kernel reads one of them."""
    q, k = (numbers(1, ROWS, count, head_dim).to(device, dtype) for count in heads)
    angle = torch.cat([numbers(1, ROWS, head_dim // 2)] * 2, -1).to(device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def piece(of: Kernels) -> Piece:
        return lambda q, k: of.rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return _fails(kernels, piece, [q, k])


def numbers(*shape: int) -> Tensor:
    """Numbers between -1 and 1 that look random; nobody's random state is touched."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).mul_(12.9898).sin_().reshape(shape)


def _fails(kernels: Kernels, piece: Callable[[Kernels], Piece], inputs: list[Tensor]) -> str | None:
    if kernels is TORCH:
        return None
    expected = _computed(piece(TORCH), inputs)
    try:
        found = _computed(piece(kernels), inputs)
        # Errors of a kernel are reported when its results are looked at.
        same = len(found) == len(expected) and all(map(_same, found, expected))
    except Exception as error:  # a compiler that is not there, another signature, no memory for a tile
        said = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {said[0][:200]}"
    return None if same else "its numbers are not torch's"


def _computed(piece: Piece, inputs: list[Tensor]) -> list[Tensor]:
    """Results and the gradients of inputs. Of copies: kernels may write over what they are given."""
    with torch.enable_grad():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        result = piece(*(leaf * 1 for leaf in leaves))
        results = [result] if isinstance(result, Tensor) else list(result)
        kept = [each.detach().clone() for each in results]
        upstream = [numbers(*each.shape).add(0.2).to(each) for each in results]
        return kept + list(torch.autograd.grad(results, leaves, upstream))


def _same(found: Tensor, expected: Tensor) -> bool:
    """Within a few roundings of the dtype on the whole, and of everything that is not finite."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    apart, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return bool(apart <= max(4 * torch.finfo(expected.dtype).eps, 1e-5) * size)
