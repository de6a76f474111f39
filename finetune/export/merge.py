"""base + adapter = merged: the 16-bit base is streamed past the adapter, tensor by tensor.

Memory holds the adapter and the largest tensor that it changes (with its float32 change), never the model. Everything
that can be refused is refused before the first byte is written, and the folder takes its name when it is whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import BaseError, ExportError, Problem
from finetune.export.adapter import Adapter, read_adapter
from finetune.export.lora import LoraModule, merge_weight
from finetune.export.partial import copy_file, partial_folder, refuse_existing, require_space, write_text
from finetune.export.safetensors_io import (
    Checkpoint,
    CheckpointWriter,
    PlannedTensor,
    StoredTensor,
    largest,
    open_checkpoint,
)

if TYPE_CHECKING:
    import torch

DType = Literal["bfloat16", "float16", "float32"]
OnTensor = Callable[[int, int, str], None]
"""Called before each tensor with how many are done, how many there are, and this one's name."""

_STORED_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json",
)  # fmt: skip
"""What makes up a tokenizer on disk; those that exist are copied."""

_SMALL_FILES_BYTES = 64 * 2**20
"""Room for the configuration and the tokenizer, beside the weights."""


@dataclass(frozen=True)
class MergeReport:
    """What was made."""

    out: Path
    merged: int
    """Tensors that the adapter changed."""
    copied: int
    """Tensors taken over from the base (cast, if another dtype was asked for)."""
    nbytes: int
    """Size of the weights."""
    seconds: float


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    tokenizer: Path,
    dtype: DType | None,
    on_tensor: OnTensor | None = None,
) -> MergeReport:
    """Write the model folder `out`: the weights of `base` with `adapter` put in, and the run's own `tokenizer`.

    base       folder with config.json and 16- or 32-bit safetensors weights
    adapter    folder as PEFT saves it
    tokenizer  folder whose tokenizer files, chat template and generation_config.json are copied
    dtype      of the merged floating-point tensors; None keeps each tensor's own

    The weights are the same bits as PEFT's `merge_and_unload()` gives for a base loaded in that dtype.

    Raises ExportError for an adapter that does not fit the base or cannot be carried over in full, for numbers that
    are not finite, for a merge that would change nothing and for an `out` that exists; BaseError, RunError and
    StorageError for what cannot be read or written.
    """
    started = time.monotonic()
    refuse_existing(out)
    config = _read_base_config(base)
    files = _tokenizer_files(tokenizer)
    weights = open_checkpoint(base)
    changes = _match(read_adapter(adapter), weights, config)
    planned = [PlannedTensor(t.name, _target_dtype(t, dtype), t.shape) for t in weights.tensors.values()]
    size = sum(tensor.nbytes for tensor in planned)
    require_space(out, size + _SMALL_FILES_BYTES)
    with partial_folder(out) as folder:
        with CheckpointWriter(folder, planned) as writer:
            changed = 0
            for done, tensor in enumerate(writer.order):
                if on_tensor:
                    on_tensor(done, len(planned), tensor.name)
                if module := changes.get(tensor.name):
                    result, differs = _merged(weights, tensor, module)
                    changed += differs
                    writer.write(tensor.name, [result])
                else:
                    writer.write(tensor.name, _cast(weights, tensor))
        if not changed:
            raise ExportError(
                "the merged model is the base, bit for bit: the adapter is too weak to show in this dtype",
                place=str(adapter),
                hint="merge in float32 to see whether anything was learned",
            )
        write_text(folder / "config.json", json.dumps(_merged_config(config, planned), indent=2) + "\n")
        # The run's own says which tokens end an answer under the template it was trained with.
        for source in (tokenizer, base):
            if (source / "generation_config.json").is_file():
                copy_file(source / "generation_config.json", folder / "generation_config.json")
                break
        for file in files:
            copy_file(file, folder / file.name)
    return MergeReport(out, len(changes), len(planned) - len(changes), writer.total_bytes, time.monotonic() - started)


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


# -- tensor by tensor ---------------------------------------------------------------------------------------------


def _merged(weights: Checkpoint, planned: PlannedTensor, module: LoraModule) -> tuple[torch.Tensor, bool]:
    """The merged weight in its planned dtype, and whether it differs from the base's at all."""
    import torch

    before = _to(weights.read(planned.name), planned)
    after = merge_weight(before, module)
    _require_finite(after, planned.name, weights)
    return after, not torch.equal(after, before)


def _cast(weights: Checkpoint, planned: PlannedTensor) -> Iterator[torch.Tensor]:
    for chunk in weights.chunks(planned.name):
        cast = _to(chunk, planned)
        _require_finite(cast, planned.name, weights)
        yield cast


def _to(tensor: torch.Tensor, planned: PlannedTensor) -> torch.Tensor:
    import torch

    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    return tensor.to(names[planned.dtype]) if tensor.is_floating_point() else tensor


def _require_finite(tensor: torch.Tensor, name: str, weights: Checkpoint) -> None:
    if tensor.is_floating_point() and not largest(tensor) < float("inf"):
        raise ExportError(
            f"`{name}` would have values that are not finite numbers",
            place=str(weights.place),
            hint="float16 ends at 65504: merge in bfloat16 or float32",
        )


# -- the small files ----------------------------------------------------------------------------------------------


def _read_base_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseError("there is no config.json", place=str(base)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"is not valid JSON: {error}", place=str(path)) from error
    if not isinstance(config, dict):
        raise BaseError("is not a table", place=str(path))
    return config


def _merged_config(config: dict[str, Any], planned: list[PlannedTensor]) -> dict[str, Any]:
    """The base's configuration with the dtype that the weights have now, and without a quantiser's settings."""
    counts: dict[str, int] = {}
    for tensor in planned:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    main = max((dtype for dtype in counts if dtype in _STORED_NAMES.values()), key=lambda dtype: counts[dtype])
    name = next(long for long, short in _STORED_NAMES.items() if short == main)
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    return kept | {"dtype": name}


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json") for file in found):
        raise ExportError("there is no tokenizer here", place=str(folder))
    return found
