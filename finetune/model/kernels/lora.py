"""A LoRA linear that saves less, copies nothing, and reads its base once in each direction.

    Y = X Wᵀ + b + s · (X Aᵀ) Bᵀ          (arXiv 2106.09685; W is frozen, A and B are trained)

PEFT writes this as five tensors of Y's size (base, LoRA, scaled LoRA, their sum, and with 4 bit a clone). Here the LoRA
part is added into the base product's own buffer. It is done by two autograd functions, in this order:

1. `_Branch` computes the small s · XAᵀ, and saves X and that. Its backward pass is that of the whole linear.
2. `_Result` computes Y, saves nothing, and leaves Y's gradient where `_Branch` finds it (`_Call`).

Where nothing is computed again, the first `_Result` of a `_Branch` is made by the same function. Three things follow
from this order. Layers with the same X (q, k and v; gate and up) share one `_Branch`: X is saved
once, all their A are multiplied at once, and one buffer collects dX. Each still computes its own base product when it
is called, so nothing large waits for anybody. And a block that is recomputed (torch.utils.checkpoint, not reentrant)
stops as soon as its last tensor is saved: that is now before the base product of the block's last linear, not after.

And where X itself is cheap to compute again (`remember`: a norm of the hidden state, silu(gate) · up), not even X is
saved, but what it was computed from, which is saved already.

Memory per row of X, in numbers of the compute dtype: `inputs + rank`, where a group counts `inputs` once, and an X that
can be computed again not at all.

Short micro batches wait for Python, not for products. So nothing is looked up, cast, split or joined that need not be;
with 16 layers of no size to speak of, on a CPU, the forward pass takes a tenth longer than with PEFT's own layers,
the backward pass as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


class _Recipe(NamedTuple):
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


class _Call:
    """One call of a group's members: what its functions know of each other beside tensors.

    It holds no tensor of a forward pass (they would escape from recomputation), and in a backward pass the gradients of
    Y from each `_Result` to the `_Branch`: autograd itself could hand over only what has the shape of an output.
    """

    __slots__ = ("bases", "dtype", "gradients", "recompute", "scaling")

    def __init__(
        self, bases: list[Any], dtype: torch.dtype, scaling: float, recompute: Callable[..., Tensor] | None
    ) -> None:
        self.bases = bases
        self.dtype = dtype
        """What is computed in."""
        self.scaling = scaling
        self.recompute = recompute
        """X from what is saved in its place."""
        self.gradients: list[Tensor | None] = [None] * len(bases)


class _Part(NamedTuple):
    """What is ready for a linear whose group was called before it."""

    call: _Call
    place: int
    """Of the linear in the call."""
    carrier: Tensor
    """One number of memory, which stands in the graph for all that is made of X."""
    small: Tensor
    """s · XAᵀ: rows × rank, a piece of the group's."""
    b: Tensor


class Group:
    """Linears that are called with the same input, the first one first. A linear on its own is a group of one."""

    def __init__(self) -> None:
        self.members: list[Adapted] = []
        self._x: Tensor | None = None
        """The input of the parts that are ready for members still to be called, and its version."""
        self._version = 0
        self._parts: dict[Adapted, _Part] = {}

    def result(self, member: Adapted, x: Tensor) -> Tensor | None:
        """Y of a member; None if PEFT would not compute its adapter, or more of them.

        s · XAᵀ is computed for all members when the first is called. Another member takes its own if it is called with
        the very same tensor, unchanged; else it is computed for it alone.
        """
        if self._x is x and self._version == x._version and (part := self._parts.pop(member, None)) is not None:
            if not self._parts:
                self._x = None
            return _result(member, x, part)
        if not member.applies():
            return None
        if member is not self.members[0] or len(self.members) == 1:
            return _branch([member], x)[0]
        scaling = member.scaling()
        together = [
            other for other in self.members if other is member or (other.applies() and other.scaling() == scaling)
        ]
        y, parts = _branch(together, x)
        if parts:
            self._x, self._version, self._parts = x, x._version, parts
        return y

    def forget(self, *_: object) -> None:
        """Let go of what nobody has asked for. A hook of the module around the group, also where that one fails."""
        if self._x is not None:
            self._x = None
            self._parts.clear()


