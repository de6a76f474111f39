"""A model that can be written out: configuration, tensors, tokenizer, whether or not they lie in one folder.

`open_model` reads one from disk; `merge.merged_model` makes one of a base and an adapter, tensor by tensor as they are
asked for. Whoever writes (safetensors, GGUF) does not see the difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.errors import BaseError
from finetune.export.safetensors_io import TensorInfo, open_checkpoint

if TYPE_CHECKING:
    import torch


_AGAIN = "download the model again: its config.json is missing or damaged"


class Weights(Protocol):
    """Tensors by name. `Checkpoint` is one; so is a base with its adapter."""

    @property
    def place(self) -> Path:
        """What messages name: a folder or a file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's dtype and shape, in the order of the files."""

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU."""

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The same tensor in groups of rows along its first dimension."""


@dataclass(frozen=True)
class Model:
    """All that makes up a model folder."""

    place: Path
    """What messages name."""
    config: Mapping[str, Any]
    """config.json, as it is or would be written."""
    weights: Weights
    tokenizer: Path
    """The folder with the tokenizer, its chat template and, mostly, generation_config.json."""


def open_model(folder: Path) -> Model:
    """A model folder on disk. Raises BaseError and StorageError for what is missing or damaged."""
    return Model(folder, read_config(folder), open_checkpoint(folder), folder)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises BaseError if there is none, or none that is valid."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseError("there is no config.json", place=str(folder), hint=_AGAIN) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(f"is not valid JSON: {error}", place=str(path), hint=_AGAIN) from error
    if not isinstance(config, dict):
        raise BaseError("is not a table", place=str(path), hint=_AGAIN)
    return config
