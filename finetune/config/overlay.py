"""Laying one config over another: paths made absolute, recipes below, the command line's `-s key=value` on top."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.files import has_wildcards
from finetune.config.problems import dotted_key
from finetune.config.schema import data_kind, is_local_data
from finetune.config.yaml_source import Key, Place, parse_value
from finetune.errors import ConfigError, Problem


def absolute_paths(values: dict[str, Any], folder: Path) -> None:
    """Paths in a YAML file are relative to that file; from here on they are absolute."""
    sources = values.get("data")
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = _resolve_data(source["path"], folder)
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("path"), str):
        evaluation["path"] = _resolve_data(evaluation["path"], folder)
    if isinstance(values.get("base"), str):
        values["base"] = _resolve_base(values["base"], folder)
    if isinstance(values.get("chat_template"), str):
        values["chat_template"] = _resolve_template(values["chat_template"], folder)


def _resolve_data(path: str, folder: Path) -> str:
    named = _looks_local(path) or data_kind(path) is not None or has_wildcards(path)
    return _absolute(path, folder) if named or os.path.exists(folder / path) else path


def _resolve_base(base: str, folder: Path) -> str:
    return _absolute(base, folder) if _looks_local(base) or os.path.isdir(folder / base) else base


def _resolve_template(template: str, folder: Path) -> str:
    return _absolute(template, folder) if template.endswith(".jinja") else template


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or is_local_data(path)


def _absolute(path: str, folder: Path) -> str:
    return os.path.abspath(folder / os.path.expanduser(path))


def lay_over(
    below: dict[str, Any],
    above: Mapping[str, Any],
    below_places: dict[Key, Place | str],
    above_places: Mapping[Key, Place],
    key: Key,
) -> None:
    """Mappings are merged key by key; anything else, lists included, is replaced whole."""
    for name, value in above.items():
        inner = (*key, name)
        if isinstance(value, dict) and isinstance(below.get(name), dict) and name != "columns":
            lay_over(below[name], value, below_places, above_places, inner)
            below_places[inner] = above_places[inner]
            continue
        for stale in [place for place in below_places if place[: len(inner)] == inner]:
            del below_places[stale]
        below[name] = value
        below_places.update({place: at for place, at in above_places.items() if place[: len(inner)] == inner})


def apply_override(
    override: str, values: dict[str, Any], places: dict[Key, Place | str], problems: list[Problem]
) -> set[Key]:
    """Set one `key=value` of the command line; returns the keys it sets. The schema reports the unknown ones."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted:
        problems.append(Problem("expected KEY=VALUE", f"-s {override}", "for instance -s lora.rank=32"))
        return set()
    shown = f"-s {dotted}"
    if dotted == "extends":
        problems.append(Problem("extends: can only stand in a file", shown, "write it into the config"))
        return set()
    key: Key = tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))
    try:
        value, inner = parse_value(text)
        target = _holder(values, key)
    except ConfigError as error:
        problems.extend(Problem(problem.message, shown, problem.hint) for problem in error.problems)
        return set()
    target[key[-1]] = _absolute_override(key, value)
    for stale in [place for place in places if place[: len(key)] == key]:
        del places[stale]
    for depth in range(1, len(key)):
        places.setdefault(key[:depth], shown)
    found = {key, *((*key, *rest) for rest in inner)}
    places.update(dict.fromkeys(found, shown))
    return found


def _holder(values: dict[str, Any], key: Key) -> Any:
    """The mapping or list that holds a dotted key; mappings are made where they are missing."""
    target: Any = values
    for depth, part in enumerate(key):
        inside = isinstance(part, int) and part < len(target) if isinstance(target, list) else isinstance(part, str)
        if not isinstance(target, dict | list) or not inside:
            raise ConfigError(f"{dotted_key(key[: depth + 1])}: there is no such key", hint="see `ft config explain`")
        if depth == len(key) - 1:
            return target
        if isinstance(target, dict) and isinstance(key[depth + 1], str):
            target = target.setdefault(part, {})
        else:
            target = target.get(part) if isinstance(target, dict) else target[int(part)]
    raise AssertionError("a key has at least one part")


def _absolute_override(key: Key, value: Any) -> Any:
    """Paths on the command line are relative to the current folder."""
    whole = value
    for part in reversed(key):
        whole = [whole] if isinstance(part, int) else {part: whole}
    absolute_paths(whole, Path.cwd())
    for part in key:
        whole = whole[0 if isinstance(part, int) else part]
    return whole
