"""The faster ways to compute a step: which of them fit this model, put onto it, and taken off again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.model.base import LoadedModel
from finetune.model.kernels.apply import apply
from finetune.model.kernels.attention import use_varlen
from finetune.model.kernels.head import supports_head
from finetune.model.kernels.layout import Layout, layout_for
from finetune.model.recompute import blocks, recompute_layers

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class Faster:
    """What was done to a model for the time of its training."""

    model: PeftModel
    layout: Layout
    """How batches are laid out."""
    head: bool
    """The loss comes from our head, with its gradient."""
    reasons: dict[str, str]
    """Of each way: whether it is taken, and why not."""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def restore(self) -> None:
        """The model as it was: what is evaluated next is what everybody else will run."""
        while self._undo:
            self._undo.pop()()
        recompute_layers(self.model, 0)


def make_faster(config: Config, loaded: LoadedModel, *, packed: bool) -> Faster:
    """Put the faster ways that `speed:` allows onto a model with its adapter. Tensors and their names stay.

    Raises ConfigError where rows are packed and the model cannot keep them apart.
    """
    speed, model, device = config.speed, loaded.model, loaded.hardware.device
    reasons: dict[str, str] = {}
    undo: list[Callable[[], None]] = []

    layout, reasons["attention"] = layout_for(model, device, speed.attention, packed)
    if layout == "line":
        use_varlen(model)
        undo.append(lambda: use_varlen(model, False))
    elif speed.attention == "varlen":
        raise ConfigError(
            f"speed.attention: varlen is not possible: {reasons['attention']}", hint="leave it out: auto takes what is"
        )

    head, why = supports_head(model) if speed.head else (False, "as configured")
    reasons["head"] = f"{'loss and gradient together' if head else 'as TRL computes it'}: {why}"

    if speed.compile:
        # The compiler fuses by itself, and sees neither into autograd functions nor into what is kept between calls.
        for layer in blocks(model):
            layer.compile(dynamic=True)
        undo.append(lambda: _uncompile(model))
        reasons["layers"] = "each compiled, as configured, in place of kernels of our own"
    else:
        applied = apply(model, lora=speed.lora, fused=speed.fused is not False, device=device)
        undo.append(applied.restore)
        reasons["layers"] = applied.account()
        if speed.fused is True and not applied.norms + applied.swiglus + applied.rotaries:
            raise ConfigError(
                f"speed.fused: nothing of this model can be fused: {reasons['layers']}",
                hint="leave it out: auto takes what there is",
            )
    return Faster(model, layout, head, reasons, undo)


def _uncompile(model: PeftModel) -> None:
    for layer in blocks(model):
        layer._compiled_call_impl = None
