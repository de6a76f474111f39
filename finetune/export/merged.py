"""base + adapter, tensor by tensor as they are asked for: the 16-bit base is streamed past the adapter.

Memory holds a few rows of a weight and the LoRA that belongs to it, never the model and never the adapter. (DoRA on an
embedding, and weights that go through NF4, take one whole weight.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import ExportError
from finetune.export.adapter import read_adapter
from finetune.export.base_identity import check_base
from finetune.export.nf4 import nf4_round_trip, quantised_modules
from finetune.export.plan import Plan, plan
from finetune.export.renaming import EMBEDDINGS
from finetune.export.safetensors_io import Checkpoint, StoredTensor, TensorInfo, largest, open_checkpoint, pieces
from finetune.export.source import Model, read_config

if TYPE_CHECKING:
    import torch

DType = Literal["bfloat16", "float16", "float32"]

BasePrecision = Literal["stored", "nf4"]

_STORED_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def merged_model(
    base: Path,
    adapter: Path | Sequence[Path],
    *,
    tokenizer: Path,
    dtype: DType | None,
    base_precision: BasePrecision = "stored",
    recorded: Mapping[str, Any] | None = None,
) -> MergedModel:
    """What `base` with `adapter` put in would be, nothing of it computed yet.

    base            folder with config.json and 16- or 32-bit safetensors weights
    adapter         folder as PEFT saves it, or several, merged one after the other
    tokenizer       folder with the run's own tokenizer and chat template
    dtype           of the merged floating-point tensors; None keeps each tensor's own (of float64: float32)
    base_precision  "nf4": onto the weights that QLoRA training saw, in `dtype`, which should be the one it computed in
    recorded        a run's manifest, to be compared with the base (`check_base`)

    The weights are the same bits as PEFT's `merge_and_unload()` gives for a base loaded in that dtype, except where
    PEFT is wrong: a LoRA on an embedding or output layer that share their weight unties them.

    Reads the base's headers and the adapter. Raises ExportError for an adapter that does not fit the base or cannot be
    carried over in full; BaseError, RunError and StorageError for what cannot be read.
    """
    config = read_config(base)
    if recorded is not None:
        check_base(recorded, base)
    weights = open_checkpoint(base)
    _check_shapes(config, weights)
    folders = (adapter,) if isinstance(adapter, Path) else tuple(adapter)
    if not folders:
        raise ExportError("there is no adapter to merge", place=str(base))
    quantised = quantised_modules(config) if base_precision == "nf4" else frozenset[str]()
    planned = plan([read_adapter(folder) for folder in folders], weights, config, quantised)
    merged = MergedWeights(weights, planned, dtype)
    merged_config = _merged_config(config, list(merged.tensors.values()), untied=planned.untied)
    return MergedModel(base, merged_config, merged, tokenizer, folders)


@dataclass(frozen=True)
class MergedModel(Model):
    """A base with its adapter."""

    weights: MergedWeights
    adapters: tuple[Path, ...]

    def require_change(self) -> None:
        """Raise ExportError if, after all tensors were read, none differs from the base's."""
        if not self.weights.changed:
            raise ExportError(
                "the merged model is the base, bit for bit: the adapter is too weak to show in this dtype",
                place=str(self.adapters[0]),
                hint="merge in float32 to see whether anything was learned",
            )


