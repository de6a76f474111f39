"""base + adapter = merged: a model folder that needs no PEFT.

Everything that can be refused is refused before the first byte is written, and the folder takes its name when it is
whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import ExportError
from finetune.export.merged import DType, merged_model
from finetune.export.partial import copy_file, partial_folder, refuse_existing, require_space, write_text
from finetune.export.safetensors_io import CheckpointWriter

OnTensor = Callable[[int, int, str], None]
"""Called before each tensor with how many are done, how many there are, and this one's name."""

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

    Arguments and errors as for `merged_model`; also ExportError for numbers that are not finite, for a merge that would
    change nothing and for an `out` that exists, StorageError for what cannot be written.
    """
    started = time.monotonic()
    refuse_existing(out)
    files = _tokenizer_files(tokenizer)
    model = merged_model(base, adapter, tokenizer=tokenizer, dtype=dtype)
    planned = list(model.weights.tensors.values())
    require_space(out, sum(tensor.nbytes for tensor in planned) + _SMALL_FILES_BYTES)
    with partial_folder(out) as folder:
        with CheckpointWriter(folder, planned) as writer:
            for done, tensor in enumerate(writer.order):
                if on_tensor:
                    on_tensor(done, len(planned), tensor.name)
                writer.write(tensor.name, model.weights.chunks(tensor.name))
        model.require_change()
        write_text(folder / "config.json", json.dumps(model.config, indent=2) + "\n")
        # The run's own says which tokens end an answer under the template it was trained with.
        for source in (tokenizer, base):
            if (source / "generation_config.json").is_file():
                copy_file(source / "generation_config.json", folder / "generation_config.json")
                break
        for file in files:
            copy_file(file, folder / file.name)
    merged = len(model.weights.changes)
    return MergeReport(out, merged, len(planned) - merged, writer.total_bytes, time.monotonic() - started)


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json") for file in found):
        raise ExportError("there is no tokenizer here", place=str(folder))
    return found
