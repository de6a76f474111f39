"""What is known of a base without its weights: its shape, and where its small files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.base_files import read_model_config, small_files
from finetune.config.schema import Config, is_local_base
from finetune.errors import BaseError
from finetune.plan.bases import known_base
from finetune.plan.setup import Shape
from finetune.plan.shape import shape_of


@dataclass(frozen=True)
class Base:
    """What is known of a base without its weights."""

    shape: Shape
    source: str
    stored_bytes: int
    """Of a parameter, in its files."""
    here: bool
    """Whether its weights are on this machine."""
    folder: Path | None
    """Where its tokenizer is, if it can be had."""
    why_not: str | None = None
    """Why there is no folder."""
    quantised: str | None = None
    """How its files are quantised already, in the word of its config.json."""


def base_of(config: Config) -> Base:
    """The shape of the base: from its config.json, here or on the Hub, or from the table of known ones.

    Raises BaseError where there is neither, or where it is of a kind that the plan does not know.
    """
    if is_local_base(config.base):
        folder = Path(config.base)
        return _described(read_model_config(folder), str(folder / "config.json"), "its config.json", folder, here=True)
    try:
        folder = _cached(config) or small_files(config)
    except BaseError as error:
        facts = known_base(config.base)
        if facts is None:
            raise
        found = _described(facts, config.base, "the table of known bases", None, here=False)
        return replace(found, why_not=error.problems[0].message)
    here = any(folder.glob("*.safetensors"))
    return _described(read_model_config(folder), str(folder / "config.json"), "its config.json", folder, here=here)


def _cached(config: Config) -> Path | None:
    """The base's folder in the Hub's cache, without asking the Hub; None if it lacks what the plan reads."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(config.base, revision=config.revision, local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if all((folder / name).is_file() for name in ("config.json", "tokenizer.json")) else None


def _described(facts: Mapping[str, object], place: str, source: str, folder: Path | None, *, here: bool) -> Base:
    dtype = facts.get("dtype", facts.get("torch_dtype"))
    method = facts.get("quantization_config")
    quantised = str(method.get("quant_method", "in some way"))[:40] if isinstance(method, Mapping) else None
    stored = 4 if dtype == "float32" else 2
    return Base(shape_of(facts, place), source, stored, here, folder, quantised=quantised)