class Adapted:
    """One of PEFT's LoRA layers, computed our way: `layer.forward = Adapted(layer, name, group).forward`."""

    def __init__(self, layer: nn.Module, name: str, group: Group) -> None:
        self.layer: Any = layer
        self.name = name
        self.group = group
        self.base: Any = self.layer.base_layer
        self.a: Any = self.layer.lora_A
        self.b: Any = self.layer.lora_B
        group.members.append(self)

    def applies(self) -> bool:
        """Whether the layer computes with exactly this adapter now, and with no merged weights."""
        layer = self.layer
        if layer.disable_adapters or layer.merged:
            return False
        active = layer.active_adapters
        return len(active) == 1 and active[0] == self.name and self.name in self.a

    def scaling(self) -> float:
        scaling: float = self.layer.scaling[self.name]
        return scaling

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Y for X (… × inputs). Without gradients, and wherever more is asked for than a LoRA, it is PEFT's own."""
        y = None if args or kwargs or not torch.is_grad_enabled() else self.group.result(self, x)
        if y is None:
            plain: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
            return plain
        return y

    def product(self, x: Tensor, small: Tensor, b: Tensor) -> Tensor:
        """Y, of which `small` is s · XAᵀ. Without a graph."""
        y: Tensor = self.base(x)
        dtype = y.dtype
        (y if y.dim() == 2 else y.view(-1, y.shape[-1])).addmm_(_as(small, dtype), _as(b, dtype).t())
        # A linear with a bias returns a view of its rows, and autograd would let nobody add to a view in place (as
        # Falcon does). This is the view that autograd does not know of; torch's own matmul ends with it.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


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


