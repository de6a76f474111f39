"""The shapes of known bases, so that a plan needs no download. bases.yaml has them, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

from finetune.base_files import read_model_config
from finetune.config.schema import is_local_base
from finetune.errors import BaseError
from finetune.plan.setup import Shape
from finetune.plan.shape import shape_of


def known_base(hub_id: str) -> Mapping[str, object] | None:
    """What config.json of a base on the Hub says, or None for one that the table does not have.

    Upper and lower case are the same, as they are on the Hub.
    """
    return _table().get(hub_id.lower())


def shape_for(base: str | Path) -> Shape:
    """The shape of a base: from config.json if `base` is a folder that has one, else from the table.

    Raises BaseError where neither knows it, and what `read_model_config` and `shape_of` raise.
    """
    folder = Path(base)
    if (folder / "config.json").is_file():
        return shape_of(read_model_config(folder), str(folder / "config.json"))
    name = str(base)
    facts = None if is_local_base(name) else known_base(name)
    if facts is None:
        raise BaseError("its shape is not known", place=name, hint="download the base first, or give a folder with it")
    return shape_of(facts, name)


@cache
def _table() -> dict[str, Mapping[str, object]]:
    """Hub id in lower case → config.json's keys. The file is part of the package, and trusted."""
    import yaml

    text = files("finetune.plan").joinpath("bases.yaml").read_text("utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
    return {hub_id.lower(): entry["config"] for entry in yaml.load(text, loader) for hub_id in entry["ids"]}
