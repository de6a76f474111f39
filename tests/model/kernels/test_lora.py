"""The LoRA linear against PEFT's: values, gradients, and what it keeps."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from finetune.model.kernels.apply import apply


class Block(nn.Module):
    """q, k and v of the same input, in whatever way `call` calls them."""

    def __init__(self, width: int, outputs: tuple[int, int, int], bias: bool, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, outputs[0], bias)
        self.k_proj = nn.Linear(width, outputs[1], bias)
        self.v_proj = nn.Linear(width, outputs[2], bias)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def together(block: Any, x: Tensor) -> Tensor:
    # Not linear, so that every gradient is another one.
    return block.q_proj(x).sin().sum() + block.k_proj(x).cos().sum() + block.v_proj(x).tanh().sum()


def adapted(
    call: Callable[..., Tensor] = together,
    width: int = 12,
    outputs: tuple[int, int, int] = (8, 6, 10),
    bias: bool = True,
    rank: int = 3,
    **options: Any,
) -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=7, target_modules=["q_proj", "k_proj", "v_proj"], **options)
    model = get_peft_model(Block(width, outputs, bias, call), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The result and every gradient, the input's among them."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    result = model(x + 0)
    result.backward()
    assert x.grad is not None
    found = {"result": result.detach(), "x": x.grad}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest distance of a tensor from its reference, in units of the reference's norm, or of 1, which is the size
    of what is added up here: sums of which little is left are as far from the truth with PEFT's layers."""
    assert found.keys() == reference.keys()
    return max(((found[k].double() - reference[k]).norm() / reference[k].norm().clamp(min=1)).item() for k in reference)


@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    width=st.integers(1, 40),
    outputs=st.tuples(*[st.integers(1, 40)] * 3),
    bias=st.booleans(),
    rank=st.integers(1, 9),
    rslora=st.booleans(),
)
def test_values_and_gradients_are_pefts_for_every_shape(
    rows: list[int], width: int, outputs: tuple[int, int, int], bias: bool, rank: int, rslora: bool
) -> None:
    model = adapted(width=width, outputs=outputs, bias=bias, rank=rank, use_rslora=rslora)
    x = torch.randn(*rows, width)
    reference = step(copy.deepcopy(model).double(), x.double())
    plain = error(step(model, x), reference)
    applied = apply(model, lora=True, fused=False, device="cpu")
    assert (applied.linears, applied.grouped) == (3, 3)
    # float32 rounds at 6e-8; what remains is the order of sums.
    assert error(step(model, x), reference) <= 2 * plain + 1e-5


