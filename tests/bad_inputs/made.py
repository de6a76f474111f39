"""What is right, made by hand and without torch: a folder to work in, a finished run, a GGUF file. Tests spoil them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.export.base_identity import fingerprint

BASE = Path(__file__).parents[2] / "data" / "samples" / "quickstart-base"
"""The shipped base: a Llama of two layers, hidden size 256, bfloat16, with a chat template."""

RANK = 4
MODULES = {"self_attn.q_proj": (256, 256), "mlp.down_proj": (256, 512)}
"""The modules with a LoRA → (out, in)."""

Tensors = dict[str, np.ndarray[Any, Any]]

Spoil = Callable[[Path], Any]
"""What is done to a folder in which everything was right."""

COPY = "download or copy it again"
POINTER = (
    "is a Git LFS pointer: the note that stands for a file which was not fetched | `git lfs pull` in its folder "
    "fetches the file itself; or download it again"
)


def workplace(folder: Path) -> Path:
    """A good config, c.yaml, its rows, and its base, a copy of BASE."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [{"question": f"What is {a} and {b}?", "answer": f"{b} {a}"} for a in words for b in ("this", "that")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.yaml").write_text("base: ./base\ndata:\n  - path: rows.jsonl\n")
    shutil.copytree(BASE, folder / "base")
    return folder


def finished_run(folder: Path) -> Path:
    """`runs/good` in a workplace, as `ft train c.yaml` would leave it; the adapter is random."""
    run = folder / "runs" / "good"
    (run / "adapter").mkdir(parents=True)
    base = folder / "base"
    (run / "config.yaml").write_text((folder / "c.yaml").read_text())
    settings = {"rank": RANK, "alpha": 8, "targets": ["q_proj", "down_proj"]}
    resolved = {"base": str(base), "data": [{"path": str(folder / "rows.jsonl")}], "lora": settings}
    (run / "resolved.yaml").write_text(json.dumps(resolved | {"quantization": "none"}, indent=1))
    manifest = {"format": 1, "state": "finished", "config_path": "c.yaml", "base": str(base)}
    (run / "manifest.json").write_text(json.dumps(manifest | {"base_files": fingerprint(base)}))
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config()))
    write_safetensors(run / "adapter" / "adapter_model.safetensors", adapter_tensors())
    for file in (*base.glob("token*"), base / "chat_template.jinja"):
        shutil.copyfile(file, run / "adapter" / file.name)
    return run


def adapter_config(**changed: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    settings = {
        "base_model_name_or_path": "./base",
        "bias": "none",
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    return settings | changed


def adapter_tensors() -> Tensors:
    """Names and shapes as PEFT saves them, in float32."""
    numbers = np.random.default_rng(0)
    found: Tensors = {}
    for layer in range(2):
        for module, (out, into) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{name}.lora_A.weight"] = numbers.normal(size=(RANK, into)).astype(np.float32)
            found[f"{name}.lora_B.weight"] = numbers.normal(size=(out, RANK)).astype(np.float32) / 10
    return found


def write_safetensors(path: Path, tensors: Tensors) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path)


def head(entries: dict[str, Any] | bytes, body: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4665465c0b1f3a5b6a0bcd2e19a8f32d2b2b53d7d2a2b1b64f0f2ed0cb8a7c31\nsize 3150440\n"
)
"""What lies in place of a file where a repository was cloned without Git LFS."""


# -- GGUF -----------------------------------------------------------------------------------------------------------


def gguf(*, version: int = 3, tensors: int | None = None, entries: int | None = None, offset: int = 0) -> bytes:
    """A GGUF file of one entry and one F32 tensor of 64 numbers; the counts may lie.

    Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    out = b"GGUF" + struct.pack("<IQQ", version, 1 if tensors is None else tensors, 1 if entries is None else entries)
    out += gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
    out += gguf_text("token_embd.weight") + struct.pack("<IQIQ", 1, 64, 0, offset)
    return out + b"\0" * (-len(out) % 32) + b"\0" * 256


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


# -- ways to spoil it ---------------------------------------------------------------------------------------------


def write(name: str, content: bytes | str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def pipe(name: str) -> Spoil:
    return lambda folder: ((folder / name).unlink(missing_ok=True), os.mkfifo(folder / name))
