"""Servers that may be installed beside us, for what llama.cpp does not read: vLLM and `transformers serve`.

The options are those of vLLM 0.11 and later (`vllm serve --help`) and transformers 5.23 (`transformers/cli/serve.py`).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass

from finetune.runs.folder import RunFolder
from finetune.serve.artifact import Artifact

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (vllm/config/lora.py, `MaxLoRARanks`)."""

_REFUSED_BY_VLLM = (
    "use_dora",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "rank_pattern",  # this and the next it would load, with one scale for all (vllm/lora/peft_helper.py)
    "alpha_pattern",
)


@dataclass(frozen=True)
class OtherServer:
    """How to start a server."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    """What is added to ours. A key goes here: the arguments of a process are read by everybody."""
    model: str
    """The name that its clients must use."""


def other_server(
    run: RunFolder, artifact: Artifact, address: tuple[str, int], key: str, context: int, *, needs_key: bool
) -> OtherServer | None:
    """The server that can serve a merged folder or an adapter as it is asked for, or None.

    address    where it is to listen
    key        what its clients must show, if it can ask for that
    needs_key  whether it must be one that can
    """
    where = ("--host", address[0], "--port", str(address[1]))
    if vllm := shutil.which("vllm"):
        what = _vllm_model(run, artifact)
        if what is not None:
            length = ("--max-model-len", str(context)) if context else ()
            # A line in the log for each request would fill the disk in time.
            command = (vllm, "serve", *what, *where, "--disable-uvicorn-access-log", *length)
            return OtherServer("vLLM", command, {"VLLM_API_KEY": key}, run.name)
    # `transformers serve` knows no keys, and names a model by its folder.
    present = all(importlib.util.find_spec(module) is not None for module in ("fastapi", "uvicorn", "openai"))
    if present and artifact.kind == "merged" and not needs_key:
        folder = str(artifact.path.resolve())
        # -P: no module is taken from the folder that happens to be the current one.
        program = (sys.executable, "-P", "-m", "transformers.cli.transformers", "serve", folder)
        return OtherServer("transformers serve", (*program, *where), {}, folder)
    return None


def _vllm_model(run: RunFolder, artifact: Artifact) -> tuple[str, ...] | None:
    """What vLLM is to load, or None for an adapter that it does not take (vllm/lora/peft_helper.py)."""
    if artifact.kind == "merged":
        return (str(artifact.path), "--served-model-name", run.name)
    try:
        config = json.loads((artifact.path / "adapter_config.json").read_text("utf-8"))
        base, rank = str(config["base_model_name_or_path"]), int(config["r"])
        fits = [size for size in VLLM_RANKS if size >= rank]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    refused = any(config.get(key) for key in _REFUSED_BY_VLLM) or config.get("bias", "none") != "none"
    if refused or not fits or base.startswith("-"):
        return None
    revision = ("--revision", str(config["revision"])) if config.get("revision") else ()
    lora = f"{run.name}={artifact.path}"
    return (base, *revision, "--enable-lora", "--max-lora-rank", str(fits[0]), "--lora-modules", lora)
