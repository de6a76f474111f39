"""Where the base's files lie: a local folder, or a Hub id and revision → a folder in the Hub's cache.

The small files (config, tokenizer, template) are fetched apart from the weights, so that a config can be checked and
its data prepared before gigabytes move.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.config.schema import Config, is_local_base
from finetune.errors import BaseError
from finetune.given_files import LFS_HINT, LFS_MESSAGE, is_lfs_pointer, not_a_file
from finetune.safetensors_heads import folder_tensors

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "README.md"]
WEIGHT_FILES = [*SMALL_FILES, "*.safetensors"]
NOT_OURS = ["consolidated*", "original/*"]
"""The same weights once more, in their maker's own format (Mistral, Llama): gigabytes that nothing here reads."""


def small_files(config: Config) -> Path:
    """The folder with the base's config.json and tokenizer files; fetched if the base is on the Hub."""
    return _folder(config, SMALL_FILES)


def weight_files(config: Config) -> Path:
    """The folder with all of the base, weights included (safetensors only; pickled weights are never fetched)."""
    folder = _folder(config, WEIGHT_FILES)
    if not folder.is_dir():
        raise BaseError(
            "there is no such folder any more",
            place=str(folder),
            hint="move the base back to where it was",
        )
    check_weights(folder)
    return folder


def check_weights(folder: Path) -> None:
    """Raise BaseError or StorageError unless a folder's weights are there, whole, and safe to read.

    Only their heads are read: a millisecond for a file, and long before anything is loaded.
    """
    folder_tensors(folder)


def read_model_config(folder: Path) -> dict[str, Any]:
    """The base's config.json."""
    path = folder / "config.json"
    if what := not_a_file(path):
        raise BaseError(f"is {what}, not a file", place=str(path), hint="download the model again")
    try:
        text = path.read_bytes()
        if is_lfs_pointer(text):
            raise BaseError(LFS_MESSAGE, place=str(path), hint=LFS_HINT)
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BaseError(
            "config.json cannot be read", place=str(path), hint="download the model again: this file is damaged"
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
        raise BaseError(
            "config.json names no model_type", place=str(path), hint="this is not a transformers model folder"
        )
    return value


def resolved_revision(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache (…/snapshots/<commit>), or None for a local folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _folder(config: Config, patterns: list[str]) -> Path:
    if is_local_base(config.base):
        return Path(config.base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(config.base, revision=config.revision, allow_patterns=patterns, ignore_patterns=NOT_OURS)
        )
    except GatedRepoError as error:
        raise BaseError(
            "access to this model must be granted first",
            place=config.base,
            hint=f"accept its licence on https://huggingface.co/{config.base}, then `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise BaseError(f"has no revision {config.revision!r}", place=config.base, hint="check `revision:`") from error
    except RepositoryNotFoundError as error:
        raise BaseError(
            "there is no such model on the Hub, or it is private",
            place=config.base,
            hint="check the name (owner/name; a folder begins with ./); for a private model, `hf auth login` first",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise BaseError(
            "is not in the local cache and the Hub cannot be reached",
            place=config.base,
            hint="connect to the network once, or set `base:` to a local folder",
        ) from error
