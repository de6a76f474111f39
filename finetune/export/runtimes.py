"""Who can load what: what GPT4All, vLLM and LM Studio want to know of a model. (Ollama has `ollama.py`.)

Pure functions, except that LM Studio's folder is looked for on disk. What each says was checked against its program's
source or documentation, which the docstrings name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ExportError

GPT4ALL_ARCHITECTURES = frozenset(
    {"llama", "falcon", "gpt2", "gptneox", "mpt", "baichuan", "starcoder", "refact", "bloom", "stablelm", "qwen"}
    | {"qwen2", "qwen2moe", "phi2", "phi3", "codeshell", "orion", "internlm2", "gemma", "gemma2", "starcoder2"}
    | {"xverse", "command-r", "olmo", "openelm", "deepseek2", "chatglm", "jais"}
)
"""What GPT4All loads for chatting (`KNOWN_ARCHES` in gpt4all-backend/src/llamamodel.cpp as it last was, without the
embedding models)."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be (vllm/config/lora.py, `MaxLoRARanks`)."""


def runtime_notes(architecture: str, quant: str) -> list[str]:
    """What to know about a GGUF file before it is taken somewhere, as lines for a person.

    architecture  as in the file's `general.architecture`
    quant         how its matrices are stored
    """
    notes = []
    if architecture not in GPT4ALL_ARCHITECTURES:
        notes.append(
            f"GPT4All cannot load {architecture} models: its last release is older; Ollama, LM Studio and Jan can"
        )
    if quant in ("f32", "bf16"):
        notes.append(f"{quant} is for further work: q8_0 answers the same to the eye, in a fraction of the memory")
    return notes


def vllm_rank(config: Mapping[str, Any]) -> int | None:
    """The `--max-lora-rank` for an adapter with this adapter_config.json, or None if its rank is beyond vLLM's."""
    return next((rank for rank in VLLM_RANKS if rank >= int(config["r"])), None)


def vllm_refusals(config: Mapping[str, Any]) -> list[str]:
    """Why vLLM would not serve an adapter as it was trained; empty if it would.

    `config` is adapter_config.json. From vllm/lora/peft_helper.py, which refuses DoRA and modules_to_save, and reads
    one rank and one alpha for all layers whatever the patterns say.
    """
    problems = []
    if config.get("use_dora"):
        problems.append("DoRA")
    if config.get("modules_to_save"):
        problems.append(f"fully trained modules ({', '.join(map(str, config['modules_to_save']))})")
    if config.get("bias", "none") != "none":
        problems.append("trained biases")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        problems.append("different ranks or alphas per layer")
    if config.get("target_parameters"):
        problems.append("LoRA on expert weights (target_parameters)")
    if config.get("trainable_token_indices"):
        problems.append("trained tokens")
    if vllm_rank(config) is None:
        problems.append(f"a rank of more than {VLLM_RANKS[-1]}")
    return problems


_TOO_LARGE_BYTES = 2**20
"""LM Studio's settings are a few KB."""


def lm_studio_models(home: Path) -> Path:
    """Where LM Studio keeps models, in a person's home folder.

    `.lmstudio-home-pointer` names its folder where there is one; older releases kept it in `.cache/lm-studio`
    (`findLMStudioHome` in lmstudio-js, which LM Studio's own command uses). There, `downloadsFolder` in settings.json
    is the folder of the models, if the person has chosen one (`resolveModelsFolderPath` in the `lms` command). What
    cannot be read, or is no absolute path in printable characters, counts as not there.
    """
    old = home / ".cache" / "lm-studio"
    default = old if old.is_dir() else home / ".lmstudio"
    folder = _folder_named(_small_text(home / ".lmstudio-home-pointer").strip()) or default
    try:
        settings = json.loads(_small_text(folder / "settings.json"))
    except (ValueError, RecursionError):
        settings = None
    chosen = settings.get("downloadsFolder") if isinstance(settings, dict) else None
    return _folder_named(chosen) or folder / "models"


def _small_text(path: Path) -> str:
    """What a text file holds; nothing if it is not there, too large for what it is, or no text."""
    try:
        if not path.is_file() or path.stat().st_size > _TOO_LARGE_BYTES:
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _folder_named(text: object) -> Path | None:
    """An absolute path that can be shown to a person, or None."""
    if not isinstance(text, str) or not text.isprintable() or not Path(text).is_absolute():
        return None
    return Path(text)


def lm_studio_path(models: Path, publisher: str, model: str, file: str) -> Path:
    """Where a GGUF file must lie for LM Studio to list it: two folders deep, `publisher/model/file.gguf`.

    Raises ExportError for names that are no single folder or file.
    """
    for name in (publisher, model, file):
        if not name.strip(". ") or not name.isprintable() or any(mark in name for mark in '/\\:*?"<>|'):
            raise ExportError(f"not a name for a folder of LM Studio: {name!r}", hint="use letters, digits, - and .")
    if not file.endswith(".gguf"):
        raise ExportError(f"LM Studio lists files that end in .gguf, not {file!r}")
    return models / publisher / model / file
