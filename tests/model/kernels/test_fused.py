"""RMSNorm, SwiGLU and rotary embedding against transformers' own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from finetune.model.kernels.fused import TORCH, kernels_for

Function = Callable[..., Tensor]


def gradients(function: Function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result, and the gradient of each input, for one gradient of the result."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    result = function(*inputs)
    upstream = torch.linspace(-1, 1, result.numel()).sin().reshape(result.shape).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, inputs, upstream)]


def norm_of(kind: type[torch.nn.Module]) -> Function:
    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        module = kind(x.shape[-1], 1e-6)
        return torch.func.functional_call(module, {"weight": weight}, x)  # type: ignore[no-any-return]

    return theirs


def theirs_rotary(q: Tensor, k: Tensor) -> Tensor:
    return torch.cat(apply_rotary_pos_emb(q, k, *angles(q.dtype)), 1)


def ours_rotary(q: Tensor, k: Tensor) -> Tensor:
    return torch.cat(TORCH.rotate(q, k, *angles(q.dtype)), 1)


def angles(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.arange(7.0)[:, None] / 10 ** (torch.arange(4.0) / 2)
    angle = torch.cat([angle, angle], -1).unsqueeze(0)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


CASES = {
    "llama's norm": (norm_of(LlamaRMSNorm), lambda x, w: TORCH.norm(x, w, 1e-6, False), [(2, 7, 48), (48,)]),
    "gemma's norm": (norm_of(GemmaRMSNorm), lambda x, w: TORCH.norm(x, w, 1e-6, True), [(2, 7, 48), (48,)]),
    "swiglu": (lambda g, u: torch.nn.functional.silu(g) * u, TORCH.swiglu, [(2, 7, 48), (2, 7, 48)]),
    "rotary": (theirs_rotary, ours_rotary, [(2, 4, 7, 8), (2, 2, 7, 8)]),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_transformers(case: str) -> None:
    theirs, ours, shapes = CASES[case]
    inputs = [numbers(*shape) for shape in shapes]
    for left, right in zip(*(gradients(f, inputs, torch.float32) for f in (theirs, ours)), strict=True):
        # Sums in another order: a few units in the last place.
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_in_16_bit_it_is_no_further_from_the_truth(case: str) -> None:
    theirs, ours, shapes = CASES[case]
    inputs = [numbers(*shape).bfloat16() for shape in shapes]
    truth = gradients(ours if "norm" in case else theirs, inputs, torch.float64)
    for left, right, true in zip(*(gradients(f, inputs, torch.bfloat16) for f in (theirs, ours)), truth, strict=True):
        assert left.dtype == right.dtype == torch.bfloat16
        # The truth's cos and sin are not rounded to 16 bit: both are that far from it.
        assert (right - true).norm() <= 1.1 * (left - true).norm()


@pytest.mark.parametrize("case", ["llama's norm", "gemma's norm", "swiglu"])
def test_the_forward_pass_is_bit_for_bit_the_same_in_16_bit(case: str) -> None:
    theirs, ours, shapes = CASES[case]
    inputs = [numbers(*shape).bfloat16() for shape in shapes]
    assert torch.equal(theirs(*inputs), ours(*inputs))


def test_gradients_are_those_of_finite_differences() -> None:
    x, w = (numbers(*shape).double().requires_grad_() for shape in ((3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: TORCH.norm(x, w, 1e-6, False), (x, w))
    assert torch.autograd.gradcheck(lambda x, w: TORCH.norm(x, w, 1e-6, True), (x, w))
    assert torch.autograd.gradcheck(TORCH.swiglu, (x, x.detach().cos().requires_grad_()))


@pytest.mark.parametrize(
    ("case", "saved"), [("llama's norm", 2 * 7 * 48 * 2 + 2 * 7 * 4), ("swiglu", 2 * 2 * 7 * 48 * 2)]
)
def test_only_the_inputs_are_saved(case: str, saved: int) -> None:
    inputs = [numbers(*shape).bfloat16().requires_grad_() for shape in CASES[case][2]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        CASES[case][1](*inputs)
    assert sum(tensor.nbytes for tensor in kept if tensor.dim() > 1) == saved


def test_a_cpu_has_torchs() -> None:
    assert kernels_for("cpu") == (TORCH, None)
