"""Put the faster layers on a model, say what was done, and take them off again.

Nothing of a library is changed: an instance of a module gets a `forward` of its own, which hides its class's. Names of
parameters, and with them adapters and checkpoints, stay as they are. Without gradients (evaluation, answers) every
layer is computed as its library does it. A module is recognised by its parts *and* by what it computes: its own forward
and ours are compared on a few numbers first, and where they differ it is left alone. So are a library's kernels with
torch's functions (`trial.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.model.kernels.fused import TORCH, Kernels, Rotate, kernels_for
from finetune.model.kernels.lora import Adapted, Group, remember
from finetune.model.kernels.trial import norm_fails, numbers, rotate_fails, swiglu_fails

if TYPE_CHECKING:
    from peft import PeftModel

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that are called with the same tensor, in this order. Where they are not, nothing breaks."""

ROTARY = "apply_rotary_pos_emb"
"""What transformers calls the rotary embedding, in the file of every model."""


@dataclass
class Applied:
    """What was replaced, in numbers, and what was not."""

    linears: int = 0
    """LoRA layers, and of them in a group with others:"""
    grouped: int = 0
    norms: int = 0
    swiglus: int = 0
    rotaries: int = 0
    kernels: str = TORCH.name
    """Whose norms, SwiGLUs and rotaries they are: torch or liger-kernel."""
    left: Counter[str] = field(default_factory=Counter)
    """What was left alone and why, and how often."""
    refused: dict[str, str] = field(default_factory=dict)
    """Which kernels of the library were tried and are not used, but torch's in their place, and why."""
    _undo: list[Callable[[], object]] = field(default_factory=list)

    def account(self) -> str:
        """One line for a person."""
        counts = (
            (self.linears, f"LoRA linears ({self.grouped} share their input)"),
            (self.norms, "norms"),
            (self.swiglus, "SwiGLUs"),
            (self.rotaries, "rotary embeddings"),
        )
        done = ", ".join(f"{count} {what}" for count, what in counts if count) or "nothing"
        left = "".join(f"; left alone: {count} × {what}" for what, count in self.left.most_common())
        whose = f" ({self.kernels})" if self.norms or self.swiglus or self.rotaries else ""
        refused = "".join(f"; {what} by torch: {why}" for what, why in self.refused.items())
        return f"{done}{whose}{left}{refused}"

    def restore(self) -> None:
        """Every layer is its library's own again."""
        while self._undo:
            self._undo.pop()()

    def replace(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = forward
        self._undo.append(lambda: module.__dict__.pop("forward"))


def apply(model: PeftModel, *, lora: bool, fused: bool, device: str) -> Applied:
    """Replace the forward of LoRA linears (`lora`), and of norms, SwiGLUs and rotary embeddings (`fused`).

    device  "cpu" or "cuda": with the latter, the fused ones are liger-kernel's if it is installed
    """
    applied = Applied()
    if lora:
        _apply_lora(model, applied)
    if fused:
        kernels, why = kernels_for(device)
        if why is not None:
            applied.refused["fused layers"] = why
        _apply_fused(model, applied, kernels)
    return applied


def _apply_lora(model: PeftModel, applied: Applied) -> None:
    from peft.tuners.lora.layer import LoraLayer

    adapters = list(model.active_adapters)
    usable: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            reason = _not_ours(module, adapters)
            if reason:
                applied.left[reason] += 1
            else:
                usable[module] = adapters[0]
    for parent in model.modules():
        for names in SAME_INPUT:
            children = [child for name in names if (child := getattr(parent, name, None)) in usable]
            if len(children) > 1 and len({child.in_features for child in children}) == 1:
                group = Group()
                for child in children:
                    applied.replace(child, Adapted(child, usable.pop(child), group).forward)
                applied._undo.append(parent.register_forward_hook(group.forget, always_call=True).remove)
                applied.linears += len(children)
                applied.grouped += len(children)
    for layer, name in usable.items():
        applied.replace(layer, Adapted(layer, name, Group()).forward)
        applied.linears += 1


def _not_ours(layer: Any, adapters: list[str]) -> str | None:
    """Why a layer of PEFT's keeps PEFT's forward; None if it need not."""
    base = layer.base_layer
    kinds = {
        ("peft.tuners.lora.layer", "Linear"): {"Linear", "FalconLinear"},
        ("peft.tuners.lora.bnb", "Linear4bit"): {"Linear4bit"},
        ("peft.tuners.lora.bnb", "Linear8bitLt"): {"Linear8bitLt"},
    }
    bases = kinds.get((type(layer).__module__, type(layer).__name__), set())
    if type(base).__name__ not in bases or type(base).__module__.split(".")[0] not in _LIBRARIES:
        return f"LoRA on {type(base).__name__}"
    if len(adapters) != 1 or adapters[0] not in layer.lora_A:
        return "LoRA with several adapters"
    name = adapters[0]
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "LoRA with dropout"
    if name in layer.lora_variant or layer.lora_bias[name] or getattr(layer, "fan_in_fan_out", False):
        return "a variant of LoRA"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "LoRA on a base that is trained itself"
    if getattr(base, "support_avx512bf16_for_cpu", False) and base.weight.device.type == "cpu":
        return "LoRA on weights that bitsandbytes may repack"
    if "forward" in layer.__dict__:
        return "LoRA whose forward is replaced already"
    return None


_LIBRARIES = ("torch", "transformers", "bitsandbytes")


def _apply_fused(model: PeftModel, applied: Applied, kernels: Kernels) -> None:
    applied.kernels = kernels.name
    dtype = model.get_base_model().get_input_embeddings().weight.dtype
    tried = _Tried(kernels, dtype, model.device, applied.refused)
    seen: dict[tuple[object, ...], Callable[..., Tensor] | None] = {}

    def once(
        what: str, module: nn.Module, width: object, make: Callable[[Any, _Tried], Callable[..., Tensor] | None]
    ) -> bool:
        """Replace a module's forward by what was made for its class and width; False if there is nothing for it."""
        key = what, type(module), width
        if key not in seen:
            seen[key] = make(module, tried)
        forward = seen[key]
        if forward is None or "forward" in module.__dict__:
            applied.left[f"{what} of {type(module).__name__}"] += 1
            return False
        applied.replace(module, MethodType(forward, module))
        return True

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight = getattr(module, "weight", None)
            applied.norms += once("norm", module, getattr(weight, "shape", None), _norm)
        elif all(isinstance(getattr(module, part, None), nn.Module) for part in ("gate_proj", "up_proj", "down_proj")):
            applied.swiglus += once("MLP", module, _width(module), _swiglu)
        elif ROTARY in getattr(type(module).forward, "__globals__", {}) and "Attention" in type(module).__name__:
            applied.rotaries += once("rotary embedding", module, _heads(module), _attention)


@dataclass(frozen=True)
class _Tried:
    """Kernels, and what is left of them after each was tried as it is to be used."""

    kernels: Kernels
    dtype: torch.dtype
    """Of hidden states."""
    device: torch.device
    refused: dict[str, str]

    def unless(self, what: str, failure: str | None) -> Kernels:
        """The kernels, or torch's if they failed."""
        if failure is None:
            return self.kernels
        self.refused.setdefault(what, f"{self.kernels.name} fails here: {failure}")
        return TORCH


def _width(module: nn.Module) -> int | None:
    width = getattr(module.gate_proj, "out_features", None)
    return width if isinstance(width, int) else None


def _heads(module: nn.Module) -> tuple[int, int, int] | None:
    """Heads of queries and of keys, and their width, as transformers' attention says them."""
    config, width = getattr(module, "config", None), getattr(module, "head_dim", None)
    queries = getattr(config, "num_attention_heads", None)
    keys = getattr(config, "num_key_value_heads", None) or queries
    if isinstance(width, int) and isinstance(queries, int) and isinstance(keys, int):
        return queries, keys, width
    return None


def _norm(module: Any, tried: _Tried) -> Callable[..., Tensor] | None:
    """A forward for modules like this one, if it is Llama's or Gemma's norm."""
    weight, plain = getattr(module, "weight", None), type(module).forward
    name = next((name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)), None)
    if name is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    x = numbers(3, weight.numel()).to(weight) * 1e-3  # so small that an epsilon makes a difference
    for gemma in (False, True):
        ours = partial(TORCH.norm, x, weight, getattr(module, name), gemma)
        if _agree(partial(plain, module, x), ours, tolerance=0.0):
            failure = norm_fails(tried.kernels, weight, getattr(module, name), gemma, tried.dtype)
            return _norm_forward(plain, name, gemma, tried.unless(f"norms of {weight.numel()}", failure))
    return None