def test_under_autocast_it_is_no_further_from_the_truth_than_peft() -> None:
    model = adapted(width=256, outputs=(256, 64, 128), rank=8)
    for base in (module.base_layer for module in model.modules() if hasattr(module, "base_layer")):
        base.bfloat16()
    x = torch.randn(4, 32, 256).bfloat16()
    reference = step(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = error(step(model, x), reference)
        apply(model, lora=True, fused=False, device="cpu")
        ours = step(model, x)
    assert 1e-4 < plain < 0.1
    assert error(ours, reference) <= 1.2 * plain
    assert all(value.dtype == torch.float32 for name, value in ours.items() if "lora" in name)


def other_input(block: Any, x: Tensor) -> Tensor:
    return block.q_proj(x).sin().sum() + block.k_proj(x * 2).cos().sum() + block.v_proj(x).tanh().sum()


def other_order(block: Any, x: Tensor) -> Tensor:
    return block.v_proj(x).sin().sum() + block.k_proj(x).cos().sum() + block.q_proj(x).tanh().sum()


def twice(block: Any, x: Tensor) -> Tensor:
    return together(block, x) + 3 * together(block, x)


def one_missing(block: Any, x: Tensor) -> Tensor:
    return block.q_proj(x).sin().sum() + block.v_proj(x).tanh().sum()


def one_without_use(block: Any, x: Tensor) -> Tensor:
    block.k_proj(x)
    return one_missing(block, x)


@pytest.mark.parametrize("call", [other_input, other_order, twice, one_missing, one_without_use])
def test_a_group_that_is_called_otherwise_is_still_right(call: Callable[..., Tensor]) -> None:
    model, x = adapted(call), torch.randn(2, 5, 12)
    plain = step(model, x)
    apply(model, lora=True, fused=False, device="cpu")
    assert error(step(model, x), {name: value.double() for name, value in plain.items()}) < 1e-5


def test_what_peft_changes_afterwards_is_followed() -> None:
    """Scalings, weights that are replaced, another adapter, none, and this one again: each as PEFT computes it."""
    model, x = adapted(), torch.randn(2, 5, 12)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter("other", config)
    plain = copy.deepcopy(model)
    apply(model, lora=True, fused=False, device="cpu")

    def same() -> None:
        expected = {name: value.double() for name, value in step(plain, x).items()}
        assert error(step(model, x), expected) < 1e-5

    same()
    for each in (model, plain):
        each.base_model.model.k_proj.set_scale("default", 3.0)  # no longer that of its group
    same()
    for each in (model, plain):
        lora_a = each.base_model.model.q_proj.lora_A["default"]
        lora_a.weight = nn.Parameter(lora_a.weight.detach() * 2)
    same()
    for each in (model, plain):
        each.set_adapter("other")
    same()
    for each in (model, plain):
        each.set_adapter("default")
        each.base_model.model.k_proj.merge()
    same()


def test_an_input_that_is_changed_in_place_is_an_error_as_with_peft() -> None:
    def call(block: Any, x: Tensor) -> Tensor:
        first = block.q_proj(x).sin().sum()
        return first + block.k_proj(x.add_(1)).cos().sum()

    model = adapted(call)
    for lora in (False, True):
        apply(model, lora=lora, fused=False, device="cpu")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(model, torch.randn(2, 12))


def test_nothing_is_held_after_a_failure_between_two_layers() -> None:
    inputs: list[weakref.ref[Tensor]] = []

    def call(block: Any, x: Tensor) -> Tensor:
        inputs.append(weakref.ref(x))
        block.q_proj(x)
        raise ValueError("no memory")

    model = adapted(call)
    apply(model, lora=True, fused=False, device="cpu")
    with pytest.raises(ValueError, match="no memory"):
        model(torch.randn(2, 12, requires_grad=True) + 0)
    gc.collect()
    assert inputs[0]() is None


def test_an_input_is_saved_once_for_all_layers() -> None:
    model = adapted(width=64, outputs=(8, 8, 8), rank=1)
    apply(model, lora=True, fused=False, device="cpu")
    x = torch.randn(32, 64, requires_grad=True) + 0
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model.model.q_proj(x), model.base_model.model.k_proj(x), model.base_model.model.v_proj(x)
    assert [tensor.shape for tensor in saved if tensor.shape[0] == 32] == [(32, 3), (32, 64)]


def test_a_backward_pass_can_be_repeated_and_left_half() -> None:
    model = adapted()
    apply(model, lora=True, fused=False, device="cpu")
    block = model.base_model.model
    x = torch.randn(2, 12, requires_grad=True)
    y = x * 1
    q, k, v = block.q_proj(y), block.k_proj(y), block.v_proj(y)
    whole = torch.autograd.grad(q.sum() + k.sin().sum() + v.sum(), x, retain_graph=True)[0]
    alone = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in (q, k.sin(), v)]
    torch.testing.assert_close(whole, sum(alone))
    assert torch.equal(torch.autograd.grad(q.sum() + k.sin().sum() + v.sum(), x, retain_graph=True)[0], whole)
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(q.sum(), x, create_graph=True)


def test_what_is_frozen_gets_no_gradient() -> None:
    model, x = adapted(), torch.randn(2, 12)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj.lora_B" in name)
    plain = step(model, x)
    apply(model, lora=True, fused=False, device="cpu")
    ours = step(model, x)
    assert sum("lora" in name for name in ours) == 1
    assert error(ours, {name: value.double() for name, value in plain.items()}) < 1e-5


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"lora_dropout": 0.5}, "LoRA with dropout"), ({"use_dora": True}, "a variant of LoRA")],
)
def test_what_is_more_than_a_lora_stays_pefts(options: dict[str, Any], reason: str) -> None:
    applied = apply(adapted(**options), lora=True, fused=False, device="cpu")
    assert (applied.linears, dict(applied.left)) == (0, {reason: 3})


def test_without_gradients_disabled_and_merged_it_is_peft_bit_for_bit() -> None:
    model, x = adapted(), torch.randn(3, 12)
    changed = copy.deepcopy(model)
    apply(changed, lora=True, fused=False, device="cpu")
    with torch.no_grad():
        assert torch.equal(model(x), changed(x))
    with model.disable_adapter(), changed.disable_adapter():
        assert torch.equal(model(x), changed(x))
    for each in (model, changed):
        each.merge_adapter()
    assert torch.equal(model(x), changed(x))
