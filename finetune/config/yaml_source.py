"""YAML text → plain values that remember their file and line.

PyYAML parses; the values are ours, because PyYAML follows YAML 1.1, in which `no` is false, `1:30` is 90 and `1e-4` is
a string. Here a plain scalar means what YAML 1.2's core schema says. Nothing else of YAML is needed in a config, so
nothing else is allowed: no tags, no merge keys, and aliases only within reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import ConfigError, Problem
from finetune.given_files import LFS_HINT, LFS_MESSAGE, is_lfs_pointer, not_a_file

Key = tuple[str | int, ...]

MAX_NODES = 10_000
"""More values than any config has; an alias bomb passes it at once."""

MAX_BYTES = 100_000
"""A config is a page of text. Whoever names a dataset or weights by mistake hears so before it is read."""

MAX_DEPTH = 16
"""The deepest value of a config stands four levels down."""

_COMPOSED_DEPTH = MAX_DEPTH + 1
"""The same for PyYAML, which counts the document itself, so that it stops there: a hundred thousand brackets would keep
it busy for minutes, as each costs more than the one before."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_LINE_ENDS = re.compile("[\x85\u2028\u2029\ufeff]")
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Place:
    """Where a value was written."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Document:
    """A parsed YAML file: its values, the place of each key, and what is wrong with it."""

    values: dict[str, Any]
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_document(path: Path, shown: str) -> Document:
    """Read one YAML file. `shown` is how the person named it, used in every message.

    Raises ConfigError when there is nothing to go on with: no such file, not text, not YAML, not a mapping. Smaller
    faults (duplicate keys, tags) are left in `problems`, so that all of them are reported at once.
    """
    text = _read_text(path, shown)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except _TooMuch as error:
        raise _too_much(error, shown) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{shown}:{mark.line + 1}" if mark else shown
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"not valid YAML: {what}", place=place, hint=_syntax_hint(text, mark)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"not valid YAML: the character {_code_point(error.character)} is not text",
            place=f"{shown}:{line}",
            hint="a config is a YAML text file; see `ft init`",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("not valid YAML", place=shown, hint="a config is a YAML text file; see `ft init`") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            "not a config: expected `key: value` lines",
            place=shown,
            hint="a config is a YAML mapping with at least `base:` and `data:`; `ft init` writes one",
        )
    document = Document({}, problems=list(_tags(text, shown)))
    _Builder(document, shown).build_root(root)
    return document


def parse_value(text: str) -> tuple[Any, set[Key]]:
    """The value of `-s key=VALUE`, by the same rules as in a file, and the keys inside it where it has some."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except _TooMuch as error:
        raise _too_much(error, "-s") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        short = text if len(text) <= 60 else text[:57] + "..."
        raise ConfigError(f"{short!r} is not a YAML value", hint="quote it, or write a list as [a, b]") from error
    if root is None:
        return None, set()
    document = Document({}, problems=list(_tags(text, "-s")))
    value = _Builder(document, "-s").build(root, ())
    if document.problems:
        raise ConfigError(document.problems)
    return value, set(document.places)


def dump(values: Any, *, flow: bool = False) -> str:
    """Values as YAML that reads back as the same values, by the rules here and by YAML 1.1's; `flow`: for one line."""
    text: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=flow
    )
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


class _Dumper(yaml.SafeDumper):
    """PyYAML quotes what YAML 1.1 would take for something else than text; this also what YAML 1.2 would."""

    def represent_text(self, text: str) -> yaml.Node:
        style = None if _scalar(text, plain=True) == text else "'"
        if _LINE_ENDS.search(text):
            # Between single quotes PyYAML folds these into a space; between double quotes it escapes them.
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


class _TooMuch(yaml.MarkedYAMLError):
    """More values, or deeper ones, than a config has. Raised before the rest is parsed."""


