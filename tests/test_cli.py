"""The `ft` command itself: cheap help with examples, a config to start from, what a config resolves to, the runs."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune import __version__
from finetune.config.schema import Config

from .conftest import RunFt

COMMANDS = [
    "init",
    "check",
    "data",
    "plan",
    "train",
    "eval",
    "chat",
    "serve",
    "merge",
    "export",
    "runs",
    "clean",
    "doctor",
    "config",
]
CONFIG_COMMANDS = ["config schema", "config explain"]

HELP_CPU_SECONDS = 0.2
"""What `ft --help` may cost: nobody waits for it."""

PROGRAM = """
import sys
from finetune.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "pydantic", "yaml", "numpy"} & sys.modules.keys()
    assert not heavy, f"imported {heavy}"
"""


def help_of(*command: str) -> tuple[str, float]:
    """The help text, and the processor time it took (a second process at work beside it does not count)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command, "--help"], capture_output=True, encoding="utf-8", check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def test_help_names_every_command() -> None:
    shown, _ = help_of()
    found = re.findall(r"^  ([a-z]+)  ", shown.partition("Commands:")[2], re.MULTILINE)
    assert found == COMMANDS


@pytest.mark.parametrize("command", [*[c for c in COMMANDS if c != "config"], *CONFIG_COMMANDS])
def test_every_command_has_an_example_and_loads_nothing_heavy_for_it(command: str) -> None:
    shown, _ = help_of(*command.split())
    assert re.search(rf"^  Examples?:\n    ft {command}", shown, re.MULTILINE), shown


@pytest.mark.parametrize("command", ["", "train"])
def test_help_is_cheap(command: str) -> None:
    # Another process on the same core can double what a run costs, for seconds at a time: the best of several counts.
    costs: list[float] = []
    while len(costs) < 5 or (min(costs) > HELP_CPU_SECONDS and len(costs) < 20):
        costs.append(help_of(*command.split())[1])
    print(f"ft {command} --help: {min(costs):.3f} s, the best of {len(costs)}")
    assert min(costs) <= HELP_CPU_SECONDS


def test_version(run_ft: RunFt) -> None:
    result = run_ft("--version")
    assert (result.code, result.stdout, result.stderr) == (0, f"ft {__version__}\n", "")


def test_no_command_shows_the_help(run_ft: RunFt) -> None:
    result = run_ft()
    assert "Commands:" in result.stdout + result.stderr


