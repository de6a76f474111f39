"""RMSNorm, rotary embedding and SwiGLU, each as one autograd function that saves only what cannot be had again cheaply.

What is saved, per token (h: width, m: width inside the MLP, in numbers of the input's dtype):

| | transformers | here |
|---|---|---|
| RMSNorm | the input in float32, h numbers of 4 bytes; one float32 | the input as it is, h; one float32 |
| SwiGLU  | gate, silu(gate), up: 3 m | gate, up: 2 m |
| rotary  | cos and sin, which all layers share | the same, with a third of the passes over q and k |

These are the functions of a CPU and the reference of what liger-kernel (BSD 2-clause, an extra) does on a GPU, whose
Triton kernels save the same. `Kernels` chooses; the mathematics and every rounding are those of transformers' modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernels:
    """The three functions, and whose they are."""

    name: str
    norm: Callable[[Tensor, Tensor, float, bool], Tensor]
    """x (… × h), weight (h), epsilon, whether as Gemma does it → x's shape."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """gate, up (… × m) → silu(gate) · up."""
    rotate: Rotate
    """q (batch × heads × tokens × d), k (the same with its own heads), cos and sin (batch or 1 × tokens × d)."""


def norm(x: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> Tensor:
    result: Tensor = _Norm.apply(x, weight, epsilon, gemma)  # type: ignore[no-untyped-call]
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    result: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return result


TORCH = Kernels("torch", norm, swiglu, rotate)


def kernels_for(device: str) -> tuple[Kernels, str | None]:
    """liger-kernel's on a GPU where it is installed, else torch's; and why not, if it is there and cannot be used.

    What was found still has to be tried (`trial.py`).
    """
    if device != "cuda" or not (find_spec("liger_kernel") and find_spec("triton")):
        return TORCH, None
    try:
        return _liger(), None
    except Exception as error:  # whatever the import of another release, or of one that does not fit torch, does
        said = str(error).strip().splitlines() or [""]
        return TORCH, f"liger-kernel cannot be imported: {type(error).__name__}: {said[0][:200]}"


def _liger() -> Kernels:
    """liger-kernel's functions (signatures as in 0.8.5, ops/rms_norm.py, swiglu.py, rope.py).

    `in_place=False`: it would otherwise write dX over dY, which a residual connection may still need (as in Gemma 2).
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found,unused-ignore]
    from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found,unused-ignore]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found,unused-ignore]

    def fast_norm(x: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> Tensor:
        if weight.dtype != x.dtype:  # its result has x's dtype, transformers' that of both together
            return norm(x, weight, epsilon, gemma)
        offset, casting = (1.0, "gemma") if gemma else (0.0, "llama")
        result: Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, offset, casting, False)
        return result

    def fast_swiglu(gate: Tensor, up: Tensor) -> Tensor:
        result: Tensor = LigerSiLUMulFunction.apply(gate, up)
        return result

    def fast_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = LigerRopeFunction.apply(q, k, cos, sin)
        return result

    return Kernels("liger-kernel", fast_norm, fast_swiglu, fast_rotate)


class _Norm(torch.autograd.Function):
    """RMSNorm (arXiv 1910.07467): x̂ = x · r with r = (mean x² + ε)^-½, in float32.

    Llama: y = w · (x̂ in x's dtype). Gemma: y = (x̂ · (1 + w)) in x's dtype. With g the gradient of x̂:

        dx = r · (g − x̂ · mean(g · x̂))        dw = Σ dy · x̂
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> Tensor:
        wide = _wide(x)
        r = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.gemma = gemma
        ctx.save_for_backward(x, weight, r)
        unit = wide * r
        return unit.mul_(1.0 + _wide(weight)).to(x.dtype) if gemma else weight * unit.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, r = ctx.saved_tensors
        wide, d_weight = _wide(x), None
        if ctx.needs_input_grad[1]:
            unit = wide * r
            terms = _wide(dy).mul(unit) if ctx.gemma else (dy * unit.to(x.dtype)).to(wide.dtype)
            d_weight = terms.sum(tuple(range(x.dim() - 1))).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None, None
        g = _wide(dy) * (1.0 + _wide(weight)) if ctx.gemma else _wide((dy * weight).to(x.dtype))
        share = (g * wide).mean(-1, keepdim=True).mul_(r * r)  # mean(g · x̂) / (1 / r), so that x need not be scaled
        return g.addcmul_(wide, share, value=-1).mul_(r).to(x.dtype), d_weight, None, None


class _Swiglu(torch.autograd.Function):
    """silu(g) · u with silu(g) = g · σ(g) (arXiv 2002.05202), rounded to the dtype after silu, as in transformers."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = torch.nn.functional.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), d_up


class _Rotate(torch.autograd.Function):
    """Rotary embedding (arXiv 2104.09864) in Llama's layout: the pair of number i is number i + d/2.

    (a, b) → (a cos − b sin, b cos + a sin). A rotation: its backward pass is the rotation back, and needs no q or k.
    cos and sin may differ in their halves (they never do in transformers), so both halves are read.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = (tensor.unsqueeze(1) for tensor in ctx.saved_tensors)
        return _turned_back(dq, cos, sin), _turned_back(dk, cos, sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    result = x * cos
    result[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    result[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return result


def _turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    result = x * cos
    result[..., :half].addcmul_(x[..., half:], sin[..., half:])
    result[..., half:].addcmul_(x[..., :half], sin[..., :half], value=-1)
    return result


def _wide(x: Tensor) -> Tensor:
    """In float32, in which transformers normalises (float64 stays, so that tests can have a reference)."""
    return x if x.dtype == torch.float64 else x.float()
