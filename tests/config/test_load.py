"""What a config loads as: paths, recipes, overrides, and where each value came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.load import LoadedConfig, load
from finetune.runs.manifest import as_plain, resolved_yaml

from .conftest import GOOD, Faults

Loads = Callable[..., LoadedConfig]


def test_paths_are_relative_to_the_file_they_are_written_in(folder: Path) -> None:
    configs, recipes = folder / "configs", folder / "recipes"
    configs.mkdir()
    recipes.mkdir()
    (recipes / "t.jinja").write_text("{{ messages }}")
    (recipes / "recipe.yaml").write_text("base: ../base\nchat_template: t.jinja\n")
    (configs / "c.yaml").write_text("extends: ../recipes/recipe.yaml\ndata: [{path: ../rows.jsonl}]\n")
    config = load(Path("configs/c.yaml")).config
    assert config.base == str(folder / "base")
    assert config.chat_template == str(recipes / "t.jinja")
    assert config.data[0].path == str(folder / "rows.jsonl")


def test_hub_ids_stay_what_they_are(loads: Loads) -> None:
    config = loads("base: owner/name\ndata: [{path: owner/rows, split: test}, {path: squad}]\n").config
    assert (config.base, config.data[0].path, config.data[1].path) == ("owner/name", "owner/rows", "squad")


def test_a_home_folder_is_expanded(loads: Loads, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert loads("base: ~/base\ndata: [{path: ~/rows.jsonl}]\n").config.base == str(folder / "base")


def test_a_config_wins_over_its_recipe_key_by_key(loads: Loads, folder: Path) -> None:
    (folder / "below.yaml").write_text("train: {epochs: 9, seed: 1}\nlora: {targets: [a, b], rank: 4}\n")
    (folder / "recipe.yaml").write_text("extends: below.yaml\ntrain: {epochs: 5}\nquantization: int8\n")
    config = loads(f"extends: recipe.yaml\n{GOOD}lora: {{targets: [c]}}\ntrain: {{learning_rate: 1e-5}}\n").config
    assert (config.train.epochs, config.train.seed, config.train.learning_rate) == (5, 1, 1e-5)
    assert (config.lora.targets, config.lora.rank) == (("c",), 4)
    assert config.quantization == "int8"


def test_a_recipe_may_set_what_the_config_switches_off(loads: Loads, folder: Path) -> None:
    (folder / "recipe.yaml").write_text("train: {epochs: 5}\n")
    assert loads(f"extends: recipe.yaml\n{GOOD}train: {{max_steps: 3}}\n").config.train.max_steps == 3


def test_overrides_win_over_everything(loads: Loads) -> None:
    config = loads(
        f"{GOOD}lora: {{rank: 4, alpha: 8}}\n",
        "lora.rank=32",
        "train.learning_rate=1e-4",
        "lora.targets=[q_proj, v_proj]",
        "evaluation.split=0",
        "tracking=wandb",
        "tracking=none",
    ).config
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (32, 8, ("q_proj", "v_proj"))
    assert (config.train.learning_rate, config.evaluation.split, config.tracking) == (1e-4, 0, "none")


def test_an_override_replaces_a_whole_section(loads: Loads) -> None:
    loaded = loads(f"{GOOD}evaluation: {{every: 5, samples: 1}}\n", "evaluation={split: 0}")
    assert loaded.config.evaluation.every is None
    assert loaded.sources["evaluation.split"] == "-s evaluation"
    assert loaded.sources["evaluation.samples"] == "default"


@pytest.mark.parametrize(
    "override", ["data.0.path=other.jsonl", "data=[{path: other.jsonl}]", "data.0={path: other.jsonl}"]
)
def test_a_path_on_the_command_line_is_relative_to_the_current_folder(
    folder: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "configs").mkdir()
    (folder / "configs" / "c.yaml").write_text("base: ../base\ndata: [{path: ../rows.jsonl}]\n")
    (folder / "other.jsonl").write_text("{}")
    assert load(Path("configs/c.yaml"), [override]).config.data[0].path == str(folder / "other.jsonl")


def test_an_override_leaves_the_other_paths_alone(loads: Loads, folder: Path) -> None:
    """A Hub id of the file is not looked for below the current folder because another path is overridden."""
    (folder / "configs").mkdir()
    (folder / "gpt2").mkdir()
    (folder / "configs" / "c.yaml").write_text("base: gpt2\ndata: [{path: ../rows.jsonl}]\n")
    assert load(Path("configs/c.yaml"), ["data.0.path=rows.jsonl"]).config.base == "gpt2"


def test_every_value_knows_where_it_was_written(loads: Loads, folder: Path) -> None:
    (folder / "recipe.yaml").write_text("\ntrain:\n  seed: 7\n  epochs: 2\n")
    loaded = loads(f"extends: recipe.yaml\n{GOOD}lora:\n  targets:\n    - a\n", "train.epochs=4")
    assert loaded.sources["base"] == "c.yaml:2"
    assert loaded.sources["data.0.path"] == "c.yaml:4"
    assert loaded.sources["data.0.format"] == "default"
    assert loaded.sources["lora.targets"] == "c.yaml:6"
    assert loaded.sources["train.seed"] == "recipe.yaml:3"
    assert loaded.sources["train.epochs"] == "-s train.epochs"
    assert loaded.place("train.seed") == "recipe.yaml:3"
    assert loaded.place("train.schedule") == "c.yaml"


def test_the_shown_config_names_every_source(loads: Loads) -> None:
    shown = resolved_yaml(loads(f"{GOOD}train: {{learning_rate: 1e-4}}\n", "lora.rank=32"), sources=True)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "train.learning_rate: 0.0001 # c.yaml:4" in lines
    assert "lora.rank: 32 # -s lora.rank" in lines
    assert "quantization: nf4 # default" in lines
    assert "revision" not in shown, "a key without effect must not be shown as though it had one"


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "evaluation: {split: 0}\n",
        "evaluation: {path: rows.jsonl, format: question-answer, columns: {question: question}}\n",
        "train: {max_steps: 3, learning_rate: 1e-5, warmup: 0}\n",
        "lora: {targets: [no, '3', 1e5x], dropout: .05}\ntracking: wandb\n",
    ],
)
def test_a_resolved_config_loads_as_the_same_config(loads: Loads, folder: Path, extra: str) -> None:
    loaded = loads(GOOD + extra)
    (folder / "resolved.yaml").write_text(resolved_yaml(loaded))
    assert as_plain(load(Path("resolved.yaml")).config) == as_plain(loaded.config)


def test_a_commit_that_looks_like_a_number_survives(loads: Loads, folder: Path) -> None:
    """`12e4567` is text in YAML 1.1 and a number in YAML 1.2: a resolved config must quote it."""
    loaded = loads("base: owner/name\nrevision: '12e4567'\ndata: [{path: rows.jsonl, columns: {'1e3': 0o7x}}]\n")
    (folder / "resolved.yaml").write_text(resolved_yaml(loaded))
    assert load(Path("resolved.yaml")).config == loaded.config


# -- extends ------------------------------------------------------------------------------------------------------


def test_a_loop_of_extends_is_named(faults: Faults, folder: Path) -> None:
    (folder / "r.yaml").write_text("lora: {rank: 2}\nextends: c.yaml\n")
    assert faults(f"extends: r.yaml\n{GOOD}") == [
        "r.yaml:2: extends goes in a circle: c.yaml → r.yaml → c.yaml | remove one of the `extends:`"
    ]


def test_a_loop_through_a_link_is_a_loop(faults: Faults, folder: Path) -> None:
    (folder / "link.yaml").symlink_to("c.yaml")
    assert "extends goes in a circle" in faults(f"extends: link.yaml\n{GOOD}")[0]


def test_a_chain_of_three_recipes_is_too_long(faults: Faults, folder: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c3"), ("c3", "d")):
        (folder / f"{name}.yaml").write_text(f"extends: {parent}.yaml\n")
    (folder / "d.yaml").write_text("{}")
    assert faults(f"extends: a.yaml\n{GOOD}") == [
        "b.yaml:1: extends goes too deep: a config extends a recipe, and a recipe at most one other | "
        "copy the values of the last one into the recipe"
    ]


def test_a_missing_recipe_is_reported_where_it_is_named(faults: Faults, folder: Path) -> None:
    (folder / "recipe-8b.yaml").write_text("{}")
    assert faults(f"{GOOD}extends: recipe-8.yaml\n") == [
        "c.yaml:4: extends: recipe-8.yaml: no such file | did you mean recipe-8b.yaml?"
    ]


def test_a_fault_in_a_recipe_has_the_place_in_the_recipe(faults: Faults, folder: Path) -> None:
    (folder / "r.yaml").write_text("\nlora: {rnak: 3}\n")
    assert faults(f"extends: r.yaml\n{GOOD}") == ["r.yaml:2: lora.rnak: unknown key | did you mean `rank`?"]


@pytest.mark.parametrize("value", ["[a.yaml]", "3", "true", "{a: b}"])
def test_extends_is_one_path(faults: Faults, value: str) -> None:
    assert "extends: expected the path of one YAML file" in faults(f"extends: {value}\n{GOOD}")[0]
