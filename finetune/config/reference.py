"""The schema shown to people and editors: `ft config explain`, JSON Schema, docs/config.md. Made from schema.py alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune.config.schema import Config
from finetune.errors import ConfigError


def json_schema() -> str:
    """The JSON Schema of a config file, for editors."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "A fine-tuning config"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "A recipe to start from, relative to this file. A recipe may extend one other recipe.",
    }
    # A recipe leaves base and data to the config that extends it, and a config may take its base from the recipe.
    schema.pop("required", None)
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def explain(key: str | None) -> str:
    """The documentation of one key, of a section, or (None) the list of all keys."""
    entries = dict(_entries(Config, ""))
    if key is None:
        width = max(map(len, entries))
        return "\n".join(f"{name:<{width}}  {_summary(field)}" for name, field in entries.items())
    if key in entries:
        field = entries[key]
        return f"{key}: {_type_name(field.annotation)}, default {_default(field)}\n\n{_unwrapped(field.description)}"
    inside = {name: field for name, field in entries.items() if name.startswith(f"{key}.")}
    if inside:
        own = Config.model_fields[key.split(".")[0]]
        return _unwrapped(own.description) + "\n\n" + "\n".join(f"{n}  {_summary(f)}" for n, f in inside.items())
    short = {name.rsplit(".", 1)[-1]: name for name in entries}
    close = [short[key]] if key in short else get_close_matches(key, entries, n=1, cutoff=0.4)
    hint = f"did you mean `{close[0]}`?" if close else "`ft config explain` lists them all"
    raise ConfigError(f"there is no key {key!r}", hint=hint)


def reference_page() -> str:
    """docs/config.md."""
    lines = [
        "# Every key of a config",
        "",
        "Made by `make docs` from `finetune/config/schema.py`. `ft config explain KEY` prints one of them; ",
        "`ft check CONFIG --show` prints what a config resolves to and where each value comes from.",
    ]
    section = None
    for key, field in _entries(Config, ""):
        head = key.split(".")[0] if "." in key else ""
        if head != section:
            section = head
            title = f"`{head}`" if head else "Top level"
            lines += ["", f"## {title}", ""]
            if head:
                lines += [_unwrapped(Config.model_fields[head].description), ""]
        lines += [f"### `{key}`", "", f"*{_type_name(field.annotation)}*, default {_default(field)}.", ""]
        lines += [_unwrapped(field.description), ""]
    return "\n".join(lines).rstrip() + "\n"


def _entries(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    sections = []
    for name, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            sections.append((name, inner))
    for name, inner in sections:
        yield from _entries(inner, f"{prefix}{name}.")


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _inner_model(part)
        if found is not None:
            return found
    return None


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "nothing"
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if origin is tuple:
        return "list of text"
    if origin is dict:
        return "mapping"
    if origin is not None:
        parts = get_args(annotation)
        if not isinstance(parts[-1], type) and get_origin(parts[-1]) is None and hasattr(annotation, "__metadata__"):
            return _type_name(parts[0])
        return " | ".join(_type_name(part) for part in parts if part is not type(None))
    return {int: "whole number", float: "number", bool: "true | false", str: "text"}.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none: it must be given"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return "`{}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _unwrapped(text: str | None) -> str:
    return re.sub(r"\s*\n\s*", " ", text or "").strip()


def _summary(field: FieldInfo) -> str:
    return re.split(r"(?<=[.])\s", _unwrapped(field.description))[0]
