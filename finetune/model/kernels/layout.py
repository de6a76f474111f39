"""How the rows of a micro batch are laid out for a model, so that none sees another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from finetune.errors import ConfigError
from finetune.model.kernels.attention import sees_neighbour, supports_varlen

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Layout = Literal["line", "padded", "masked"]
"""line: all rows end to end, told apart by where each begins (varlen attention). padded: a line for each sequence, told
apart by position ids that start again. masked: the same, with a mask that says which token sees which."""


def layout_for(
    model: PeftModel, device: str, attention: Literal["auto", "varlen", "sdpa"], packed: bool
) -> tuple[Layout, str]:
    """The quickest layout that this model computes rightly, and the reason. Each is tried on the model itself.

    packed  whether a sequence has several rows

    Raises ConfigError where packed rows would see each other whatever is done: that must never be trained.
    """
    line, why = (False, "as configured") if attention == "sdpa" else supports_varlen(model, device)
    if line:
        return "line", f"varlen: {why}"
    if not packed or sees_neighbour(model, {}) is None:
        return "padded", f"with a mask: {why}"
    # Families whose mask knows nothing of positions (Falcon) must be given one.
    if sees_neighbour(model, {"attention_mask": _two_rows(model)}) is None:
        return "masked", f"with a mask of our own: {why}"
    kind = model.config.model_type
    raise ConfigError(
        f"train.packing: packed rows would see each other in a model of type {kind}",
        hint="set train.packing: false; rows are then trained on one by one",
    )


def rows_mask(row: torch.Tensor) -> torch.Tensor:
    """Which token sees which: those before it in its own row, and itself. (lines, tokens) → bool (lines, 1, tokens,
    tokens); `row` has the number of the row that a token stands in."""
    same = row.unsqueeze(1) == row.unsqueeze(2)
    return same.tril().unsqueeze(1)


def _two_rows(model: PeftModel) -> torch.Tensor:
    import torch

    return rows_mask(torch.tensor([[0, 0, 0, 1, 1, 1]], device=model.device))
