"""base + adapter, tensor by tensor as they are asked for: the 16-bit base is streamed past the adapter.

Memory holds the adapter and the largest tensor that it changes (with its float32 change), never the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import ExportError, Problem
from finetune.export.adapter import Adapter, read_adapter
from finetune.export.lora import LoraModule, merge_weight
from finetune.export.safetensors_io import Checkpoint, StoredTensor, TensorInfo, largest, open_checkpoint
from finetune.export.source import Model, read_config

if TYPE_CHECKING:
    import torch

DType = Literal["bfloat16", "float16", "float32"]

_STORED_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def merged_model(base: Path, adapter: Path, *, tokenizer: Path, dtype: DType | None) -> MergedModel:
    """What `base` with `adapter` put in would be, nothing of it computed yet.

    base       folder with config.json and 16- or 32-bit safetensors weights
    adapter    folder as PEFT saves it
    tokenizer  folder with the run's own tokenizer and chat template
    dtype      of the merged floating-point tensors; None keeps each tensor's own

    The weights are the same bits as PEFT's `merge_and_unload()` gives for a base loaded in that dtype.

    Raises ExportError for an adapter that does not fit the base or cannot be carried over in full; BaseError, RunError
    and StorageError for what cannot be read.
    """
    config = read_config(base)
    weights = open_checkpoint(base)
    merged = MergedWeights(weights, _match(read_adapter(adapter), weights, config), dtype)
    return MergedModel(base, _merged_config(config, list(merged.tensors.values())), merged, tokenizer, adapter)


@dataclass(frozen=True)
class MergedModel(Model):
    """A base with its adapter."""

    weights: MergedWeights
    adapter: Path

    def require_change(self) -> None:
        """Raise ExportError if, after all tensors were read, none differs from the base's."""
        if not self.weights.changed:
            raise ExportError(
                "the merged model is the base, bit for bit: the adapter is too weak to show in this dtype",
                place=str(self.adapter),
                hint="merge in float32 to see whether anything was learned",
            )