@pytest.mark.parametrize("arguments", ["nonsense", "train", "check a b", "train a --nope", "data a --row x"])
def test_a_command_line_that_makes_no_sense(run_ft: RunFt, arguments: str) -> None:
    result = run_ft(*arguments.split())
    assert (result.code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    assert "--help" in result.stderr


def test_a_command_line_error_has_the_form_of_all_errors(run_ft: RunFt) -> None:
    result = run_ft("train", "a.yaml", "--nope")
    assert result.stderr == "error: No such option '--nope'.\nhint: `ft train --help` shows how it is used\n"


# -- init and check -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?", "answer": "So."}\n' * 20)
    shutil.copytree(Path(__file__).parents[1] / "data" / "samples" / "quickstart-base", tmp_path / "base")
    return tmp_path


def test_init_writes_a_config_that_check_accepts(run_ft: RunFt, folder: Path) -> None:
    result = run_ft("init", "configs/legal.yaml", "--data", "rows.jsonl", "--base", "base", cwd=folder)
    assert (result.code, result.stdout) == (0, "")
    assert result.stderr == (
        "wrote configs/legal.yaml\nnext: `ft check configs/legal.yaml`, then `ft train configs/legal.yaml`\n"
    )
    text = (folder / "configs" / "legal.yaml").read_text("utf-8")
    assert "  - path: ../rows.jsonl\n    format: question-answer " in text
    assert "base: ../base\n" in text
    (schema,) = re.findall(r"\$schema=(\S+)", text)
    assert (folder / "configs" / schema).is_file(), "the schema that editors are pointed to"
    checked = run_ft("check", "configs/legal.yaml", cwd=folder)
    assert (checked.code, checked.stdout) == (0, "")
    assert checked.stderr == ("rows.jsonl: question-answer, by its first 20 rows\nconfigs/legal.yaml is valid\n")


def test_init_without_data_says_where_to_put_it(run_ft: RunFt, tmp_path: Path) -> None:
    result = run_ft("init", cwd=tmp_path)
    assert result.code == 0
    assert "put your data file into it, under `data:`" in result.stderr
    (tmp_path / "configs" / "my-data.jsonl").write_text('{"text": "a"}\n')
    assert run_ft("check", "configs/my-model.yaml", cwd=tmp_path).code == 0


@pytest.mark.parametrize("name", ["a: b #1.jsonl", "it's {x} [1] 日本.jsonl"])
def test_init_with_a_name_that_yaml_would_misread(run_ft: RunFt, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a"}\n')
    assert run_ft("init", "c.yaml", "--data", name, cwd=tmp_path).code == 0
    checked = run_ft("check", "c.yaml", cwd=tmp_path)
    assert checked.code == 0, checked.stderr
    assert checked.stderr.startswith(f"{name}: text, by its first 1 rows\n")


def test_check_shows_every_value_and_where_it_was_written(run_ft: RunFt, folder: Path) -> None:
    (folder / "recipe.yaml").write_text("base: ./base\ntrain: {epochs: 2}\n")
    (folder / "c.yaml").write_text("extends: recipe.yaml\ndata: [{path: rows.jsonl}]\ntrain: {learning_rate: 1e-4}\n")
    result = run_ft("check", "c.yaml", "--show", "-s", "lora.rank=32", "-s", "train.seed=7", cwd=folder)
    assert result.code == 0, result.stderr
    shown = dict(re.split(r"  +# ", line) for line in result.stdout.splitlines())
    assert shown[f"base: {folder}/base"] == "recipe.yaml:1"
    assert shown["train.epochs: 2.0"] == "recipe.yaml:2"
    assert shown["train.learning_rate: 0.0001"] == "c.yaml:3"
    assert shown["lora.rank: 32"] == "-s lora.rank"
    assert shown["train.seed: 7"] == "-s train.seed"
    assert shown["quantization: nf4"] == "default"
    # What is shown can be read by programs: each line is YAML.
    assert all(isinstance(yaml.safe_load(line), dict) for line in result.stdout.splitlines())


def test_errors_for_programs(run_ft: RunFt, folder: Path) -> None:
    result = run_ft("data", "d.yaml", "--json", cwd=folder)
    assert (result.code, result.stderr) == (2, "")
    assert json.loads(result.stdout) == {
        "event": "error",
        "message": "no such file",
        "place": "d.yaml",
        "hint": "`ft init` writes a new config",
    }


# -- config -------------------------------------------------------------------------------------------------------


def test_the_schema_is_json(run_ft: RunFt) -> None:
    result = run_ft("config", "schema")
    assert (result.code, result.stderr) == (0, "")
    schema = json.loads(result.stdout)
    assert {*Config.model_fields, "extends"} == schema["properties"].keys()


def test_every_key_is_listed_and_explained(run_ft: RunFt) -> None:
    result = run_ft("config", "explain")
    assert (result.code, result.stderr) == (0, "")
    keys = [line.split()[0] for line in result.stdout.splitlines()]
    assert {"base", "lora.rank", "train.learning_rate", "data.path", "evaluation.split"} <= set(keys)
    one = run_ft("config", "explain", "lora.rank")
    assert one.code == 0
    assert one.stdout.startswith("lora.rank: ")
    assert "default `16`" in one.stdout


def test_a_reader_that_leaves_early(tmp_path: Path) -> None:
    """`ft config schema | head -1` is not an error."""
    command = [sys.executable, "-m", "finetune.cli", "config", "schema"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, encoding="utf-8", check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 0


# -- runs ---------------------------------------------------------------------------------------------------------


def test_runs_where_there_are_none(run_ft: RunFt, tmp_path: Path) -> None:
    result = run_ft("runs", cwd=tmp_path)
    assert (result.code, result.stdout) == (0, "")
    assert result.stderr == "no runs in runs/ yet; `ft train CONFIG` makes one\n"
    assert run_ft("runs", "--json", cwd=tmp_path).stdout == ""


def test_runs_are_listed_also_beside_a_damaged_one(run_ft: RunFt, tmp_path: Path) -> None:
    for name, manifest in (("legal", '{"state": "finished", "base": "a/llama"}'), ("broken", "{")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").write_text(manifest)
    (tmp_path / "runs" / "legal" / "evaluation.json").write_text('{"base": {"loss": 2.5}, "tuned": {"loss": 1.25}}')
    result = run_ft("runs", cwd=tmp_path)
    assert result.code == 0, result.stderr
    header, broken, legal = [line.split() for line in result.stdout.splitlines()]
    assert header[:2] == ["run", "state"]
    assert broken == ["broken", "damaged"]
    assert legal == ["legal", "finished", "llama", "2.5000", "1.2500"]


def test_check_looks_at_the_base_and_at_the_held_out_rows(run_ft: RunFt, folder: Path) -> None:
    (folder / "held.jsonl").write_text('{"question": "Why?", "answer": ""}\n')
    lines = ["base: ./base", "data: [{path: rows.jsonl}]", "evaluation: {path: held.jsonl}"]
    (folder / "c.yaml").write_text("\n".join(lines) + "\n")
    result = run_ft("check", "c.yaml", cwd=folder)
    assert result.code == 2
    assert "error: held.jsonl:1: answer is empty where text is expected" in result.stderr
    (folder / "held.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    (folder / "base" / "chat_template.jinja").unlink()
    result = run_ft("check", "c.yaml", cwd=folder)
    assert result.code == 2
    assert "the base has no chat template" in result.stderr


def test_runs_names_what_is_damaged_and_lists_the_rest(run_ft: RunFt, tmp_path: Path) -> None:
    for name, manifest, evaluation in (
        ("good", '{"state": "finished", "base": "a/b"}', '{"base": {"loss": 2.0}, "tuned": {"loss": 1.0}}'),
        ("odd", '{"state": "finished", "base": "a/b"}', "[1]"),
        ("torn", '{"state": ', "{}"),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "manifest.json").write_text(manifest)
        (tmp_path / "runs" / name / "evaluation.json").write_text(evaluation)
    shown = run_ft("runs", cwd=tmp_path)
    assert shown.code == 0, shown.stderr
    words = [line.split() for line in shown.stdout.splitlines()[1:]]
    assert words == [
        ["good", "finished", "b", "2.0000", "1.0000"],
        ["odd", "finished", "b", "–", "–"],
        ["torn", "damaged"],
    ]
    events = [json.loads(line) for line in run_ft("runs", "--json", cwd=tmp_path).stdout.splitlines()]
    assert [event["state"] for event in events] == ["finished", "finished", "damaged"]


@pytest.mark.parametrize("arguments", [[], ["config"]])
def test_a_command_without_its_arguments_shows_what_there_is(run_ft: RunFt, arguments: list[str]) -> None:
    result = run_ft(*arguments)
    assert result.stdout.startswith("Usage: ft")
    assert "\nCommands:\n" in result.stdout
    assert result.stderr == ""


def test_a_run_whose_process_was_killed_is_not_said_to_be_running(run_ft: RunFt, tmp_path: Path) -> None:
    from finetune.runs.folder import RunFolder

    run = RunFolder(tmp_path / "runs" / "legal")
    run.create()
    run.update_manifest(format=1, state="running", base="a/llama")
    assert "killed" in run_ft("runs", cwd=tmp_path).stdout
    with run.lock():
        assert "running" in run_ft("runs", cwd=tmp_path).stdout
