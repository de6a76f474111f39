"""Whatever stands in a config, loading it gives a config or a FinetuneError, with a place and a hint, and soon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.config.load import load
from finetune.config.schema import Config, DataSource, Evaluation, Lora, Train
from finetune.config.yaml_source import dump
from finetune.errors import ConfigError

from .conftest import GOOD

SECTIONS = {
    "lora": list(Lora.model_fields),
    "train": list(Train.model_fields),
    "evaluation": list(Evaluation.model_fields),
}
KEYS = sorted({*Config.model_fields, "extends", "<<", "", "0", "x"}.union(*SECTIONS.values()))

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["auto", "nf4", "c.yaml", "rows.jsonl", "./base", "~x/y", "text", "chatml", "plain", "all-linear", "a/b", "."]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)
sources = st.lists(st.dictionaries(st.sampled_from([*DataSource.model_fields]), values, max_size=3), max_size=2)
sections = {name: st.dictionaries(st.sampled_from(keys), values, max_size=3) for name, keys in SECTIONS.items()}
configs = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), values, max_size=6),
    st.fixed_dictionaries({}, optional={**sections, "data": sources, "base": values, "revision": values}),
)
fragments = st.lists(
    st.sampled_from([*KEYS, ": ", "\n", "  ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!x ", "'", '"', "\\0"])
    | st.sampled_from(["|", ">", "? ", "---\n", "#", "%", "\t", ",", "1e-4", ".NaN", "0x", "\ufeff", "\x85", "@"])
    | st.text(max_size=3),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("fuzz")
    (path / "base").mkdir()
    (path / "base" / "config.json").write_text("{}")
    (path / "rows.jsonl").write_text('{"text": "a"}\n')
    before = Path.cwd()
    os.chdir(path)
    yield path
    os.chdir(before)


def check(content: bytes, *overrides: str) -> None:
    Path("c.yaml").write_bytes(content)
    try:
        load(Path("c.yaml"), overrides)
        return
    except ConfigError as error:
        problems = error.problems
    assert problems
    for problem in problems:
        assert problem.place, problem
        assert problem.hint, problem
        str(problem).encode()


@given(st.binary(max_size=200))
def test_bytes(content: bytes) -> None:
    check(content)


@given(st.text(max_size=200))
def test_text(content: str) -> None:
    check(content.encode("utf-8", "replace"))


@given(fragments)
@example('"\\0": x')
@example("data:\n- path: rows.jsonl\n  path: rows.jsonl\nbase: ./base")
def test_yaml_like_text(content: str) -> None:
    check(content.encode("utf-8", "replace"))
    check((GOOD + content).encode("utf-8", "replace"))


@given(configs)
def test_any_values(content: dict[str, Any]) -> None:
    check(dump(content).encode("utf-8", "replace"))


@given(configs)
def test_any_values_over_a_good_config(content: dict[str, Any]) -> None:
    check(dump({"base": "./base", "data": [{"path": "rows.jsonl"}]} | content).encode("utf-8", "replace"))


@given(st.lists(st.tuples(st.lists(st.sampled_from([*KEYS, "1"]), min_size=1, max_size=4), values), max_size=3))
@example([(["evaluation"], {"split": 0}), (["evaluation", "every"], 3)])
def test_any_overrides(overrides: list[tuple[list[str], Any]]) -> None:
    written = [f"{'.'.join(key)}={dump(value, flow=True).strip()}" for key, value in overrides]
    check(f"{GOOD}evaluation: {{every: 3}}\n".encode(), *written)


@given(st.lists(st.text(max_size=30), max_size=3))
def test_any_override_text(overrides: list[str]) -> None:
    check(GOOD.encode(), *overrides)
