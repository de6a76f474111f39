"""The traps of YAML: what a scalar means, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.yaml_source import dump, parse_value, read_document
from finetune.errors import ConfigError

from .conftest import GOOD, Faults


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yaml") / "dumped.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("-3", -3),
        ("08", 8),
        ("0x1F", 31),
        ("0o17", 15),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # What YAML 1.1 would have taken for something else than text.
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-02", "2024-01-02"),
        ("0b11", "0b11"),
        ("=", "="),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("1" * 50, "1" * 50),
        ("٣", "٣"),
        ("[a, no, 1e1]", ["a", "no", 10.0]),
        ("{a: {b: no}}", {"a": {"b": "no"}}),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text: str, value: Any) -> None:
    found = parse_value(text)[0]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number(text: str) -> None:
    assert math.isnan(parse_value(text)[0])


TEXTS = st.text(
    # Without NUL and halves of surrogate pairs, which no config may hold.
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
    max_size=40,
) | st.from_regex(r"[-+0-9.eExXoObB_:~nulTtrueyYnNofFaAsSiI<=]{1,8}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)


@given(values=st.dictionaries(TEXTS, VALUES, max_size=4))
def test_what_is_dumped_reads_back_the_same(scratch: Path, values: dict[str, Any]) -> None:
    """A run's resolved.yaml must load as what was run, by these rules and by PyYAML's own."""
    text = dump(values)
    scratch.write_bytes(text.encode())
    assert read_document(scratch, "dumped.yaml").values == values
    assert yaml.safe_load(text) == values


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "c.yaml: not a config: expected `key: value` lines"),
        ("# nothing\n", "c.yaml: not a config: expected `key: value` lines"),
        ("- a\n- b\n", "c.yaml: not a config: expected `key: value` lines"),
        ("just text", "c.yaml: not a config: expected `key: value` lines"),
        (
            "base: x/y\ndata:\n\t- path: z\n",
            "c.yaml:3: not valid YAML: while scanning for the next token found character '\\t' that cannot start any "
            "token | YAML is indented with spaces, never with tabs",
        ),
        (
            "base:x/y\ndata: [{path: rows.jsonl}]\n",
            "c.yaml:2: not valid YAML: mapping values are not allowed here | a space is needed after the colon: "
            "`key: value`",
        ),
        ("base: 'x\n", "c.yaml:2: not valid YAML: while scanning a quoted scalar found unexpected end of stream"),
        ("base: [x\n", "c.yaml:2: not valid YAML: while parsing a flow sequence expected ',' or ']'"),
        ("a: b\n---\nc: d\n", "c.yaml:2: not valid YAML: expected a single document in the stream"),
        ("a: *nowhere\n", "c.yaml:1: not valid YAML: found undefined alias 'nowhere'"),
        ("base: x\n\0\n", "c.yaml:2: not valid YAML: the character U+0000 is not text"),
        ("base: x\n# \x07\n", "c.yaml:2: not valid YAML: the character U+0007 is not text"),
        ('base: "a\\0b"\n', "c.yaml:1: the character U+0000 cannot stand in a config"),
        ('\n"a\\ud800": b\n', "c.yaml:2: the character U+D800 cannot stand in a config"),
        ("a: &a\n  - [*a]\n", "c.yaml:1: aliases that expand without end"),
        ("a: &a {b: *a}\n", "c.yaml:1: aliases that expand without end"),
        ("a: " + "[" * 500, "c.yaml:1: nested too deep to be a config"),
        ("a: " + "[" * 100 + "]" * 100, "c.yaml:1: nested too deep to be a config"),
        ("".join(f"{' ' * i}a:\n" for i in range(60)), "c.yaml:17: nested too deep to be a config"),
    ],
)
def test_what_cannot_be_gone_on_with(faults: Faults, text: str, fault: str) -> None:
    found = faults(text)
    assert len(found) == 1
    assert found[0].startswith(fault), found
    assert not found[0].endswith("| None")


def test_an_alias_bomb_is_stopped(faults: Faults) -> None:
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 12))
    assert faults("l0: &l0 [x]\n" + levels) == [
        "c.yaml:1: aliases that expand without end | write the values out instead of using & and *"
    ]


def test_an_alias_within_reason_is_fine(loads: Any) -> None:
    assert loads(f"{GOOD}lora: {{targets: &t [a, b]}}\n").config.lora.targets == ("a", "b")
    loaded = loads(
        "base: ./base\ndata:\n  - &d {path: rows.jsonl, columns: &c {prompt: q}}\n  - {path: rows.jsonl, columns: *c}\n"
    )
    assert loaded.config.data[1].columns == {"prompt": "q"}


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"%YAML 1.1\n---\n", b"---\n", b"# a comment\n\n"])
def test_harmless_beginnings(loads: Any, start: bytes) -> None:
    assert loads(start + GOOD.encode()).config.data[0].path.endswith("rows.jsonl")


def test_windows_line_ends(loads: Any) -> None:
    loaded = loads(GOOD.replace("\n", "\r\n"))
    assert loaded.sources["data.0.path"] == "c.yaml:3"


@pytest.mark.parametrize(
    "content", [b"\x7fELF\x80\x01\x01", b"\xff\xfeb\x00a\x00", "base: é".encode("latin-1"), bytes(range(256))]
)
def test_binary_files(faults: Faults, content: bytes) -> None:
    assert faults(content) == ["c.yaml: not a text file in UTF-8 | a config is a YAML text file"]


def test_a_data_file_named_by_mistake(faults: Faults) -> None:
    assert faults('{"prompt": "a"}\n' * 10_000) == [
        "c.yaml: this file is too large to be a config | name the YAML file, not the data or weights"
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.CSV", "rows.parquet"])
def test_data_in_place_of_a_config(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path / name, name)
    assert str(caught.value) == f"{name}: this is data, not a config"
    assert caught.value.problems[0].hint == f"`ft init --data {name}` writes a config for it"


@pytest.mark.parametrize(
    ("line", "tag"),
    [
        ("base: !!str 3", "!!str"),
        ("base: !mine x", "!mine"),
        ("base: !!python/object/apply:os.system ['true']", "!!python/object/apply:os.system"),
        ("lora: !!map {rank: 3}", "!!map"),
        ("!mine lora: {rank: 3}", "!mine"),
        ("base: !<tag:yaml.org,2002:int> 3", "tag:yaml.org,2002:int"),
    ],
)
def test_tags_are_refused(faults: Faults, line: str, tag: str) -> None:
    assert f"c.yaml:2: the tag {tag} is not allowed | a config holds plain values only" in faults(f"\n{line}\n")


def test_merge_keys_are_refused(faults: Faults) -> None:
    assert faults(f"{GOOD}lora: &l {{rank: 3}}\ntrain:\n  <<: *l\n") == [
        "c.yaml:6: merge keys (<<) are not supported | use `extends: FILE` to share values"
    ]


def test_keys_are_words(faults: Faults) -> None:
    assert "c.yaml:5: a key must be a word | write `name: value`" in faults(f"{GOOD}lora:\n  ? [a]\n  : 3\n")


@pytest.mark.parametrize("text", ["a: b: c", "[", "*x", "\0", "{a", "!t x", "&a [*a]", "[" * 500, "'"])
def test_an_override_that_is_no_value(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_value(text)


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path, "configs/")
    assert str(caught.value) == "configs/: this is a folder, not a config"
    assert caught.value.problems[0].hint == "try one of configs/*.yaml"
