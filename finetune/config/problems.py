"""What the schema objects to, said so that it can be mended: file and line, the nearest right name, an example."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.config.schema import Config
from finetune.config.yaml_source import Key, Place
from finetune.errors import Problem


def validated(
    values: dict[str, Any], places: Mapping[Key, Place | str], shown: str, problems: list[Problem]
) -> tuple[Config | None, set[str | int]]:
    """The config by the schema, and the sections that are at fault.

    Where the schema finds fault, what is wrong is left out and the rest checked again, so that a missing file is
    reported together with a misspelt key.
    """
    faulty: set[str | int] = set()
    for _ in range(3):
        try:
            return Config.model_validate(values), faulty
        except ValidationError as error:
            if not faulty:
                problems += _schema_problems(error, values, places, shown)
            found = {_error_key(item, values): item["type"] == "missing" for item in error.errors(include_url=False)}
            faulty.update(key[0] for key in found)
            values = copy.deepcopy(values)
            for key, missing in found.items():
                _leave_out(values, key, missing=missing)
    return None, faulty


def _leave_out(values: Any, key: Key, *, missing: bool) -> None:
    """Take out a faulty value, or stand in for a missing one with something that no other check objects to."""
    *path, last = key
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        else:
            values = values[part] if isinstance(values, list) and isinstance(part, int) else None
    if isinstance(values, list):
        values[int(last)] = {"path": "placeholder"}
    elif isinstance(values, dict):
        values.pop(last, None)
        if missing:
            values[last] = [{"path": "placeholder"}] if last == "data" else "placeholder"


def _error_key(item: Mapping[str, Any], values: Mapping[str, Any]) -> Key:
    loc = tuple(item["loc"])
    return loc if item["type"] in ("missing", "extra_forbidden") else _trim(loc, values)


def _schema_problems(
    error: ValidationError, values: Mapping[str, Any], places: Mapping[Key, Place | str], shown: str
) -> list[Problem]:
    found: dict[Key, Problem] = {}
    for item in error.errors(include_url=False):
        kind, key = item["type"], _error_key(item, values)
        if key in found:
            continue
        place = nearest_place(places, key, shown)
        dotted = dotted_key(key)
        if kind == "extra_forbidden":
            known = _known_names(key[:-1])
            close = get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
            elsewhere = _elsewhere(str(key[-1]))
            meant = elsewhere or (close[0] if close else None)
            hint = f"did you mean `{meant}`?" if meant else f"known here: {', '.join(known)}"
            found[key] = Problem(f"{dotted}: unknown key", place, hint)
        elif kind == "missing":
            found[key] = Problem(f"{dotted} is missing", place, _missing_hint(dotted))
        else:
            found[key] = Problem(*_value_problem(dotted, item, place, key))
    # A list whose items are wrong is also reported as too short, which would only mislead.
    inner = [key[:depth] for key in found for depth in range(len(key))]
    return [problem for key, problem in found.items() if key not in inner]


def _value_problem(dotted: str, item: Mapping[str, Any], place: str, key: Key) -> tuple[str, str, str]:
    kind, given, context = item["type"], item.get("input"), item.get("ctx") or {}
    explain = f"{_explained(dotted)} says more"
    shown = _shown(given)
    if dotted == "lora.targets":
        return (
            f"{dotted}: expected all-linear or a list of module names, got {shown}",
            place,
            "for instance [q_proj, v_proj]",
        )
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context.get("expected")))
        close = get_close_matches(str(given), choices, n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else explain
        return f"{dotted}: expected {_either(choices)}, got {shown}", place, hint
    kinds = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text",
        "dict": "a mapping of names",
        "model": "a mapping (`key: value` lines)",
        "tuple": "a list (lines that begin with `-`)",
    }
    name = kind.split("_")[0]
    if kind.endswith(("_type", "_parsing", "_from_float")) and name in kinds:
        hint = explain
        if isinstance(given, str) and name in ("int", "float"):
            hint = _number_hint(given) or explain
        if name == "string" and isinstance(given, int | float):
            hint = "write it in quotes, so that it is text"
        if name == "bool" and str(given).lower() in ("yes", "no", "on", "off"):
            hint = f"write {'true' if str(given).lower() in ('yes', 'on') else 'false'}"
        return f"{dotted}: expected {kinds[name]}, got {shown}", place, hint
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than"}
        bound = next(iter(context.values()))
        return f"{dotted}: must be {words.get(kind, 'at most')} {bound:g}, got {shown}", place, explain
    if kind == "finite_number":
        return f"{dotted}: must be a finite number, got {shown}", place, explain
    if kind in ("too_short", "string_too_short"):
        return f"{dotted}: must not be empty", place, explain
    message = str(item["msg"])
    return f"{dotted}: {message[0].lower()}{message[1:]}, got {shown}", place, explain


def _number_hint(given: str) -> str | None:
    """How to write what seems to be meant as a number: `"3"` is text because of its quotes, `1_000` is text as well."""
    bare = re.sub(r"(?<=\d)[_,](?=\d)", "", given.strip())
    if not re.fullmatch(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", bare) or len(bare) > 40:
        return None
    return "write the number without quotes" if bare == given else f"write {bare}"


def dotted_key(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _trim(loc: Key, values: Any) -> Key:
    """The part of a pydantic location that is a path into the values; the rest names union members."""
    key: list[str | int] = []
    for part in loc:
        if isinstance(values, list):
            inside = isinstance(part, int) and part < len(values)
        else:
            inside = isinstance(values, dict) and part in values
        if not inside:
            break
        values = values[part]
        key.append(part)
    return tuple(key)


def nearest_place(places: Mapping[Key, Place | str], key: Key, shown: str) -> str:
    while key:
        if key in places:
            return str(places[key])
        key = key[:-1]
    return shown


def _section(key: Key) -> type[BaseModel] | None:
    """The schema's model at a key, or None where there is none."""
    model: type[BaseModel] = Config
    for part in key:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = _models_in(field.annotation) if field else []
        if not inner:
            return None
        model = inner[0]
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _known_names(key: Key) -> list[str]:
    section = _section(key)
    names = list(section.model_fields) if section else []
    return [*names, "extends"] if not key else names


def _elsewhere(name: str) -> str | None:
    """The full key of a name that exists in another section: people forget which one it is in."""
    for section, field in Config.model_fields.items():
        for model in _models_in(field.annotation):
            if name in model.model_fields:
                return f"{section}.{name}"
    return None


def _missing_hint(dotted: str) -> str:
    examples = {
        "base": "base: meta-llama/Llama-3.2-3B-Instruct",
        "data": "data: [{path: my-data.jsonl}]",
    }
    return f"for instance `{examples[dotted]}`" if dotted in examples else f"see {_explained(dotted)}"


def _explained(dotted: str) -> str:
    return f"`ft config explain {re.sub(r'[.][0-9]+', '', dotted)}`"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)
    if isinstance(value, bool):
        text = text.lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return text if len(text) <= 60 else text[:57] + "..."


def _either(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else "".join(choices)
