"""Partial recomputation: as few layers give up their activations as the memory demands; where their inputs wait.

Recomputing a layer in the backward pass costs its forward pass again (Chen et al., arXiv 1604.06174). Memory rarely
demands that of every layer, so the number of layers is a number here. The first layers are the ones recomputed: their
turn in the backward pass comes last, when the layers that kept their activations have given them back, so that the
working set of the recomputation finds room there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated layers of a transformer, in order, each of which can be recomputed."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: PreTrainedModel, count: int, *, offload: bool = False) -> int:
    """Recompute the first `count` layers in the backward pass, and no other; 0 switches it off.

    offload  what recomputation starts from (one tensor of tokens × hidden a layer) waits in the machine's memory

    Returns how many layers are recomputed: `count`, or as many as there are.
    """
    layers = blocks(model)
    # Random numbers need to be the same again only where there are any; restoring them costs a copy of their state.
    function: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=_draws(model))
    if offload:
        function = Offload(function)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count  # type: ignore[assignment]
        layer._gradient_checkpointing_func = function  # type: ignore[assignment]
    return min(count, len(layers))


def _draws(model: PreTrainedModel) -> bool:
    """Whether a forward pass in training draws random numbers."""
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    settings = model.config.get_text_config().to_dict()
    return any(isinstance(value, float) and value > 0 for key, value in settings.items() if "drop" in key)


class Offload:
    """A checkpoint whose input waits in pinned memory of the machine, copied while the GPU computes on.

    What `checkpoint` saves of its positional arguments goes through the hooks that are active where it is called;
    inside it has hooks of its own. So only the input of a layer is moved, and nothing else. On the way back the layer
    before is fetched while one is recomputed, because that is the next to be asked for.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """`function` is called as torch's checkpoint is: with a function and its positional arguments."""
        self._function = function
        # Held by the graph that autograd makes, and gone with it: a step that is broken off leaves nothing behind.
        self._waiting: list[weakref.ref[_Away]] = []
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self._function(run, *args)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Away:
        if tensor.numel() == 0 or not tensor.is_floating_point():
            return tensor  # what `checkpoint` keeps beside the inputs is empty
        away = _Away(tensor, self._copying(tensor.device))
        self._waiting = [known for known in self._waiting if known() is not None]
        self._waiting.append(weakref.ref(away))
        return away

    def _unpack(self, packed: torch.Tensor | _Away) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._waiting = [known for known in self._waiting if known() not in (None, packed)]
        tensor = packed.take()
        before = self._waiting[-1]() if self._waiting else None
        if before is not None:
            before.fetch()
        return tensor

    def _copying(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream


class _Away:
    """A tensor that is not on its device at the moment."""

    def __init__(self, tensor: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = tensor.device, stream
        self._back: torch.Tensor | None = None
        self._kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self._kept.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._kept.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given to others before the copy is made

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._kept.clone()
            return
        with torch.cuda.stream(self._stream):
            self._back = self._kept.to(self._device, non_blocking=True)

    def take(self) -> torch.Tensor:
        """The tensor, on its device."""
        self.fetch()
        assert self._back is not None
        tensor, self._back = self._back, None
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            tensor.record_stream(now)
        return tensor
