"""A handful through processes of their own, as a person starts them; and what is wrong with the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import said_by
from .host import HEAVY

PROGRAM = f"""
import sys
from finetune.cli import main
try:
    main()
finally:
    heavy = set({HEAVY}) & sys.modules.keys()
    assert not heavy, f"imported {{heavy}}"
"""

Started = Callable[..., str]


@pytest.fixture
def started(folder: Path) -> Started:
    """`started("check", "c.yaml", code=2)` gives back what the command says: `MESSAGE | HINT`, one a line."""

    def run(*arguments: str, code: int) -> str:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        command = [sys.executable, "-c", PROGRAM, *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        return said_by(done.stderr.replace(f"{folder}/", ""))

    return run


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train d.yaml", "d.yaml: no such file | did you mean c.yaml?"),
        ("check c.yaml -s lora.rnak=3", "-s lora.rnak: lora.rnak: unknown key | did you mean `rank`?"),
        (
            "export c.yaml",
            "c.yaml: this is a config, not a run | name the run that `ft train c.yaml` made; `ft runs` lists them",
        ),
        ("chat nothing", "nothing: no such run | `ft runs` lists the runs; `ft train CONFIG` makes one"),
    ],
)
def test_a_process_of_its_own(started: Started, line: str, expected: str) -> None:
    assert started(*line.split(" "), code=2) == expected


def test_a_key_that_is_none(run: Path, started: Started) -> None:
    """`ft serve` starts itself again to hide its key, which only a real process can."""
    assert started("serve", "runs/good", "--api-key", "two words", code=2) == (
        "--api-key: a key is one word of visible ASCII characters | `openssl rand -hex 16` makes one"
    )


# -- the machine. Tests may run as root, for whom no permission is missing ----------------------------------------


@pytest.mark.fault("a file where the runs should be", stage="start", outcome="named, nothing is written")
def test_a_file_where_the_runs_should_be(folder: Path, started: Started) -> None:
    (folder / "runs").write_text("x")
    assert started("train", "c.yaml", code=1) == (
        "runs/c: cannot be written: Not a directory | a file is where a folder should be: move it away"
    )
    assert (folder / "runs").read_text() == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_where_nothing_can_be_written(started: Started) -> None:
    said = started("train", "c.yaml", "--runs", "/proc/runs", code=1)
    assert said.startswith("/proc/runs: cannot be written: No such file or directory | check the path")


def test_init_where_a_file_is_in_the_way(started: Started) -> None:
    assert started("init", "rows.jsonl/new.yaml", code=1) == (
        "rows.jsonl: cannot be written: File exists | a file is where a folder should be: move it away"
    )
