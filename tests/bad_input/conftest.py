"""The real command on wrong input, in a folder where everything else is right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import sys
from finetune.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "trl", "peft", "datasets"} & sys.modules.keys()
    assert not heavy, f"imported {heavy}"
"""

Refused = Callable[..., str]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that passes for a model as long as nobody needs its tokenizer or its weights."""
    folder = tmp_path_factory.mktemp("stand-in") / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    """A good config, c.yaml, its rows, and its base, which is a stand-in."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [{"question": f"What is {a} and {b}?", "answer": f"{b} {a}"} for a in words for b in ("this", "that")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text("base: ./base\nchat_template: plain\ndata:\n  - path: rows.jsonl\n")
    shutil.copytree(base, tmp_path / "base")
    return tmp_path


@pytest.fixture
def stories(folder: Path, assets: Path) -> Path:
    """The same folder, with a real model as the base."""
    (folder / "base" / "config.json").unlink()
    (folder / "base").rmdir()
    (folder / "base").symlink_to(assets / "models" / "stories260K")
    return folder


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """`refused("check", "c.yaml")` runs `ft` here, which must end with one error and one hint, and gives both back.

    No library that takes seconds to load may have been loaded. The time it took is printed: what takes long on a
    machine that does other things besides must not fail a test.
    """

    def run(*args: str | Path, code: int = 2) -> str:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        command = [sys.executable, "-c", PROGRAM, *map(str, args)]
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=120
        )
        print(f"{time.perf_counter() - began:.2f} s: ft {' '.join(map(str, args))}")
        said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert [line.partition(":")[0] for line in said] == ["error", "hint"], done.stderr
        return " | ".join(line.partition(": ")[2] for line in said).replace(f"{tmp_path}/", "")

    return run