class _Loader(yaml.SafeLoader):
    """PyYAML's parser, stopped where a text can be no config any more."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._count += 1
        self._depth += 1
        if self._depth > _COMPOSED_DEPTH or self._count > MAX_NODES:
            what = "nested too deep" if self._depth > _COMPOSED_DEPTH else f"more than {MAX_NODES:,} values"
            raise _TooMuch(problem=what, problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _tags(text: str, shown: str) -> Iterator[Problem]:
    """A problem for each tag. From the tokens, because the node of `!!str 3` no longer tells that there was one."""
    if "!" not in text:
        return
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.TagToken):
            handle, suffix = token.value
            place = str(Place(shown, token.start_mark.line + 1))
            yield Problem(f"the tag {handle or ''}{suffix} is not allowed", place, "a config holds plain values only")


def _too_deep(place: str, what: str = "nested too deep") -> ConfigError:
    return ConfigError(f"{what} to be a config", place=place, hint="see `ft config explain` for what can stand")


def _too_much(error: _TooMuch, shown: str) -> ConfigError:
    assert error.problem_mark is not None
    return _too_deep(str(Place(shown, error.problem_mark.line + 1)), str(error.problem))


class _Builder:
    """Walks the node graph once, turning nodes into values and noting places and problems."""

    def __init__(self, document: Document, shown: str) -> None:
        self._document, self._shown = document, shown
        self._nodes = 0
        self._open: set[int] = set()

    def build_root(self, root: yaml.MappingNode) -> None:
        self._document.values = self._mapping(root, ())

    def build(self, node: yaml.Node, key: Key) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or id(node) in self._open:
            raise ConfigError(
                "aliases that expand without end",
                place=str(self._place(node)),
                hint="write the values out instead of using & and *",
            )
        if len(key) > MAX_DEPTH:
            raise _too_deep(str(self._place(node)))
        self._document.places[key] = self._place(node)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, key)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(child, (*key, index)) for index, child in enumerate(node.value)]
            assert isinstance(node, yaml.ScalarNode)
            self._check(node)
            return _scalar(node.value, plain=node.style is None)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            self._check(key_node)
            if not isinstance(name, str):
                self._problem(key_node, "a key must be a word", "write `name: value`")
                continue
            if name == "<<" and key_node.style is None:
                self._problem(key_node, "merge keys (<<) are not supported", "use `extends: FILE` to share values")
                continue
            dotted = ".".join(str(part) for part in (*key, name))
            if name in values:
                first = self._document.places[(*key, name)]
                self._problem(
                    key_node, f"{dotted}: given twice (first on line {first.line})", "remove one; only one can count"
                )
                continue
            values[name] = self.build(value_node, (*key, name))
            # The key's own line is what a person looks for, also when its value starts on the next one.
            self._document.places[(*key, name)] = self._place(key_node)
        return values

    def _check(self, node: yaml.Node) -> None:
        """Quoted text can spell out (`"\\0"`) what no file name can contain and no terminal can show."""
        found = _UNUSABLE.search(node.value) if isinstance(node, yaml.ScalarNode) else None
        if found:
            raise ConfigError(
                f"the character {_code_point(found[0])} cannot stand in a config",
                place=str(self._place(node)),
                hint="take out the escape sequence",
            )

    def _place(self, node: yaml.Node) -> Place:
        return Place(self._shown, node.start_mark.line + 1)

    def _problem(self, node: yaml.Node, message: str, hint: str) -> None:
        self._document.problems.append(Problem(message, str(self._place(node)), hint))


def _scalar(text: str, *, plain: bool) -> Any:
    """A scalar by YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema)."""
    if not plain:
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        if len(text) > 40:
            return text
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text) or _INF_NAN.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _code_point(character: int | str) -> str:
    return f"U+{character if isinstance(character, int) else ord(character):04X}"


def _read_text(path: Path, shown: str) -> str:
    try:
        if (path / "manifest.json").is_file():
            raise ConfigError(
                "this is a run, not a config",
                place=shown,
                hint=f"name the YAML file that it was made from; the run keeps a copy in {path / 'config.yaml'}",
            )
        if path.is_dir():
            raise ConfigError(
                "this is a folder, not a config", place=shown, hint=f"try one of {shown.rstrip('/')}/*.yaml"
            )
        if path.is_file() and path.suffix.lower() in (".jsonl", ".csv", ".parquet"):
            raise ConfigError(
                "this is data, not a config", place=shown, hint=f"`ft init --data {shown}` writes a config for it"
            )
        if what := not_a_file(path):
            # Waiting for a pipe's other end would look like a config that takes for ever to check.
            raise ConfigError(f"this is {what}, not a file", place=shown, hint="a config is a YAML text file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(
                "this file is too large to be a config", place=shown, hint="name the YAML file, not the data or weights"
            )
        if is_lfs_pointer(content):
            raise ConfigError(LFS_MESSAGE, place=shown, hint=LFS_HINT)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("no such file", place=shown, hint=_nearest_file(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError("not a text file in UTF-8", place=shown, hint="a config is a YAML text file") from error
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", place=shown, hint="check the path and its permissions"
        ) from error


def _nearest_file(path: Path) -> str:
    from difflib import get_close_matches

    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return "check the path; `ft init` writes a new config"
    close = get_close_matches(path.name, names, n=1)
    if close:
        return f"did you mean {path.parent / close[0]}?"
    return "`ft init` writes a new config" + (f"; here are {', '.join(names[:6])}" if names else "")


def _syntax_hint(text: str, mark: yaml.Mark | None) -> str:
    if mark is not None:
        lines = text.splitlines()
        nearby = lines[max(0, mark.line - 1) : mark.line + 1]
        if any("\t" in line for line in nearby):
            return "YAML is indented with spaces, never with tabs"
        if any(re.search(r":\S", line) and ": " not in line for line in nearby):
            return "a space is needed after the colon: `key: value`"
    return "check the indentation, the quotes and the colons around that line"
