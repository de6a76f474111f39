"""A library's kernels that fail, or compute something else, are found out before a step, and torch's are used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.model.kernels import apply as applying
from finetune.model.kernels import fused
from finetune.model.kernels.apply import Applied, apply
from finetune.model.kernels.fused import TORCH, Kernels, kernels_for
from tests.model.kernels.test_apply import IDS, model_of, step

LIBRARY = replace(TORCH, name="a library")


def applied_with(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> tuple[Applied, dict[str, Tensor]]:
    """What is said of a model with these kernels, and its step."""
    monkeypatch.setattr(applying, "kernels_for", lambda device: (kernels, None))
    model = model_of("Qwen3")
    applied = apply(model, lora=True, fused=True, device="cpu")
    return applied, step(model)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    model = model_of("Qwen3")
    apply(model, lora=True, fused=True, device="cpu")
    return step(model)


def raising(*_: Any) -> Any:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand more")


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return dy * up, dy * torch.nn.functional.silu(gate)


def not_gemma(x: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> Tensor:
    return TORCH.norm(x, weight * 1.1, epsilon, gemma)


def limited(gate: Tensor, up: Tensor) -> Tensor:
    if gate.shape[-1] > 128:
        raise RuntimeError(f"Cannot launch Triton kernel since n = {gate.shape[-1]} exceeds the recommended blocksize")
    return TORCH.swiglu(gate, up)


def not_a_number(x: Tensor, weight: Tensor, epsilon: float, gemma: bool) -> Tensor:
    return TORCH.norm(x, weight, epsilon, gemma) * torch.nan


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"norm": raising}, "norms of 64 by torch: a library fails here: RuntimeError: Failed to find C compiler."),
        ({"norm": not_gemma}, "norms of 16 by torch: a library fails here: its numbers are not torch's"),
        ({"norm": not_a_number}, "norms of 64 by torch: a library fails here: its numbers are not torch's"),
        ({"swiglu": raising}, "SwiGLUs of 176 by torch: a library fails here: RuntimeError: Failed to find C"),
        ({"swiglu": WrongBackward.apply}, "SwiGLUs of 176 by torch: a library fails here: its numbers are not"),
        ({"swiglu": limited}, "SwiGLUs of 176 by torch: a library fails here: RuntimeError: Cannot launch"),
        ({"rotate": raising}, "rotary embeddings by torch: a library fails here: RuntimeError: Failed to find C"),
        ({"rotate": lambda q, k, cos, sin: (*TORCH.rotate(q, k, cos, sin), cos, sin)}, "rotary embeddings by torch"),
        ({"rotate": lambda q, k, cos, sin: TORCH.rotate(q, k, cos, -sin)}, "rotary embeddings by torch: a library"),
    ],
)
def test_what_fails_is_torchs_and_that_is_said(
    broken: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Tensor]
) -> None:
    applied, found = applied_with(replace(LIBRARY, **broken), monkeypatch)
    assert said in applied.account()
    assert "and more" not in applied.account()
    assert (applied.norms, applied.swiglus, applied.rotaries) == (9, 2, 2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_does_not_fail_is_the_librarys(monkeypatch: pytest.MonkeyPatch, expected: dict[str, Tensor]) -> None:
    """Also one that writes its gradient over what it was given, as liger-kernel's do."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            calls.append(name)
            return getattr(TORCH, name)(*arguments)

        return function

    def in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("rotate")
        results = TORCH.rotate(q, k, cos, sin)
        with torch.no_grad():
            q.data.fill_(torch.nan)
        return results

    kernels = Kernels("a library", counted("norm"), counted("swiglu"), in_place)
    applied, found = applied_with(kernels, monkeypatch)
    assert not applied.refused
    assert "(a library)" in applied.account()
    # Two widths of norms, one of the others; then the step, whose backward pass computes some again.
    assert sorted(calls[:4]) == ["norm", "norm", "rotate", "swiglu"]
    assert min(calls.count(name) for name in ("norm", "swiglu", "rotate")) > 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_library_that_cannot_be_imported_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another release, whose functions have other names."""
    monkeypatch.setattr(fused, "find_spec", lambda name: object())
    for name in ("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.rms_norm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kernels, why = kernels_for("cuda")
    assert kernels is TORCH
    assert why is not None
    assert why.startswith("liger-kernel cannot be imported: ImportError: cannot import name 'LigerRMSNormFunction'")
    model = model_of("Llama")
    applied = apply(model, lora=False, fused=True, device="cuda")
    assert f"fused layers by torch: {why}" in applied.account()
    assert applied.norms == 5
    model(input_ids=IDS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_liger_kernel_passes_on_a_gpu(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    model = model_of("Qwen3").to("cuda", dtype)
    applied = apply(model, lora=True, fused=True, device="cuda")
    assert (applied.kernels, applied.refused) == ("liger-kernel", {})
