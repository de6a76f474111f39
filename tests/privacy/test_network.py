"""Nothing leaves the machine: a whole life of a run without a network, and with every socket written down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.config.schema import Config
from finetune.runs.log import stay_offline
from tests.privacy.conftest import HERE, Journey
from tests.train.conftest import TINY

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.fault("no network at all", stage="every command", outcome="everything works on local files")
def test_everything_works_without_a_network(journey: Journey) -> None:
    if not journey.namespace:
        pytest.skip("this system gives no process a network of its own (unshare -rn)")
    refused = [one for one in journey.outcomes if one.code]
    assert {one.arguments[1] for one in journey.outcomes if not one.code} == {
        *("data", "train", "eval", "merge", "chat", "export", "clean")
    }, [one.stderr for one in refused]
    # The others are those of which that is expected: a wrong config, a learning rate that blows up.
    assert [one.code for one in refused] == [2] * 10 + [1]


def test_no_socket_leads_to_any_network(journey: Journey) -> None:
    """`ft export` proves the file, and `ft chat` talks to it, through a socket file; so does wandb."""
    elsewhere = [line for line in journey.sockets if "connect ('/" not in line and "connect /" not in line]
    assert elsewhere == []
    assert [line for line in journey.sockets if "llama.sock" in line], "the hook sees nothing"


def test_no_failed_lookup_in_the_log(journey: Journey) -> None:
    log = (journey.folder / "before" / "tiny" / "log.txt").read_text("utf-8")
    assert not [word for word in ("telemetry", "Retry", "ConnectionError", "resolve") if word in log]


def local(**values: object) -> Config:
    return Config.model_validate({"base": str(TINY), "data": [{"path": "/rows.jsonl"}], **values})


@pytest.mark.parametrize(
    ("values", "offline"),
    [
        ({}, "1"),
        ({"base": "acme/tiny"}, None),
        ({"base": "acme/tiny", "revision": "main"}, None),
        ({"base": "acme/tiny", "revision": COMMIT}, "1"),
        ({"base": "acme/other", "revision": COMMIT}, None),
        ({"data": [{"path": "acme/rows"}]}, None),
    ],
)
def test_offline_where_all_is_here(
    values: dict[str, object], offline: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    shutil.copytree(TINY, tmp_path / "hub" / "models--acme--tiny" / "snapshots" / COMMIT)
    stay_offline(local(**values))
    assert os.environ.get("HF_HUB_OFFLINE") == offline
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    stay_offline(local(**values))
    assert os.environ["HF_HUB_OFFLINE"] == "0", "a person's own setting wins"


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "tokenizer.json", "shards"])
def test_what_is_half_in_the_cache_is_still_fetched(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--acme--tiny" / "snapshots" / COMMIT
    shutil.copytree(TINY, folder)
    if damage == "shards":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    else:
        (folder / damage).unlink()
    stay_offline(local(base="acme/tiny", revision=COMMIT))
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_base_in_the_cache_is_not_looked_up(tmp_path: Path) -> None:
    """Of a base that is named by its commit, not one lookup is made: in a process of its own, with the hook."""
    folder = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    shutil.copytree(TINY, folder)
    code = (
        "from finetune.base_files import weight_files; from finetune.config.schema import Config;"
        "from finetune.runs.log import stay_offline;"
        f"config = Config.model_validate(dict(base='acme/tiny', revision={COMMIT!r}, data=[dict(path='/rows.jsonl')]));"
        "stay_offline(config); print(weight_files(config))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = kept | {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # where nobody listens
        "SOCKETS": str(tmp_path / "sockets.txt"),
        "PYTHONPATH": os.pathsep.join([str(HERE / "audit"), str(HERE.parents[1])]),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=60)
    assert done.stdout.strip() == str(folder), done.stderr
    assert not (tmp_path / "sockets.txt").exists()