class MergedWeights:
    """The tensors of a base with an adapter: computed when they are read, in the wanted dtype."""

    def __init__(self, base: Checkpoint, changes: Mapping[str, LoraModule], dtype: DType | None) -> None:
        self.place = base.place
        self.tensors = {t.name: TensorInfo(t.name, _target_dtype(t, dtype), t.shape) for t in base.tensors.values()}
        self.changes = changes
        self.changed: set[str] = set()
        """The tensors, of those read so far, that came out different from the base's."""
        self._base = base

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor. Raises ExportError for values that are not finite."""
        import torch

        if module := self.changes.get(name):
            before = self._to(self._base.read(name), name)
            after = merge_weight(before, module)
            self._require_finite(after, name)
            if not torch.equal(after, before):
                self.changed.add(name)
            return after
        return torch.cat(list(self.chunks(name))) if self.tensors[name].shape else next(self.chunks(name))

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The same tensor in groups of rows; in one piece if the adapter changes it."""
        if name in self.changes:
            yield self.read(name)
            return
        for chunk in self._base.chunks(name):
            cast = self._to(chunk, name)
            self._require_finite(cast, name)
            yield cast

    def _to(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        import torch

        names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
        return tensor.to(names[self.tensors[name].dtype]) if tensor.is_floating_point() else tensor

    def _require_finite(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.is_floating_point() and not largest(tensor) < float("inf"):
            raise ExportError(
                f"`{name}` would have values that are not finite numbers",
                place=str(self.place),
                hint="float16 ends at 65504: merge in bfloat16 or float32",
            )


# -- what goes where ----------------------------------------------------------------------------------------------


def _match(adapter: Adapter, weights: Checkpoint, config: dict[str, Any]) -> dict[str, LoraModule]:
    """Base tensor name → the adapter's module for it. Every module finds its tensor, or nothing is merged."""
    rename = _find_renaming(adapter, weights)
    changes: dict[str, LoraModule] = {}
    problems: list[str] = []
    for module in adapter.modules:
        name = rename(module.name) + ".weight"
        stored = weights.tensors.get(name)
        if config.get("tie_word_embeddings") and module.name.rpartition(".")[2] == "lm_head":
            problems.append(f"`{module.name}` shares its weight with the embedding, which a merge would change too")
        elif stored is None:
            problems.append(f"`{module.name}` of the adapter has no counterpart `{name}` in the base")
        elif not stored.is_float:
            problems.append(f"`{name}` is stored as {stored.dtype}: this base is quantised")
        elif stored.shape != module.weight_shape:
            problems.append(f"`{name}` has the shape {stored.shape}, the adapter was trained on {module.weight_shape}")
        else:
            changes[name] = module
    for module_name, kept in adapter.whole.items():
        if not _is_the_bases_own(adapter.stored, kept, weights, rename(module_name) + ".weight"):
            problems.append(f"`{module_name}` was trained in full, which a merge does not carry over yet")
    if problems:
        hint = "was the adapter trained on this base, and is the base the 16-bit one?"
        raise ExportError([Problem(message, str(adapter.place), hint) for message in _few(problems)])
    return changes


def _find_renaming(adapter: Adapter, weights: Checkpoint) -> Callable[[str], str]:
    """How a module's name in the live model becomes its name on disk.

    Mostly they are the same. Some bases were saved without the outermost module (`h.0.…` for `transformer.h.0.…`), and
    an adapter may have been trained on a model without its head (`layers.0.…` for `model.layers.0.…`).
    """
    first = adapter.modules[0].name.partition(".")[0]
    outer = {name.partition(".")[0] for name in weights.tensors}
    candidates = [("", ""), (f"{first}.", ""), *(("", f"{name}.") for name in sorted(outer))]
    for drop, add in candidates:
        if all(add + module.name.removeprefix(drop) + ".weight" in weights.tensors for module in adapter.modules):
            return lambda name, drop=drop, add=add: add + name.removeprefix(drop)  # type: ignore[misc]
    return lambda name: name


def _is_the_bases_own(saved: Checkpoint, name: str, weights: Checkpoint, base_name: str) -> bool:
    """Whether a weight that came with the adapter is the base's, in the adapter's dtype."""
    stored, base = saved.tensors[name], weights.tensors.get(base_name)
    if base is None or base.shape != stored.shape or not base.is_float or not stored.is_float:
        return False
    ours = saved.read(name)
    position = 0
    for chunk in weights.chunks(base_name):
        part = ours[position : position + len(chunk)]
        if not bool((chunk.to(part.dtype) == part).all()):
            return False
        position += len(chunk)
    return True


def _few(problems: list[str]) -> list[str]:
    return problems if len(problems) <= 5 else [*problems[:5], f"… and {len(problems) - 5} more of this kind"]


def _target_dtype(stored: StoredTensor, dtype: DType | None) -> str:
    if not stored.is_float:
        # Masks and position tables are integers or truth values; anything else is a quantiser's code.
        if stored.dtype.startswith("F") or (stored.dtype in ("U8", "I8") and len(stored.shape) == 2):
            raise ExportError(
                f"`{stored.name}` is stored as {stored.dtype}: this base is quantised",
                place=str(stored.file),
                hint="name the 16-bit base",
            )
        return stored.dtype
    return _STORED_NAMES[dtype] if dtype else stored.dtype


def _merged_config(config: dict[str, Any], planned: list[TensorInfo]) -> dict[str, Any]:
    """The base's configuration with the dtype that the weights have now, and without a quantiser's settings."""
    counts: dict[str, int] = {}
    for tensor in planned:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    main = max((dtype for dtype in counts if dtype in _STORED_NAMES.values()), key=lambda dtype: counts[dtype])
    name = next(long for long, short in _STORED_NAMES.items() if short == main)
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    return kept | {"dtype": name}