def _norm_forward(plain: Callable[..., Tensor], epsilon: str, gemma: bool, kernels: Kernels) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(self, hidden_states)

        def compute(x: Tensor, weight: Tensor) -> Tensor:
            return kernels.norm(x, weight, getattr(self, epsilon), gemma)

        return remember(compute(hidden_states, self.weight), compute, hidden_states, self.weight)

    return forward


def _swiglu(module: Any, tried: _Tried) -> Callable[..., Tensor] | None:
    """A forward for modules like this one, if it is down(silu(gate(x)) · up(x)).

    Its code is tried on stand-ins for its three linears: no weight is read, and no dropout drawn.
    """
    plain = type(module).forward
    x = numbers(3, 8)
    stand_in = SimpleNamespace(
        act_fn=getattr(module, "act_fn", None), gate_proj=torch.exp, up_proj=torch.cos, down_proj=torch.neg
    )
    agree = _agree(partial(plain, stand_in, x), lambda: -TORCH.swiglu(x.exp(), x.cos()), tolerance=0.0)
    if not agree:
        return None
    width, failure = _width(module), None if tried.kernels is TORCH else "its width is not known"
    if width is not None:
        failure = swiglu_fails(tried.kernels, width, tried.dtype, tried.device)
    kernel = tried.unless(f"SwiGLUs of {width}", failure).swiglu

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(self, x)  # type: ignore[no-any-return]
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(remember(kernel(gate, up), kernel, gate, up))  # type: ignore[no-any-return]

    return forward


