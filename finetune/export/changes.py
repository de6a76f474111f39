"""What one adapter does to one tensor of the base, a few rows at a time.

A change works in place on rows that nobody else holds, and says whether it made a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from finetune.export.adapter import LoraLayer, TrainedTokens
from finetune.export.experts import Slice, Stacks
from finetune.export.lora import LoraModule, merge_rows, row_blocks
from finetune.export.safetensors_io import Checkpoint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AddLora:
    """A LoRA on its weight."""

    layer: LoraLayer
    strength: float

    @property
    def needs_whole(self) -> bool:
        return "dora" in self.layer.parts and (self.layer.embedding or self.layer.fan_in_fan_out)

    @property
    def needs_base(self) -> bool:
        """Whether it matters how the weight was before other adapters."""
        return "dora" in self.layer.parts

    def apply(self, rows: torch.Tensor, base: torch.Tensor, first: int) -> bool:
        """`rows` are the weight's as they are now, from row `first` on, `base` as they were."""
        return _merge_in_place(rows, base, self.layer.load(self.strength), first, whole=self.needs_whole)


@dataclass(frozen=True)
class AddToExperts:
    """A LoRA of stacked experts, on the tensor of one of them or of all."""

    layer: LoraLayer
    strength: float
    part: Slice
    stacks: Stacks
    needs_whole: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False

    def apply(self, rows: torch.Tensor, base: torch.Tensor, first: int) -> bool:
        """`rows` begin at the tensor's row `first`; of a tensor that holds all experts, at that expert."""
        if self.part.expert is not None:
            module = self.stacks.of_expert(self.layer, self.part, self.part.expert, self.strength)
            return _merge_in_place(rows, base, module, first, whole=False)
        changed = False
        for number, expert in enumerate(rows):
            module = self.stacks.of_expert(self.layer, self.part, first + number, self.strength)
            changed |= _merge_in_place(expert, base[number], module, 0, whole=False)
        return changed


@dataclass(frozen=True)
class AddBias:
    """The bias of lora_B (`lora_bias`), on the layer's own."""

    layer: LoraLayer
    strength: float
    needs_whole: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False

    def apply(self, rows: torch.Tensor, base: torch.Tensor, first: int) -> bool:
        import torch

        added = self.layer.read("bias")[first : first + len(rows)].mul_(self.strength).add_(rows).to(rows.dtype)
        changed = not torch.equal(added, rows)
        rows.copy_(added)
        return changed


@dataclass(frozen=True)
class ReplaceRows:
    """Trained tokens: some rows of an embedding, in full."""

    tokens: TrainedTokens
    stored: Checkpoint
    needs_whole: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False

    def apply(self, rows: torch.Tensor, base: torch.Tensor, first: int) -> bool:
        import torch

        here = [(at, row - first) for at, row in enumerate(self.tokens.indices) if first <= row < first + len(rows)]
        if not here:
            return False
        taken, placed = (torch.tensor(numbers) for numbers in zip(*here, strict=True))
        values = self.stored.read(self.tokens.tensor)[taken].to(rows.dtype)
        changed = not torch.equal(rows[placed], values)
        rows[placed] = values
        return changed


Change = AddLora | AddToExperts | AddBias | ReplaceRows


def _merge_in_place(rows: torch.Tensor, base: torch.Tensor, module: LoraModule, first: int, *, whole: bool) -> bool:
    import torch

    changed = False
    columns = rows.shape[1]
    for start, count in [(0, len(rows))] if whole else row_blocks(len(rows), columns):
        block = slice(start, start + count)
        merged = merge_rows(rows[block], base[block], module, first + start)
        changed = changed or not torch.equal(merged, rows[block])
        rows[block] = merged
    return changed
