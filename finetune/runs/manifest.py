"""Provenance: what a run was made of, so that it can be understood and made again."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.config.files import source_files
from finetune.config.load import LoadedConfig
from finetune.config.schema import Config, is_local_data
from finetune.config.yaml_source import dump
from finetune.redaction import redacted, redacted_command

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
)


def provenance(loaded: LoadedConfig) -> dict[str, Any]:
    """The manifest of a run that begins now. Needs no heavy import: versions come from the packages' metadata."""
    config = loaded.config
    return {
        "format": 1,
        "state": "running",
        "config_path": str(loaded.path),
        "overrides": [redacted(override) for override in loaded.overrides],
        "command": redacted_command(sys.argv),
        "base": config.base,
        "revision": config.revision,
        "data": data_hashes(config),
        "seed": config.train.seed,
        "versions": {"finetune": __version__, "python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "started": timestamp(),
    }


def data_hashes(config: Config) -> dict[str, str]:
    """Path → SHA-256 of every local file of data, those to evaluate on included."""
    paths = [*(source.path for source in config.data), config.evaluation.path]
    files = [file for path in paths if path is not None and is_local_data(path) for file in source_files(path)]
    return {str(file): sha256(file) for file in files}


def resolved_yaml(loaded: LoadedConfig, *, sources: bool = False) -> str:
    """Every value of a config as YAML; with `sources`, each line ends with where its value was written."""
    return _with_sources(loaded) if sources else dump(as_plain(loaded.config))


def as_plain(config: Config) -> dict[str, Any]:
    """A config as plain lists, dicts and scalars; keys that are not set and would have no effect are left out."""
    from finetune.config.schema import ineffective_keys

    values: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    for key in ineffective_keys(config):
        target: Any = values
        *path, last = key.split(".")
        for part in path:
            target = target[int(part)] if part.isdecimal() else target.get(part, {})
        target.pop(last, None)
    return values


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two plain configs."""
    found: list[str] = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changed_keys(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}")
    return found


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def today() -> datetime.datetime:
    """The day that chat templates are told: UTC's, which is the same wherever a run is gone on with."""
    return _midnight(datetime.datetime.now(datetime.UTC).date())


def day_of(manifest: Mapping[str, Any]) -> datetime.datetime:
    """The day that a run tells its chat template: the one on which it began (`day`), and today before it has.

    Templates that write the date (Llama 3's) would otherwise make another model of a run that goes on after midnight.
    """
    for written in (manifest.get("day"), str(manifest.get("started"))[:10]):
        with contextlib.suppress(TypeError, ValueError):
            return _midnight(datetime.date.fromisoformat(written))  # type: ignore[arg-type]  # a file's word
    return today()


def _midnight(day: datetime.date) -> datetime.datetime:
    return datetime.datetime.combine(day, datetime.time())


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _with_sources(loaded: LoadedConfig) -> str:
    """One `key: value  # source` line per value, in the config's order."""
    plain = as_plain(loaded.config)
    shown: list[tuple[str, str]] = []
    for key, source in loaded.sources.items():
        value: Any = plain
        for part in key.split("."):
            if isinstance(value, list):
                value = value[int(part)] if int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            text = dump(value, flow=True)
            shown.append((f"{key}: {text}", source))
    width = min(max(len(line) for line, _ in shown), 60)
    return "\n".join(f"{line:<{width}}  # {source}" for line, source in shown)
