"""A config file on disk → a checked `Config` that knows where each of its values was written.

The steps, in order: read the YAML and what it extends, make paths absolute, lay the config over its recipes, lay the
command line's `-s key=value` over both, check everything against the schema. All problems are reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.config.external import reference_problems
from finetune.config.overlay import absolute_paths, apply_override, lay_over
from finetune.config.problems import dotted_key, validated
from finetune.config.schema import Config, ineffective_keys
from finetune.config.yaml_source import Document, Key, Place, read_document
from finetune.errors import ConfigError, Problem

MAX_SHOWN = 10
"""More problems than this are counted, not listed: the first ones are what a person mends."""

MAX_EXTENDS = 2
"""A config extends a recipe, a recipe at most one other: deeper chains cannot be read by looking at two files."""


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config and where it came from."""

    config: Config
    path: Path
    sources: Mapping[str, str]
    """Dotted key → `file:line`, `-s` or `default`, for every leaf of the config."""
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    def place(self, key: str) -> str:
        """Where a key was written, for an error message; the file alone if it is a default."""
        source = self.sources.get(key, "default")
        return source if source != "default" else str(self.path)


def load(path: Path, overrides: Sequence[str] = (), *, references: bool = True) -> LoadedConfig:
    """Load and check a config. Raises ConfigError with every problem found.

    Without `references`, what it points at need not exist: a run's own config outlives its data.
    """
    documents = _read_chain(path)
    if path.stem in (".", ".."):
        hint = "give the file a name before its ending: its runs are called so"
        raise ConfigError("a config of this name would put its runs elsewhere", place=str(path), hint=hint)
    problems = [problem for document in documents for problem in document.problems]
    values: dict[str, Any] = {}
    places: dict[Key, Place | str] = {}
    for document in reversed(documents):
        lay_over(values, document.values, places, document.places, ())
    own: set[Key] = set(documents[0].places)
    for override in overrides:
        own |= apply_override(override, values, places, problems)
    config, faulty = validated(values, places, str(path), problems)
    if config is not None:
        if references:
            problems += reference_problems(config, places, str(path))
        own &= places.keys()
        for key, why in ineffective_keys(config).items():
            found = _find(own, key)
            # What a faulty section makes meaningless is not known before it is mended.
            if found is not None and found[0] not in faulty:
                problems.append(Problem(f"{key} has no effect: {why}", str(places[found]), f"remove `{found[-1]}`"))
    if problems:
        raise ConfigError(_first(_in_order(problems), str(path)))
    assert config is not None
    sources = {dotted_key(key): str(places.get(key, "default")) for key in _leaves(config)}
    return LoadedConfig(config, path, sources, tuple(overrides))


def _read_chain(path: Path) -> list[Document]:
    """The config's document first, then what it extends."""
    documents: list[Document] = []
    seen: list[Path] = []
    current, shown, place = path, str(path), str(path)
    while True:
        resolved = Path(os.path.realpath(current))
        if resolved in seen:
            chain = " → ".join(file.name for file in [*seen, resolved])
            raise ConfigError(f"extends goes in a circle: {chain}", place=place, hint="remove one of the `extends:`")
        if len(documents) > MAX_EXTENDS:
            raise ConfigError(
                "extends goes too deep: a config extends a recipe, and a recipe at most one other",
                place=place,
                hint="copy the values of the last one into the recipe",
            )
        seen.append(resolved)
        try:
            document = read_document(current, shown)
        except ConfigError as error:
            if current is path:
                raise
            reached = [Problem(f"extends: {problem}", place, problem.hint) for problem in error.problems]
            raise ConfigError(reached) from error
        absolute_paths(document.values, current.parent)
        documents.append(document)
        parent = document.values.pop("extends", None)
        if parent is None:
            return documents
        place = str(document.places[("extends",)])
        if not isinstance(parent, str):
            raise ConfigError(
                "extends: expected the path of one YAML file", place=place, hint="extends: ../recipes/x.yaml"
            )
        current = current.parent / parent
        shown = os.path.relpath(current) if len(os.path.relpath(current)) < len(str(current)) else str(current)


def _find(keys: set[Key], dotted: str) -> Key | None:
    return next((key for key in keys if dotted_key(key) == dotted), None)


def _in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Each problem once, in the order in which they stand in the file."""

    def line(problem: Problem) -> int:
        number = (problem.place or "").rpartition(":")[2]
        return int(number) if number.isdecimal() else 0

    return sorted(dict.fromkeys(problems), key=line)


def _first(problems: list[Problem], place: str) -> list[Problem]:
    left = len(problems) - MAX_SHOWN
    if left <= 0:
        return problems
    return [
        *problems[:MAX_SHOWN],
        Problem(f"… and {left} more", place, "mend these first"),
    ]


def _leaves(config: Config) -> Iterator[Key]:
    def walk(value: Any, key: Key) -> Iterator[Key]:
        if isinstance(value, BaseModel):
            for name in type(value).model_fields:
                yield from walk(getattr(value, name), (*key, name))
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                yield from walk(item, (*key, index))
        else:
            yield key

    yield from walk(config, ())
