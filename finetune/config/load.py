"""A config file on disk → a checked `Config` that knows where each of its values was written.

The steps, in order: read the YAML and what it extends, make paths absolute, lay the config over its recipes, lay the
command line's `-s key=value` over both, check everything against the schema. All problems are reported at once.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from finetune.config.schema import DATA_SUFFIXES, Config, ineffective_keys, is_local_base, is_local_data
from finetune.config.yaml_source import Document, Key, Place, parse_value, read_document
from finetune.errors import ConfigError, Problem

MAX_EXTENDS = 2
"""A config extends a recipe, a recipe at most one other: deeper chains cannot be read by looking at two files."""

_HUB_ID = re.compile(r"(?=.{1,96}$)(?!.*(--|\.\.))\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)
"""By the Hub's own rules (huggingface_hub's `validate_repo_id`)."""


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


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load and check a config. Raises ConfigError with every problem found."""
    documents = _read_chain(path)
    problems = [problem for document in documents for problem in document.problems]
    values: dict[str, Any] = {}
    places: dict[Key, Place | str] = {}
    for document in reversed(documents):
        _lay_over(values, document.values, places, document.places, ())
    own: set[Key] = set(documents[0].places)
    for override in overrides:
        own |= _apply_override(override, values, places, problems)
    config, faulty = _validated(values, places, str(path), problems)
    if config is not None:
        problems += _reference_problems(config, places, str(path))
        own &= places.keys()
        for key, why in ineffective_keys(config).items():
            found = _find(own, key)
            # What a faulty section makes meaningless is not known before it is mended.
            if found is not None and found[0] not in faulty:
                problems.append(Problem(f"{key} has no effect: {why}", str(places[found]), f"remove `{found[-1]}`"))
    if problems:
        raise ConfigError(_in_order(problems))
    assert config is not None
    sources = {_dotted(key): str(places.get(key, "default")) for key in _leaves(config)}
    return LoadedConfig(config, path, sources, tuple(overrides))


# -- reading the files --------------------------------------------------------------------------------------------


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
        _absolute_paths(document.values, current.parent)
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


def _absolute_paths(values: dict[str, Any], folder: Path) -> None:
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
    local = _looks_local(path) or path.lower().endswith(DATA_SUFFIXES) or os.path.exists(folder / path)
    return _absolute(path, folder) if local else path


def _resolve_base(base: str, folder: Path) -> str:
    return _absolute(base, folder) if _looks_local(base) or os.path.isdir(folder / base) else base


def _resolve_template(template: str, folder: Path) -> str:
    return _absolute(template, folder) if template.endswith(".jinja") else template


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or is_local_data(path)


def _absolute(path: str, folder: Path) -> str:
    return os.path.abspath(folder / os.path.expanduser(path))


# -- laying one over the other ------------------------------------------------------------------------------------


def _lay_over(
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
            _lay_over(below[name], value, below_places, above_places, inner)
            below_places[inner] = above_places[inner]
            continue
        for stale in [place for place in below_places if place[: len(inner)] == inner]:
            del below_places[stale]
        below[name] = value
        below_places.update({place: at for place, at in above_places.items() if place[: len(inner)] == inner})


def _apply_override(
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
            raise ConfigError(f"{_dotted(key[: depth + 1])}: there is no such key", hint="see `ft config explain`")
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
    _absolute_paths(whole, Path.cwd())
    for part in key:
        whole = whole[0 if isinstance(part, int) else part]
    return whole


# -- problems -----------------------------------------------------------------------------------------------------


def _validated(
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
        place = _nearest_place(places, key, shown)
        dotted = _dotted(key)
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
        if isinstance(given, str) and name in ("int", "float") and re.fullmatch(r"[-+\d.eE_,]+", given):
            hint = "write the number without quotes"
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


def _reference_problems(config: Config, places: Mapping[Key, Place | str], shown: str) -> Iterator[Problem]:
    """Files and ids that the config names: local ones must exist, others must look like a Hub id."""
    files: list[tuple[Key, str]] = [(("data", i, "path"), source.path) for i, source in enumerate(config.data)]
    if config.evaluation.path is not None:
        files.append((("evaluation", "path"), config.evaluation.path))
    for key, path in files:
        place = _nearest_place(places, key, shown)
        if is_local_data(path):
            yield from _missing_file(_dotted(key), Path(path), place, DATA_SUFFIXES)
        elif not _HUB_ID.fullmatch(path):
            hint = f"a file ends in {', '.join(DATA_SUFFIXES)}; a Hub id is owner/name"
            yield Problem(f"{_dotted(key)}: neither a file nor a dataset id: {path!r}", place, hint)
    if config.chat_template is not None and config.chat_template.endswith(".jinja"):
        place = _nearest_place(places, ("chat_template",), shown)
        yield from _missing_file("chat_template", Path(config.chat_template), place, (".jinja",))
    elif config.chat_template not in (None, "chatml", "plain"):
        place = _nearest_place(places, ("chat_template",), shown)
        yield Problem(
            f"chat_template: expected chatml, plain or a .jinja file, got {config.chat_template!r}",
            place,
            "chatml suits a base that was never tuned to chat",
        )
    place = _nearest_place(places, ("base",), shown)
    if is_local_base(config.base):
        folder = Path(config.base)
        if not os.path.isdir(folder):
            yield Problem(f"base: no such folder: {config.base}", place, "name a model folder, or a Hub id: owner/name")
        elif not os.path.isfile(folder / "config.json"):
            yield Problem(f"base: no config.json in {config.base}", place, "a model folder has config.json and weights")
    elif not _HUB_ID.fullmatch(config.base):
        yield Problem(f"base: neither a folder nor a model id: {config.base!r}", place, "a Hub id is owner/name")


def _missing_file(key: str, path: Path, place: str, suffixes: tuple[str, ...]) -> Iterator[Problem]:
    # os.path answers False where Path raises, for instance for a name too long to be one.
    if os.path.isfile(path):
        if path.suffix.lower() not in suffixes:
            kinds = ", ".join(suffixes)
            yield Problem(f"{key}: {path.name} is of no known kind", place, f"known endings: {kinds}")
        return
    if os.path.isdir(path):
        yield Problem(f"{key}: {path} is a folder", place, "name one file in it")
        return
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        names = []
    close = get_close_matches(path.name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "paths are relative to the YAML file they are written in"
    yield Problem(f"{key}: no such file: {path}", place, hint)


# -- small helpers ------------------------------------------------------------------------------------------------


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _find(keys: set[Key], dotted: str) -> Key | None:
    return next((key for key in keys if _dotted(key) == dotted), None)


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


def _nearest_place(places: Mapping[Key, Place | str], key: Key, shown: str) -> str:
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


def _in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Each problem once, in the order in which they stand in the file."""

    def line(problem: Problem) -> int:
        number = (problem.place or "").rpartition(":")[2]
        return int(number) if number.isdecimal() else 0

    return sorted(dict.fromkeys(problems), key=line)


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