class MergedWeights:
    """The tensors of a base with an adapter: computed when they are read, in the wanted dtype. Thread-safe."""

    def __init__(self, base: Checkpoint, planned: Plan, dtype: DType | None) -> None:
        self.place = base.place
        self.tensors = {
            name: TensorInfo(name, _target_dtype(base.tensors[recipe.like], dtype), base.tensors[recipe.like].shape)
            for name, recipe in planned.recipes.items()
        }
        self.changes = {name for name, recipe in planned.recipes.items() if recipe.changes or recipe.source is not base}
        """The tensors that adapters change."""
        self.changed: set[str] = set()
        """Those of them, of what was read so far, that came out different from the base's."""
        self._base = base
        self._recipes = planned.recipes

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor. Raises ExportError for values that are not finite."""
        import torch

        found = list(self.chunks(name))
        return torch.cat(found) if len(found) > 1 else found[0]

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The same tensor in groups of rows."""
        for first, count in self.pieces(name):
            yield self.rows(name, first, count)

    def pieces(self, name: str) -> list[tuple[int, int]]:
        """(first row, rows) of the groups that a tensor comes in; one, where its rows depend on each other."""
        tensor = self.tensors[name]
        return [(0, tensor.rows)] if self._recipes[name].needs_whole else pieces(tensor)

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """One of `pieces`, in memory that nobody else holds."""
        import torch

        recipe = self._recipes[name]
        rows = self._to(recipe.source.rows(recipe.name, first, count), name)
        if recipe.source is not self._base and not self.changed:
            before = self._to(self._base.rows(recipe.like, first, count), name)
            if not torch.equal(before, rows):
                self.changed.add(name)
        if recipe.quantised:
            rows = nf4_round_trip(rows.T).T if recipe.flipped else nf4_round_trip(rows)
        needs_base = any(change.needs_base for change in recipe.changes[1:])
        before = rows.clone() if needs_base else rows
        for change in recipe.changes:
            if change.apply(rows, before, first):
                self.changed.add(name)
        self._require_finite(rows, name)
        return rows

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


# -- the base -----------------------------------------------------------------------------------------------------


def _check_shapes(config: Mapping[str, Any], weights: Checkpoint) -> None:
    """Raise ExportError if config.json speaks of another embedding than the weights have: a folder of two models."""
    text = config.get("text_config")
    settings = text if isinstance(text, dict) else config
    for tensor in weights.tensors.values():
        path = tensor.name.split(".")
        if path[-1] != "weight" or len(path) < 2 or path[-2] not in EMBEDDINGS or len(tensor.shape) != 2:
            continue
        for key, size in zip(("vocab_size", "hidden_size"), tensor.shape, strict=True):
            said = settings.get(key, settings.get("n_embd") if key == "hidden_size" else None)
            if isinstance(said, int) and said != size and "word_embed_proj_dim" not in settings:
                raise ExportError(
                    f"`{tensor.name}` has the shape {tensor.shape}, and config.json says `{key}` {said}",
                    place=str(weights.place),
                    hint="weights and config.json are of different models: download both again",
                )


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
    # Nobody trains in float64, and what an adapter adds is float32.
    return _STORED_NAMES[dtype or "float32"] if dtype or stored.dtype == "F64" else stored.dtype


def _merged_config(config: dict[str, Any], planned: list[TensorInfo], *, untied: bool) -> dict[str, Any]:
    """The base's configuration with the dtype that the weights have now, and without a quantiser's settings."""
    counts: dict[str, int] = {}
    for tensor in planned:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    main = max((dtype for dtype in counts if dtype in _STORED_NAMES.values()), key=lambda dtype: counts[dtype])
    name = next(long for long, short in _STORED_NAMES.items() if short == main)
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    if untied:
        kept["tie_word_embeddings"] = False
        if isinstance(text := kept.get("text_config"), dict):
            kept["text_config"] = text | {"tie_word_embeddings": False}
    return kept | _for_older_readers(kept) | {"dtype": name}


def _for_older_readers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where transformers before 5 had what `rope_parameters` says now.

    mlx-lm 0.32 reads only these keys and silently takes its own theta without them: a Qwen 2 then says something else
    from the first token on. transformers 5 takes `rope_parameters` where there are both.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}  # none, or one for each kind of layer, which there was no old way to say
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    kind = rope.get("rope_type", rope.get("type", "default"))  # as `standardize_rope_params` of transformers reads it
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": None if kind == "default" else scaling}
    return {key: value for key, value in old.items() if key not in config}
