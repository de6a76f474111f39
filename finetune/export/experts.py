"""LoRA of bare parameters (`target_parameters`), mostly the stacked experts of a mixture.

In memory, transformers 5 holds a layer's experts as 3-D parameters: `mlp.experts.gate_up_proj`, (experts, 2 × inner,
hidden), and `down_proj`, (experts, hidden, inner). On disk there is mostly one tensor per expert and projection
(`conversion_mapping.py`: the first half of `gate_up_proj`'s rows is the gate). PEFT's `ParamWrapper` keeps one A,
(rank × experts, in), and one B, (out, rank × experts), for all experts: of A, an expert's rows lie together; of B, its
columns are `experts` apart.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.export.adapter import Adapter, LoraLayer
from finetune.export.lora import LoraModule
from finetune.export.safetensors_io import TensorInfo

if TYPE_CHECKING:
    import torch

SPLIT: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Parameter → what one expert's tensors may be called, in the order of their rows."""

_STORED_IN_BY_OUT = ("gpt_oss", "aria")
"""Families whose stacks are (experts, in, out): `is_transposed` in transformers' models."""

KEPT = 2
"""Stacks at a time: a layer has two, and their experts' tensors may lie in turn."""


@dataclass(frozen=True)
class Slice:
    """The part of a stack's LoRA that belongs to one tensor on disk."""

    tensor: str
    experts: int
    """How many there are in all; 1 for a plain 2-D parameter."""
    expert: int | None
    """Which one this tensor is; None if it holds all of them."""
    rows: tuple[int, int]
    """Which of B's rows."""
    transposed: bool


def slices(
    adapter: Adapter, layer: LoraLayer, module: str, tensors: Mapping[str, TensorInfo], family: str
) -> tuple[str, list[Slice]] | None:
    """Which parameter of `module` (its name on disk) a LoRA is of, by the shapes, and the tensors that hold it.

    An adapter's tensors do not say which parameter they are of. Two of a module's parameters cannot both fit.
    """
    for parameter in layer.parameters:
        rank = adapter.rank(f"{layer.module}.{parameter}")
        for found in _layouts(f"{module}.{parameter}", module, parameter, tensors, family):
            first = tensors[found[0].tensor]
            into = first.shape[-2] if found[0].transposed else first.shape[-1]
            stacked = rank * found[0].experts
            if layer.shape("A") == (stacked, into) and layer.shape("B") == (found[-1].rows[1], stacked):
                return f"{layer.module}.{parameter}", found
    return None


def stacked(module: str, parameter: str, tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """The tensors that hold a parameter of all experts: for each expert, those whose rows follow one another. Empty if
    it does not lie so. `module` is its name on disk."""
    for names in SPLIT.get(parameter, ()):
        found: list[list[str]] = []
        while all(f"{module}.{len(found)}.{name}.weight" in tensors for name in names):
            found.append([f"{module}.{len(found)}.{name}.weight" for name in names])
        if found:
            return found
    return []


class Stacks:
    """What is kept of an adapter's stacks while their experts are worked on, one after the other. Thread-safe.

    An expert's rows of A are read when they are wanted. Its columns of B lie through all of B, so B is read once and
    kept, as it is stored, until KEPT others were wanted.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def of_expert(self, layer: LoraLayer, part: Slice, expert: int, strength: float) -> LoraModule:
        """One expert's share of a stack's LoRA, as contiguous tensors."""
        rank = layer.shape("A")[0] // part.experts
        b = self._whole_b(layer)
        columns = b.reshape(b.shape[0], rank, part.experts)[part.rows[0] : part.rows[1], :, expert]
        return LoraModule(
            name=layer.module,
            a=layer.stored.rows(layer.parts["A"], expert * rank, rank).float(),
            b=columns.float().contiguous(),
            scaling=strength,
            transposed=part.transposed,
            magnitude=None,
            rounded=True,
        )

    def _whole_b(self, layer: LoraLayer) -> torch.Tensor:
        name = layer.parts["B"]
        with self._lock:  # also while it is read: who waits mostly wants the same
            found = self._kept.pop(name, None)
            self._kept[name] = layer.stored.read(name) if found is None else found  # the latest is the last
            if len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
            return self._kept[name]


def _layouts(
    stack: str, module: str, parameter: str, tensors: Mapping[str, TensorInfo], family: str
) -> list[list[Slice]]:
    """The ways in which a parameter lies on disk: as itself, or a tensor for each expert."""
    found = []
    if stack in tensors:
        shape = tensors[stack].shape
        if len(shape) == 2:
            found.append([Slice(stack, 1, None, (0, shape[0]), False)])
        elif len(shape) == 3:
            flipped = family in _STORED_IN_BY_OUT
            found.append([Slice(stack, shape[0], None, (0, shape[2 if flipped else 1]), flipped)])
    for names in SPLIT.get(parameter, ()):
        count = 0
        while f"{module}.{count}.{names[0]}.weight" in tensors:
            count += 1
        per_expert = _of_each(module, names, count, tensors)
        if count and per_expert:
            found.append(per_expert)
    return found


def _of_each(module: str, names: tuple[str, ...], count: int, tensors: Mapping[str, TensorInfo]) -> list[Slice]:
    """Empty unless all experts have the same shapes."""
    found = []
    for expert in range(count):
        position = 0
        for name in names:
            tensor = tensors.get(f"{module}.{expert}.{name}.weight")
            if tensor is None or tensor.shape != tensors[f"{module}.0.{name}.weight"].shape or len(tensor.shape) != 2:
                return []
            found.append(Slice(tensor.name, count, expert, (position, position + tensor.shape[0]), False))
            position += tensor.shape[0]
    return found
