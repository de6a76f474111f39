"""The configs and recipes that ship, and what is generated from the schema: they load, and are what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config.load import LoadedConfig, load
from finetune.config.reference import explain, json_schema, reference_page
from finetune.config.schema import is_local_data
from scripts import recipes

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
"""Stands alone: it trains a tiny base of its own on a CPU, from no recipe."""
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path != QUICKSTART)
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
README = (ROOT / "recipes" / "README.md").read_text("utf-8")
SCHEMA: dict[str, Any] = json.loads(json_schema())
SCHEMA_LINE = "# yaml-language-server: $schema=../finetune/config/config.schema.json"

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
each_file = pytest.mark.parametrize("path", [*CONFIGS, *RECIPES], ids=lambda path: path.stem)


def own(path: Path) -> dict[str, Any]:
    """What a file says itself, without what it extends."""
    values = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(values, dict)
    return values


def load_recipe(path: Path, tmp_path: Path) -> LoadedConfig:
    """A recipe as it is meant to be used: extended by a config that adds data."""
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?", "answer": "Because."}\n', "utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(f"extends: {path}\ndata:\n  - path: rows.jsonl\n", "utf-8")
    return load(config)


def plain(name: str) -> str:
    """A model's name without what its owner and our file names punctuate differently."""
    return re.sub(r"[-_./]", "", name.lower())


def test_there_are_configs_and_recipes() -> None:
    assert len(CONFIGS) >= 6
    assert len(RECIPES) >= 14


# -- configs ------------------------------------------------------------------------------------------------------


@each_config
def test_a_config_loads_with_its_data_in_place(path: Path) -> None:
    loaded = load(path)
    for source in loaded.config.data:
        assert is_local_data(source.path)
        assert Path(source.path).is_file()
        assert Path(source.path).parent == ROOT / "data" / "samples"


