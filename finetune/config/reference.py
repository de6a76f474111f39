"""The schema as people and editors see it: `ft config explain`, the JSON Schema, docs/config.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune.config.schema import Config
from finetune.errors import ConfigError

EXTENDS = FieldInfo(
    annotation=str | None,
    default=None,
    description="A recipe to start from, relative to this file. What is written here replaces what the recipe says, "
    "key by key; lists are replaced whole. A recipe may extend one other recipe.",
)
"""The one key that the loader resolves before the schema sees the rest."""


def json_schema() -> str:
    """The JSON Schema of a config file, for editors."""
    schema = Config.model_json_schema()
    # A recipe leaves data to the config that extends it, and a config may take its base from the recipe.
    schema.pop("required", None)
    extends = {"type": "string", "description": EXTENDS.description}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    _tidy(schema)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A fine-tuning config"}
    return json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"


def _tidy(schema: dict[str, Any]) -> None:
    """Drop what an editor would show for nothing: names twice, a section's defaults beside those of its keys."""
    for section in [schema, *schema["$defs"].values()]:
        section.pop("title")
        for property_ in section["properties"].values():
            property_.pop("title", None)
            property_["description"] = _unwrapped(property_["description"])
            if "$ref" in property_:
                del property_["default"]


def explain(key: str | None) -> str:
    """The documentation of one key, of a section, or (None) the list of all keys."""
    entries = dict(_entries())
    if key is None:
        return _listing(entries)
    if key in entries:
        field = entries[key]
        return f"{key}: {_type_of(field)}; {_default(field)}\n\n{_unwrapped(field.description)}"
    inside = {name: field for name, field in entries.items() if name.startswith(f"{key}.")}
    if inside:
        return f"{_section_text(key)}\n\n{_listing(inside)}"
    short = {name.rsplit(".", 1)[-1]: name for name in entries}
    close = [short[key]] if key in short else get_close_matches(key, entries, n=1, cutoff=0.4)
    hint = f"did you mean `{close[0]}`?" if close else "`ft config explain` lists them all"
    raise ConfigError(f"there is no key {key!r}", hint=hint)


_PAGE_HEAD = """\
# Every key of a config

A config is a YAML file. What it does not set comes from the recipe that it extends, or else is the default given here.

```yaml
extends: ../recipes/mistral-7b-qlora-16gb.yaml
data:
  - path: contracts.jsonl
train:
  epochs: 2
```

`ft config explain KEY` prints one entry of this page; `ft check CONFIG --show` prints what a config resolves to and
where each value comes from. The page is made by `make docs` from `finetune/config/schema.py`.
"""


def reference_page() -> str:
    """docs/config.md."""
    parts = [_PAGE_HEAD]
    section = None
    for key, field in _entries():
        head = key.split(".")[0] if "." in key else ""
        if head != section:
            section = head
            parts.append(f"## `{head}`\n\n{_section_text(head)}\n" if head else "## Top level\n")
        parts.append(f"### `{key}`\n\n*{_type_of(field)}*; {_default(field)}.\n\n{_unwrapped(field.description)}\n")
    return "\n".join(parts)


def _entries() -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its field, in the order of the page: those of the top level, then section by section."""
    yield "extends", EXTENDS
    yield from _entries_in(Config, "")


def _entries_in(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    sections = []
    for name, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            sections.append((name, inner))
    for name, inner in sections:
        yield from _entries_in(inner, f"{prefix}{name}.")


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _inner_model(part)
        if found is not None:
            return found
    return None


def _section_text(section: str) -> str:
    field = Config.model_fields[section]
    text = _unwrapped(field.description)
    return f"{text} Each item of the list has these keys." if get_origin(field.annotation) is tuple else text


def _listing(entries: Mapping[str, FieldInfo]) -> str:
    width = max(map(len, entries))
    return "\n".join(f"{name:<{width}}  {_summary(field)}" for name, field in entries.items())


def _type_of(field: FieldInfo) -> str:
    return _type_name(field.annotation) + _bounds(field.metadata)


def _type_name(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [item for part in parts[1:] for item in getattr(part, "metadata", [part])]
        return _type_name(parts[0]) + _bounds(metadata)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (tuple, dict):
        return {tuple: "list", dict: "mapping"}[origin]
    if origin is not None:
        return " | ".join(_type_name(part) for part in parts if part is not type(None))
    return {int: "whole number", float: "number", bool: "true | false", str: "text"}[annotation]


def _bounds(metadata: Iterable[Any]) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    found = [f"{words[name]} {getattr(item, name)}" for item in metadata for name in words if hasattr(item, name)]
    return f", {' and '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "not set by default"
    return f"default `{str(value).lower() if isinstance(value, bool) else value}`"


def _unwrapped(text: str | None) -> str:
    return re.sub(r"\s*\n\s*", " ", text or "").strip()


def _summary(field: FieldInfo) -> str:
    return re.split(r"(?<=[.])\s", _unwrapped(field.description))[0]
