"""Hostile artifacts, given to the real command in a process of its own, where what they try would be seen.

One process loads the libraries (ten seconds) and makes a copy of itself for each command, so that a case costs what the
command itself costs. Every artifact tries to make a file, its canary; none may ever be there.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

SAMPLES = Path(__file__).parents[2] / "data" / "samples"

SECONDS = 120
"""After so long a command has hung. They take two to five seconds; a busy machine may take ten times that."""

PROGRAM = """
import gc, importlib, json, os, pkgutil, signal, sys, time, warnings
warnings.simplefilter("ignore")
import bitsandbytes, datasets, gguf, peft, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
import finetune
for found in pkgutil.walk_packages(finetune.__path__, "finetune."):
    importlib.import_module(found.name)
from finetune.cli import main
from finetune.data import limits
torch.set_num_threads(1)
limits.SECONDS = 0.3  # what does not end does not end in a second either
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    case = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.chdir(case["cwd"])
        out = os.open(case["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0)  # the one before was read from
        signal.alarm(case["seconds"])
        sys.argv = ["ft", *case["args"]]
        code = 99
        try:
            main()
            code = 0
        except SystemExit as ending:
            code = int(ending.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    told = {"code": os.waitstatus_to_exitcode(status), "megabytes": used.ru_maxrss >> 10}
    print(json.dumps({**told, "seconds": time.monotonic() - began}), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    """The exit code; negative: the signal that ended it, SIGALRM for a command that hung."""
    said: str
    megabytes: int
    """The most memory that the process had, with 600 MB of libraries."""


EVALUATED = {"split": 2, "samples": 1, "max_new_tokens": 2}
"""Of a config whose run also writes answers; without it, a case costs half as much."""


class World:
    """A folder with a good base, good rows and a good config, c.yaml, and a command to run there."""

    def __init__(self, folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder, self._server = folder, server
        self.base, self.run = folder / "base", folder / "runs" / "c"
        self.canary = folder / "canary"

    def config(self, name: str = "c.yaml", **settings: Any) -> Path:
        values = {
            "base": "./base",
            "quantization": "none",
            "data": [{"path": "rows.jsonl"}],
            "evaluation": {"split": 0},
            "train": {
                "max_steps": 1,
                "save_every": 1,
                "micro_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "sequence_length": 256,
            },
            **settings,
        }
        path = self.folder / name
        path.write_text(yaml.safe_dump(values), "utf-8")
        return path

    def ft(self, *args: str) -> Outcome:
        """Run `ft` here. Fails for a hang, for a bug of ours, and if any canary is there afterwards."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        output = self.folder / "output.txt"
        case = {"args": args, "cwd": str(self.folder), "output": str(output), "seconds": SECONDS}
        self._server.stdin.write(json.dumps(case) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], SECONDS + 30)
        assert ready, "the process that runs the commands is gone"
        told = json.loads(self._server.stdout.readline())
        said = output.read_text("utf-8", errors="replace")
        assert not list(self.folder.rglob("canary*")), f"the artifact ran: {said}"
        assert told["code"] in (0, 1, 2), (told, said)
        assert "Traceback" not in said
        assert told["megabytes"] < 4500
        return Outcome(told["code"], said, told["megabytes"])

    def refused(self, *args: str) -> str:
        """What the error and the hint of a command say that must not succeed."""
        outcome = self.ft(*args)
        assert outcome.code in (1, 2), outcome.said
        assert "error: " in outcome.said
        return " ".join(outcome.said[outcome.said.index("error: ") :].split())

    def merge_json(self, path: str, **values: Any) -> None:
        """Put values into a JSON file."""
        file = self.folder / path
        before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        file.write_text(json.dumps(before | values), "utf-8")

    def evil_code(self, name: str = "canary") -> str:
        """Python that makes a canary when it is run or imported."""
        return f"open({str(self.folder / name)!r}, 'w').close()\n"

    def evil_pickle(self, name: str = "canary") -> bytes:
        return pickle.dumps(_Evil(self.evil_code(name)))


class _Evil:
    """Runs code when it is unpickled."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self._code,)


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    settings = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=root, env=os.environ | settings, stdin=-1, stdout=-1, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _furnish(world: World) -> World:
    lines = (SAMPLES / "contract-clauses.jsonl").read_text("utf-8").splitlines()[:8]
    (world.folder / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    shutil.copytree(SAMPLES / "quickstart-base", world.base)
    world.config()
    return world


@pytest.fixture
def world(tmp_path: Path, server: subprocess.Popen[str]) -> World:
    return _furnish(World(tmp_path, server))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, server: subprocess.Popen[str]) -> World:
    """A world with a finished run of two steps, which was evaluated."""
    world = _furnish(World(tmp_path_factory.mktemp("trained"), server))
    world.config(evaluation=EVALUATED)
    outcome = world.ft("train", "c.yaml", "-s", "train.max_steps=2")
    assert outcome.code == 0, outcome.said
    return world


@pytest.fixture
def finished(tmp_path: Path, trained: World, server: subprocess.Popen[str]) -> World:
    """A copy of it, to be tampered with."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    for name in ("resolved.yaml", "manifest.json"):
        path = tmp_path / "runs" / "c" / name
        path.write_text(path.read_text("utf-8").replace(str(trained.folder), str(tmp_path)), "utf-8")
    return World(tmp_path, server)
