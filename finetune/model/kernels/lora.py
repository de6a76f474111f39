"""A LoRA linear that saves less, copies nothing, and reads its base once in each direction.

    Y = X Wᵀ + b + s · (X Aᵀ) Bᵀ          (arXiv 2106.09685; W is frozen, A and B are trained)

PEFT writes this as five tensors of Y's size (base, LoRA, scaled LoRA, their sum, and with 4 bit a clone). Here the LoRA
part is added into the base product's own buffer. It is done by two autograd functions, in this order:

1. `_Branch` computes the small XAᵀ, and saves X and XAᵀ. Its backward pass is that of the whole linear.
2. `_Result` computes Y, saves nothing, and hands Y's gradient to `_Branch`.

Three things follow from this order. Layers with the same X (q, k and v; gate and up) share one `_Branch`: X is saved
once, all their A are multiplied at once, and one buffer collects dX. Each still computes its own base product when it
is called, so nothing large waits for anybody. And a block that is recomputed (torch.utils.checkpoint, not reentrant)
stops as soon as its last tensor is saved: that is now before the base product of the block's last linear, not after.

And where X itself is cheap to compute again (`remember`: a norm of the hidden state, silu(gate) · up), not even X is
saved, but what it was computed from, which is saved already.

Memory per row of X, in numbers of the compute dtype: `inputs + rank`, where a group counts `inputs` once, and an X that
can be computed again not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class _Recipe:
    """How a tensor was computed, as long as it is unchanged."""

    compute: Callable[..., Tensor]
    sources: tuple[Tensor, ...]
    version: int


def remember(x: Tensor, compute: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """x, which is `compute(*sources)` and need not be saved for a backward pass that has the sources.

    Bit for bit the same must come out when it is called again, without gradients, in the backward pass.
    """
    x._recipe = _Recipe(compute, sources, x._version)  # type: ignore[attr-defined]
    return x


@dataclass(frozen=True)
class _Part:
    """One linear's share of a `_Branch`."""

    carrier: Tensor
    """Stands for Y in the graph before there is a Y: its shape, and one number of memory."""
    small: Tensor
    """XAᵀ: rows × rank, a piece of the group's."""


@dataclass(frozen=True)
class _Pending:
    """What a group has ready for its members that are still to be called."""

    x: Tensor
    version: int
    parts: dict[int, _Part]


class Group:
    """Linears that are called with the same input, the first one first. A linear on its own is a group of one."""

    def __init__(self) -> None:
        self.members: list[Adapted] = []
        self._pending: _Pending | None = None

    def part(self, member: Adapted, x: Tensor) -> _Part:
        """The member's XAᵀ and its place in the graph.

        Computed for all members when the first is called. Another member takes its own if it is called with the very
        same tensor, unchanged; else it is computed for it alone.
        """
        pending = self._pending
        if pending is not None and pending.x is x and pending.version == x._version and id(member) in pending.parts:
            part = pending.parts.pop(id(member))
            if not pending.parts:
                self._pending = None
            return part
        together = [other for other in self.members if other is member or other.applies()]
        parts = _branch(together if member is self.members[0] else [member], x)
        part = parts.pop(id(member))
        if parts:
            self._pending = _Pending(x, x._version, parts)
        return part

    def forget(self, *_: object) -> None:
        """Let go of what nobody has asked for. A hook of the module around the group, also where that one fails."""
        self._pending = None