@each_config
def test_a_config_is_short_and_says_how_to_run_it(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert lines[0] == SCHEMA_LINE
    assert f"# ft train configs/{path.name}" in lines
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 8


@each_config
def test_a_config_is_named_after_its_domain_and_model(path: Path) -> None:
    values = own(path)
    recipe = Path(values["extends"]).stem
    model, _, gpu = recipe.partition("-qlora-")
    domain = path.stem.removesuffix(model).rstrip("-")
    assert path.stem.endswith(model)
    assert [Path(source["path"]).stem for source in values["data"]] == [domain or "support"]
    assert f"{gpu.removesuffix('gb')} GB card" in path.read_text("utf-8")


# -- recipes ------------------------------------------------------------------------------------------------------


@each_recipe
def test_a_recipe_is_what_its_name_says(path: Path, tmp_path: Path) -> None:
    family, method, _ = re.fullmatch(r"(.+)-(qlora)-(8|12|16|24)gb", path.stem).groups()  # type: ignore[union-attr]
    config = load_recipe(path, tmp_path).config
    assert plain(family) in plain(config.base)
    assert config.quantization == {"qlora": "nf4"}[method]
    assert not {"data", "evaluation", "tracking"} & own(path).keys()


@each_recipe
def test_a_recipe_runs_by_the_command_in_its_header(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"ft train recipes/{path.name} -s 'data=[{{path: my-data.jsonl}}]'"
    assert f"# Use:    {command}" in path.read_text("utf-8").splitlines()
    (tmp_path / "my-data.jsonl").write_text('{"text": "a"}\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    assert load(path, ["data=[{path: my-data.jsonl}]"]).config.data[0].path == str(tmp_path / "my-data.jsonl")


@each_recipe
def test_a_recipe_is_estimated_to_fit_its_card_and_listed_in_the_readme(path: Path, tmp_path: Path) -> None:
    config = load_recipe(path, tmp_path).config
    text = path.read_text("utf-8")
    assert recipes.header(path, config) in text, "`make docs` writes it anew"
    assert recipes.line(path, config) in README.splitlines(), "`make docs` writes it anew"
    card = int(path.stem.rpartition("-")[2].removesuffix("gb"))
    assert f"for {card} GB cards" in text
    training, _, evaluation = recipes.memory(path, config)
    # A desktop, and an estimate that is only one, want a part of the card.
    assert max(training, evaluation) < 0.85 * card * 1e9


def test_the_readme_lists_no_other_recipes() -> None:
    listed = re.findall(r"^\| \[.*\]\((.*)\)", README, re.MULTILINE)
    assert sorted(listed) == [path.name for path in RECIPES]


# -- both ---------------------------------------------------------------------------------------------------------


@each_file
def test_extends_is_one_step_for_a_recipe_and_two_for_a_config(path: Path) -> None:
    steps, current = 0, path
    while "extends" in own(current):
        current = current.parent / own(current)["extends"]
        assert current.parent.resolve() == ROOT / "recipes", "only recipes are extended"
        steps += 1
    assert steps <= (1 if path in RECIPES else 2)
    assert steps >= (0 if path in RECIPES else 1)


@each_file
def test_the_effective_batch_is_16(path: Path, tmp_path: Path) -> None:
    train = (load_recipe(path, tmp_path) if path in RECIPES else load(path)).config.train
    assert train.micro_batch_size * train.gradient_accumulation_steps == 16


@each_file
def test_the_json_schema_knows_every_key_and_value(path: Path) -> None:
    assert violations(own(path), SCHEMA) == []


# -- what is generated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content"),
    [("docs/config.md", reference_page()), ("finetune/config/config.schema.json", json_schema())],
    ids=["docs", "schema"],
)
def test_what_is_generated_is_up_to_date(path: str, content: str) -> None:
    assert (ROOT / path).read_text("utf-8") == content, f"{path} is out of date: run `make docs`"


def test_every_key_is_in_the_page_and_can_be_explained() -> None:
    page = reference_page()
    keys = keys_in(SCHEMA)
    assert {"extends", "base", "data.path", "lora.rank", "train.seed"} < set(keys)
    for key in keys:
        assert f"### `{key}`\n" in page
        assert explain(key).startswith(f"{key}: ")
    assert page == re.sub(r"[ \t]+\n", "\n", page)
    assert "\n\n\n" not in page


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"lora": {"ranks": 8}}, "lora.ranks"),
        ({"data": [{"path": "a.jsonl", "fromat": "text"}]}, "data.0.fromat"),
        ({"data": [{"format": "text"}]}, "data.0.path"),
        ({"quantization": "nf3"}, "quantization"),
        ({"train": {"epochs": "three"}}, "train.epochs"),
        ({"train": {"sequence_length": 4}}, "train.sequence_length"),
        ({"lora": {"targets": "some"}}, "lora.targets"),
    ],
)
def test_the_json_schema_finds_what_is_wrong(wrong: dict[str, Any], fault: str) -> None:
    assert violations(wrong, SCHEMA) == [fault]


# -- as much of JSON Schema as a config needs ---------------------------------------------------------------------

TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def violations(value: Any, schema: dict[str, Any], key: str = "") -> list[str]:
    """The dotted keys at which a value breaks a schema."""
    schema = resolved(schema)
    if "anyOf" in schema:
        found = [violations(value, choice, key) for choice in schema["anyOf"]]
        return min(found, key=len)
    if not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return [key]
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return [key]
    if isinstance(value, dict):
        return violations_in(value, schema, key)
    if isinstance(value, list):
        inner = [violations(item, schema["items"], f"{key}.{n}") for n, item in enumerate(value)]
        return [fault for faults in inner for fault in faults] + [key] * (len(value) < schema.get("minItems", 0))
    if isinstance(value, (int, float)) and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", value - 1) < value < schema.get("exclusiveMaximum", value + 1)
    ):
        return [key]
    return []


def violations_in(value: dict[str, Any], schema: dict[str, Any], key: str) -> list[str]:
    dotted = {name: f"{key}.{name}".lstrip(".") for name in [*value, *schema.get("required", [])]}
    faults = [dotted[name] for name in schema.get("required", []) if name not in value]
    for name, inner in value.items():
        known = schema.get("properties", {}).get(name, schema.get("additionalProperties", False))
        faults += violations(inner, known, dotted[name]) if known is not False else [dotted[name]]
    return faults


def keys_in(schema: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key of a schema; those of a list's items as if they were the list's."""
    found = []
    for name, inner in schema["properties"].items():
        section = resolved(resolved(inner).get("items", inner))
        key = f"{prefix}{name}"
        found += keys_in(section, f"{key}.") if "properties" in section else [key]
    return found


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
