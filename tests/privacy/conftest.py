"""One life of a run: the network cut, canaries planted, every socket written down. The tests look at what is left."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import SAMPLES, TINY

HERE = Path(__file__).parent
SENTENCE = "The heron counts seven brass keys under the willow."
"""Stands in every row of the data, in the question and in the answer."""

ENVIRONMENT = {
    "HF_TOKEN": "canary-apple-in-the-environment",
    "WANDB_API_KEY": "c0ffee5eed0123456789abcdef0123456789abcd",
    "FT_API_KEY": "canary-pear-in-the-environment",
}
LOGIN = "hf_CanaryLoggedInWithTheHub0000000001"
CONFIG = "hf_CanaryWrittenIntoTheConfig00000001"
URL = ("canary-password-of-a-url", "canary-query-of-a-url")
KWARGS = "canary-0nTheC0mmandLine"
CANARIES = (*ENVIRONMENT.values(), LOGIN, CONFIG, *URL, KWARGS)

TRAIN = {
    "max_steps": 4,
    "save_every": 2,
    "log_every": 1,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "sequence_length": 256,
    "learning_rate": 1e-3,
}


@dataclass(frozen=True)
class Outcome:
    arguments: list[str]
    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Journey:
    folder: Path
    """The current folder of all commands: tiny.yaml, rows.jsonl, runs/, and before/, which is runs/ before `ft clean`.
    In failed/ and tracked/ there is a run each."""
    outcomes: list[Outcome]
    sockets: list[str]
    namespace: bool
    """Whether there was really no network, or only the count of sockets."""

    @property
    def texts(self) -> str:
        return "\n".join(one.stdout + one.stderr for one in self.outcomes)


def write_project(folder: Path) -> None:
    """tiny.yaml, rows.jsonl and some configs in which people have put tokens where they do not belong."""
    rows = []
    for line in (SAMPLES / "contract-clauses.jsonl").read_text("utf-8").splitlines()[:24]:
        row = json.loads(line)
        for message in row["messages"]:
            message["content"] += f" {SENTENCE}"
        rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    config = {
        "base": str(TINY),
        "data": [{"path": "rows.jsonl"}],
        "evaluation": {"split": 4, "samples": 2, "max_new_tokens": 4},
        "train": TRAIN,
    }
    wrong = {
        "unknown": {**config, "hub_token": CONFIG},
        "number": {**config, "lora": {"rank": CONFIG}},
        "login": {**config, "base": f"https://user:{URL[0]}@models.example/tiny"},
        "file": {**config, "data": [{"path": f"https://user:{URL[0]}@models.example/rows.jsonl"}]},
        "query": {**config, "data": [{"path": f"https://models.example/rows.jsonl?token={URL[1]}"}]},
    }
    for name, values in wrong.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), "utf-8")
    text = f"# remember: {CONFIG}\n{yaml.safe_dump(config)}"
    (folder / "tiny.yaml").write_text(text, "utf-8")


def _steps() -> list[list[str]]:
    override = f"hub_token={KWARGS}"
    steps = [
        *(["ft", "check", f"{name}.yaml"] for name in ("unknown", "number", "login", "file", "query")),
        ["ft", "train", "tiny.yaml", "-s", override],
        ["ft", "train", "tiny.yaml", "-s", f"lora.hub_token={KWARGS}"],
        ["ft", "train", "tiny.yaml", "--hub-token", KWARGS],
        ["ft", "train", "tiny.yaml", f"token={KWARGS}"],
        ["ft", "train", f"https://user:{URL[0]}@configs.example/tiny.yaml"],
        ["ft", "data", "tiny.yaml", "-s", "train.seed=1"],
        ["ft", "train", "tiny.yaml", "-s", "train.learning_rate=1e30", "--runs", "failed"],
        ["ft", "train", "tiny.yaml"],
        ["ft", "eval", "tiny"],
        ["ft", "merge", "tiny"],
        ["ft", "chat", "tiny", "--using", "adapter", "--prompt", "hello", "--max-tokens", "2"],
        ["ft", "export", "tiny", "--to", "gguf", "--system", "Be brief."],
        ["ft", "chat", "tiny", "--using", "gguf", "--prompt", "hello", "--max-tokens", "2"],
    ]
    if importlib.util.find_spec("wandb") is not None:
        tracked = ["-s", "tracking=wandb", "-s", "train.max_steps=2", "--runs", "tracked"]
        steps.append(["ft", "train", "tiny.yaml", *tracked])
    steps += [["copy", "runs", "before"], ["ft", "clean", "tiny"]]
    return steps


def _cut() -> list[str]:
    """How to start a process that has no network, where this system lets one: `unshare -rn` and its arguments."""
    command = ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        return []
    return command


@pytest.fixture(scope="session")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    top = tmp_path_factory.mktemp("journey")
    folder, home, temporary = top / "project", top / "home", top / "tmp"
    for path in (folder, home / ".cache" / "huggingface", temporary):
        path.mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(LOGIN, "utf-8")
    write_project(folder)
    (top / "steps.json").write_text(json.dumps(_steps()), "utf-8")
    # TRL keeps silent where CI is set; here it shall have the chance to speak.
    own = ("HF_", "WANDB_", "TRANSFORMERS_", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    environment = kept | {
        **ENVIRONMENT,
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "WANDB_MODE": "offline",
        "SOCKETS": str(top / "sockets.txt"),
        "PYTHONPATH": os.pathsep.join([str(HERE / "audit"), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    cut = _cut()
    command = [*cut, sys.executable, str(HERE / "journey.py"), str(top / "steps.json"), str(top / "outcomes.json")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "everything-else.txt").write_text(done.stdout + done.stderr, "utf-8")
    outcomes = [Outcome(**one) for one in json.loads((top / "outcomes.json").read_text("utf-8"))]
    sockets = (top / "sockets.txt").read_text("utf-8").splitlines() if (top / "sockets.txt").exists() else []
    return Journey(folder, outcomes, sockets, bool(cut))
