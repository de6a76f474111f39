"""What is handed to vLLM and `transformers serve`, and what is not. Here a small program stands in for vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.runs.folder import RunFolder
from finetune.serve.artifact import Artifact
from finetune.serve.others import OtherServer, other_server
from tests.conftest import RunFt
from tests.serve.test_front import knock
from tests.serve.test_server import KEY, free_port, posix, start, stop

LORA: dict[str, Any] = {"base_model_name_or_path": "maker/base", "r": 16, "bias": "none", "modules_to_save": None}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = tmp_path / "legal"
    for part in ("adapter", "merged"):
        (folder / part).mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(LORA))
    (folder / "merged" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "merged" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")  # whole, and without tensors
    return RunFolder(folder)


@pytest.fixture
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")


def server(run: RunFolder, kind: Any, context: int = 0, *, needs_key: bool = True) -> OtherServer | None:
    artifact = Artifact(kind, run.path / kind)
    return other_server(run, artifact, ("127.0.0.1", 9), "secret", context, needs_key=needs_key)


@pytest.mark.usefixtures("_vllm")
def test_vllm_serves_a_merged_folder_under_the_name_of_the_run(run: RunFolder) -> None:
    found = server(run, "merged", context=4096)
    assert found is not None
    address = ("--host", "127.0.0.1", "--port", "9")
    what = (str(run.merged), "--served-model-name", "legal")
    quiet = "--disable-uvicorn-access-log"
    assert found.command == ("/bin/vllm", "serve", *what, *address, quiet, "--max-model-len", "4096")
    assert found.environment == {"VLLM_API_KEY": "secret"}
    assert found.model == "legal"


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize(("settings", "rank"), [({}, "16"), ({"r": 17}, "32"), ({"r": 1}, "1"), ({"r": 300}, "320")])
def test_vllm_serves_an_adapter_with_room_for_its_rank(run: RunFolder, settings: dict[str, Any], rank: str) -> None:
    (run.adapter / "adapter_config.json").write_text(json.dumps(LORA | {"revision": "abc"} | settings))
    found = server(run, "adapter")
    assert found is not None
    lora = ("--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"legal={run.adapter}")
    assert found.command[2:10] == ("maker/base", "--revision", "abc", *lora)


@pytest.mark.usefixtures("_vllm")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"r": 1024},
        {"r": "many"},
        {"base_model_name_or_path": "--trust-remote-code"},
    ],
)
def test_vllm_gets_no_adapter_that_it_would_refuse(run: RunFolder, settings: dict[str, Any]) -> None:
    (run.adapter / "adapter_config.json").write_text(json.dumps(LORA | settings))
    assert server(run, "adapter") is None


def test_transformers_serves_a_merged_folder_without_a_key(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = server(run, "merged", needs_key=False)
    assert found is not None
    # -P: the current folder may hold modules of anybody.
    assert found.command[1:6] == ("-P", "-m", "transformers.cli.transformers", "serve", str(run.merged))
    assert found.model == str(run.merged)
    assert server(run, "merged") is None
    assert server(run, "adapter", needs_key=False) is None


STAND_IN = f"""#!{sys.executable}
import http.server, json, os, sys
told = [sys.argv[1:], os.environ.get("VLLM_API_KEY"), os.environ.get("FT_API_KEY"), os.getpid()]
print(json.dumps(told), flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


@pytest.fixture
def path_with_vllm(tmp_path: Path) -> str:
    (tmp_path / "vllm").write_text(STAND_IN)
    (tmp_path / "vllm").chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def told_by(run: RunFolder) -> Any:
    """What the stand-in said of itself: arguments, the two keys, its process."""
    return json.loads(next(line for line in run.log.read_text().splitlines() if line.startswith("[")))


def ends(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # Where nobody takes note of orphans that ended, they stay as entries in a list.
        if Path(f"/proc/{pid}/stat").exists() and ") Z" in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.1)
    return False


@posix
def test_another_server_is_started_announced_and_ended(run: RunFolder, path_with_vllm: str) -> None:
    served = start(run.path, "--using", "merged", environment={"PATH": path_with_vllm, "FT_API_KEY": KEY})
    assert "serving legal at" in "".join(served.said)
    assert stop(served, signal.SIGINT) == 0
    arguments, vllm_key, our_key, pid = told_by(run)
    assert arguments[:4] == ["serve", str(run.merged), "--served-model-name", "legal"]
    assert arguments[arguments.index("--port") + 1] == str(served.port)
    assert (vllm_key, our_key) == (KEY, None)
    assert ends(pid)


@posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_another_server_does_not_outlive_us(run: RunFolder, path_with_vllm: str, number: signal.Signals) -> None:
    served = start(run.path, "--using", "merged", environment={"PATH": path_with_vllm, "FT_API_KEY": KEY})
    assert stop(served, number) == (-9 if number == signal.SIGKILL else 0)
    assert ends(told_by(run)[3])


@posix
def test_without_a_key_another_server_stands_behind_the_door(run: RunFolder, path_with_vllm: str) -> None:
    served = start(run.path, "--using", "merged", environment={"PATH": path_with_vllm})
    try:
        arguments, vllm_key, _, _ = told_by(run)
        assert arguments[arguments.index("--port") + 1] != str(served.port)
        assert len(vllm_key) == 32
        assert knock(served.port, "localhost")[0] == 200
        assert knock(served.port, "evil.example")[0] == 403
    finally:
        assert stop(served) == 0


@posix
def test_another_server_that_ends_by_itself_is_an_error(
    run: RunFolder, tmp_path: Path, run_ft: RunFt, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").write_text("#!/bin/sh\necho no GPU\nexit 3\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    result = run_ft("serve", run.path, "--using", "merged", "--port", str(free_port()))
    assert result.code == 1
    assert f"{run.log}: vLLM ended with status 3" in result.stderr
    assert "no GPU" in run.log.read_text()