class Adapted:
    """One of PEFT's LoRA layers, computed our way: `layer.forward = Adapted(layer, name, group).forward`."""

    def __init__(self, layer: nn.Module, name: str, group: Group) -> None:
        self.layer: Any = layer
        self.name = name
        self.group = group
        self.base: Any = self.layer.base_layer
        group.members.append(self)

    def applies(self) -> bool:
        """Whether the layer computes with exactly this adapter now, and with no merged weights."""
        layer = self.layer
        return not layer.disable_adapters and not layer.merged and list(layer.active_adapters) == [self.name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Y for X (… × inputs). Without gradients, and wherever more is asked for than a LoRA, it is PEFT's own."""
        if args or kwargs or not torch.is_grad_enabled() or not self.applies():
            plain: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
            return plain
        part = self.group.part(self, x)
        b, scaling = self.layer.lora_B[self.name].weight, self.layer.scaling[self.name]

        def product() -> Tensor:
            y: Tensor = self.base(x)
            with _autocast_off(x.device.type):
                y.view(-1, y.shape[-1]).addmm_(part.small.to(y.dtype), b.to(y.dtype).t(), alpha=scaling)
            # A linear with a bias returns a view of its rows, and autograd would let nobody add to a view in place (as
            # Falcon does). This is the view that autograd does not know of; torch's own matmul ends with it.
            return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

        result: Tensor = _Result.apply(part.carrier, product)  # type: ignore[no-untyped-call]
        return result


def weight_of(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """W of a base linear, outputs × inputs. 4 and 8 bits are unpacked into memory of its own, as bitsandbytes does it
    in its backward passes (autograd/_functions.py: MatMul4Bit, MatMul8bitLt)."""
    kind, layer = type(base).__name__, cast(Any, base)
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        unpacked: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return unpacked.to(dtype)
    if kind == "Linear8bitLt":
        eight: Tensor = layer.state.CB.to(dtype, copy=True)
        return eight.mul_(layer.state.SCB.unsqueeze(1).mul(1.0 / 127.0))
    weight: Tensor = layer.weight
    return weight.detach().to(dtype)


def _branch(members: list[Adapted], x: Tensor) -> dict[int, _Part]:
    """The parts of some linears with the input X, by the identity of the member."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    a = [member.layer.lora_A[member.name].weight for member in members]
    b = [member.layer.lora_B[member.name].weight for member in members]
    scalings = [member.layer.scaling[member.name] for member in members]
    recipe: _Recipe | None = getattr(x, "_recipe", None)
    if recipe is not None and recipe.version != x._version:
        recipe = None
    plan = _Plan(dtype, scalings, [member.base for member in members], recipe.compute if recipe else None)
    saved = recipe.sources if recipe else None
    small, *carriers = _Branch.apply(x, plan, saved, *a, *b)  # type: ignore[no-untyped-call]
    pieces = torch.split(small, [matrix.shape[0] for matrix in a], dim=1)
    return {id(member): _Part(carrier, piece) for member, carrier, piece in zip(members, carriers, pieces, strict=True)}


@dataclass(frozen=True)
class _Plan:
    """What a `_Branch` needs to know beside tensors. It holds none: they would escape from recomputation."""

    dtype: torch.dtype
    """What is computed in."""
    scalings: list[float]
    bases: list[nn.Module]
    recompute: Callable[..., Tensor] | None
    """X from what is saved in its place."""


class _Branch(torch.autograd.Function):
    """X and (A, B) of n linears → XAᵀ of all, side by side (rows × sum of ranks), and n carriers.

    With dY the gradient of one linear's Y, and s its scaling (X, Y and their gradients as rows):

        dXAᵀ = s · dY B        dB = s · dYᵀ (XAᵀ)        dA = (dXAᵀ)ᵀ X        dX = Σ dY W + (dXAᵀ) A

    Products are in the compute dtype (autocast's, or X's own), as PEFT's are under autocast; dA and dB come out of the
    multiplication in float32 and are never rounded to 16 bit on a GPU. dX is one buffer. Each W is unpacked once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plan: _Plan, sources: tuple[Tensor, ...] | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(plan.bases)
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        with _autocast_off(x.device.type):
            x = x.to(plan.dtype)
            small = x.reshape(-1, x.shape[-1]) @ _stacked(weights[:count], plan.dtype).t()
        carriers = [x.new_empty(()).expand(*x.shape[:-1], matrix.shape[0]) for matrix in weights[count:]]
        ctx.save_for_backward(*weights, small, *(sources or (x,)))
        ctx.mark_non_differentiable(small)
        ctx.set_materialize_grads(False)
        return small, *carriers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        count, saved = len(plan.bases), ctx.saved_tensors
        a, b, small, sources = saved[:count], saved[count : 2 * count], saved[2 * count], saved[2 * count + 1 :]
        needs_x, _plan, _sources, *needs = ctx.needs_input_grad
        ranks = [matrix.shape[0] for matrix in a]
        d_a: list[Tensor | None] = [None] * count
        d_b: list[Tensor | None] = [None] * count
        d_x: Tensor | None = None
        with _autocast_off(small.device.type):
            d_small = torch.empty_like(small)
            pieces = zip(torch.split(small, ranks, 1), torch.split(d_small, ranks, 1), strict=True)
            for i, (gradient, (piece, d_piece)) in enumerate(zip(gradients, pieces, strict=True)):
                if gradient is None:  # a member that was never called, or whose Y nobody used
                    d_piece.zero_()
                    continue
                rows, scaling = gradient.reshape(-1, gradient.shape[-1]), plan.scalings[i]
                d_piece.addmm_(rows, b[i].to(plan.dtype), beta=0, alpha=scaling)
                if needs[count + i]:
                    d_b[i] = _accurate(rows.t(), piece).mul_(scaling)
                if needs_x:
                    w = weight_of(plan.bases[i], plan.dtype)
                    d_x = rows @ w if d_x is None else d_x.addmm_(rows, w)
                    del w  # before the next one is unpacked
            if any(needs[:count]):
                x = plan.recompute(*sources).to(plan.dtype) if plan.recompute else sources[0]
                stacked = torch.split(_accurate(d_small.t(), x.reshape(-1, x.shape[-1])), ranks)
                for i, piece in enumerate(stacked):
                    d_a[i] = piece if needs[i] and gradients[i] is not None else None
            if d_x is not None:
                d_x = d_x.addmm_(d_small, _stacked(a, plan.dtype)).view(ctx.shape).to(ctx.dtype)
        return d_x, None, None, *d_a, *d_b


class _Result(torch.autograd.Function):
    """Y, computed by `product`, in the place of its carrier. dY goes to the carrier, in the compute dtype."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, product: Callable[[], Tensor]) -> Tensor:
        ctx.dtype = carrier.dtype
        return product()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def _stacked(matrices: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """All A below each other, in one dtype: sum of ranks × inputs."""
    return matrices[0].to(dtype) if len(matrices) == 1 else torch.cat([matrix.to(dtype) for matrix in matrices])


def _accurate(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 (float64 for float64). On a GPU the product's own sums are kept as they are; a CPU has no
    such product, and rounds them to the operands' dtype first."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else (left @ right).float()


def _autocast_off(device: str) -> AbstractContextManager[Any]:
    """Here every dtype is chosen by hand, and autocast would not look at products that are added in place."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