def _attention(module: Any, tried: _Tried) -> Callable[..., Tensor] | None:
    """The class's own forward with another rotary embedding, if the one that it calls turns q and k as Llama's does.

    The rotary embedding is a function of the model's file, which its attention calls by name. This is the same code,
    in which that one name means something else.
    """
    plain = type(module).forward
    original = plain.__globals__.get(ROTARY)
    if not isinstance(plain, FunctionType) or ROTARY not in plain.__code__.co_names or not callable(original):
        return None
    q, k = numbers(2, 3, 4, 8).transpose(1, 2), numbers(2, 3, 2, 8).transpose(1, 2)
    cos, sin = numbers(2, 3, 8), numbers(2, 3, 8) + 0.5
    if not _agree(lambda: torch.cat(original(q, k, cos, sin), 1), lambda: torch.cat(TORCH.rotate(q, k, cos, sin), 1)):
        return None
    heads, failure = _heads(module), None if tried.kernels is TORCH else "the number of its heads is not known"
    if heads is not None:
        failure = rotate_fails(tried.kernels, heads[:2], heads[2], tried.dtype, tried.device)
    kernels = tried.unless("rotary embeddings", failure)
    names = {**plain.__globals__, ROTARY: _rotary(original, kernels.rotate)}
    forward = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    return forward


def _rotary(original: Rotate, rotate: Rotate) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        whole = cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1] and q.dtype == k.dtype == cos.dtype
        if args or kwargs or not whole or not torch.is_grad_enabled():
            return original(q, k, cos, sin, *args, **kwargs)
        return rotate(q, k, cos, sin)

    return rotary


def _agree(theirs: Callable[[], Tensor], ours: Callable[[], Tensor], tolerance: float = 1e-6) -> bool:
    """Whether both give the same numbers. Whatever cannot be called like this is not what it was taken for."""
    with torch.no_grad():
        try:
            left, right = theirs(), ours()
        except Exception:
            return False
    return left.shape == right.shape and left.dtype == right.dtype and torch.allclose(left, right, tolerance, tolerance)