def _branch(members: list[Adapted], x: Tensor) -> tuple[Tensor, dict[Adapted, _Part]]:
    """Y of the first of some linears of one scaling with the input X, and the parts of the others."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    first, count = members[0], len(members)
    a = [member.a[member.name].weight for member in members]
    b = [member.b[member.name].weight for member in members]
    recipe: _Recipe | None = getattr(x, "_recipe", None)
    if recipe is not None and recipe.version != x._version:
        recipe = None
    compute, sources = (recipe.compute, recipe.sources) if recipe is not None else (None, None)
    call = _Call([member.base for member in members], dtype, first.scaling(), compute)
    small: list[Tensor] = []

    def product() -> Tensor:
        return first.product(x, small[0], b[0])

    # Inside of a backward pass a block is computed again, and left as soon as its last tensor is saved: when a function
    # ends. The tensors that are saved, and their order, are the same either way.
    if torch._C._current_graph_task_id() == -1:
        carrier, y = _Branch.apply(x, call, sources, small, product, *a, *b)  # type: ignore[no-untyped-call]
    else:
        carrier, _ = _Branch.apply(x, call, sources, small, None, *a, *b)  # type: ignore[no-untyped-call]
        y = _Result.apply(carrier, call, 0, product)  # type: ignore[no-untyped-call]
    return y, {members[i]: _Part(call, i, carrier, small[i], b[i]) for i in range(1, count)}


def _result(member: Adapted, x: Tensor, part: _Part) -> Tensor:
    def product() -> Tensor:
        return member.product(x, part.small, part.b)

    y: Tensor = _Result.apply(part.carrier, part.call, part.place, product)  # type: ignore[no-untyped-call]
    return y


class _Branch(torch.autograd.Function):
    """X and (A, B) of n linears → a carrier, and Y of the first if its `product` is given; into `out`, s · XAᵀ of each.

    With dY the gradient of one linear's Y, and s the scaling (X, Y and their gradients as rows):

        dXAᵀ = s · dY B        dB = dYᵀ (s · XAᵀ)        dA = (dXAᵀ)ᵀ X        dX = Σ dY W + (dXAᵀ) A

    Products are in the compute dtype (autocast's, or X's own), as PEFT's are under autocast; dA and dB come out of the
    multiplication in float32 and are never rounded to 16 bit on a GPU. dX is one buffer. Each W is unpacked once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: _Call,
        sources: tuple[Tensor, ...] | None,
        out: list[Tensor],
        product: Callable[[], Tensor] | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.call, ctx.shape, ctx.dtype = call, x.shape, x.dtype
        # Under autocast all of these have its dtype already: it finds nothing to do.
        x = _as(x, call.dtype)
        carrier = x.new_empty(())
        a = weights[: len(call.bases)]
        small = torch.addmm(carrier, _rows(x), _stacked(a, call.dtype).t(), beta=0, alpha=call.scaling)
        out += _split(small, a, 1)
        ctx.save_for_backward(*weights, small, *(sources or (x,)))
        ctx.set_materialize_grads(False)
        return carrier, None if product is None else product()

    @staticmethod
    def backward(ctx: Any, _: None, first: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a LoRA linear has no gradient of its gradient; set speed.lora: false")
        call: _Call = ctx.call
        gradients, call.gradients = call.gradients, [None] * len(call.bases)
        if first is not None:
            gradients[0] = first
        saved = ctx.saved_tensors  # once: what was computed again is handed out once
        device = saved[0].device.type
        if torch.is_autocast_enabled(device):
            # Here every dtype is chosen by hand, and autocast would not look at products that are added in place.
            with torch.autocast(device, enabled=False):
                return _branch_backward(ctx, saved, gradients)
        return _branch_backward(ctx, saved, gradients)


def _branch_backward(ctx: Any, saved: tuple[Tensor, ...], gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    call: _Call = ctx.call
    count, dtype = len(call.bases), call.dtype
    a, b, small, sources = saved[:count], saved[count : 2 * count], saved[2 * count], saved[2 * count + 1 :]
    needs_x, _call, _sources, _out, _product, *needs = ctx.needs_input_grad
    d_a: list[Tensor | None] = [None] * count
    d_b: list[Tensor | None] = [None] * count
    d_x: Tensor | None = None
    d_small = torch.empty_like(small)
    pieces, d_pieces = _split(small, a, 1), _split(d_small, a, 1)
    for i in range(count):
        gradient, gradients[i] = gradients[i], None
        if gradient is None:  # a member that was never called, or whose Y nobody used
            d_pieces[i].zero_()
            needs[i] = False
            continue
        rows = _rows(_as(gradient, dtype))
        d_pieces[i].addmm_(rows, _as(b[i], dtype), beta=0, alpha=call.scaling)
        if needs[count + i]:
            d_b[i] = _accurate(rows.t(), pieces[i])
        if needs_x:
            w = weight_of(call.bases[i], dtype)
            d_x = rows @ w if d_x is None else d_x.addmm_(rows, w)
            del w  # before the next one is unpacked
        del gradient, rows
    if any(needs[:count]):
        x = _as(call.recompute(*sources), dtype) if call.recompute else sources[0]
        found = _accurate(d_small.t(), _rows(x))
        for i, piece in enumerate(_split(found, a, 0)):
            d_a[i] = piece if needs[i] else None
    if d_x is not None:
        d_x = _as(d_x.addmm_(d_small, _stacked(a, dtype)).view(ctx.shape), ctx.dtype)
    return d_x, None, None, None, None, *d_a, *d_b


class _Result(torch.autograd.Function):
    """Y, computed by `product`, on a branch of its carrier. dY is left for the `_Branch` in the call."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, call: _Call, place: int, product: Callable[[], Tensor]) -> Tensor:
        ctx.call, ctx.place = call, place
        return product()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.call.gradients[ctx.place] = gradient
        return None, None, None, None


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without asking torch where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _rows(x: Tensor) -> Tensor:
    """x as a matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _stacked(matrices: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """All A below each other, in one dtype: sum of ranks × inputs."""
    return _as(matrices[0] if len(matrices) == 1 else torch.cat(matrices), dtype)


def _split(x: Tensor, a: tuple[Tensor, ...], dim: int) -> Sequence[Tensor]:
    """What belongs to each A of numbers side by side, as views."""
    return (x,) if len(a) == 1 else torch.split_with_sizes(x, [matrix.shape[0] for matrix in a], dim)


def _accurate(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 (float64 for float64). On a GPU the product's own sums are kept as they are; a CPU has no
    such product, and rounds them to the operands' dtype first."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else (left @ right).float()
