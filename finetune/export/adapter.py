"""Reading a trained adapter, and refusing everything in it that a merge would not carry over.

What is not understood is refused by name rather than skipped: a merge that leaves something out still gives a model
that loads and answers, only not the one that was trained.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError, Problem, RunError
from finetune.export.lora import LoraModule, scaling
from finetune.export.safetensors_io import Checkpoint, open_file

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
"""What a LoRA configuration may say: read below, or without influence on the merged weights."""

_OFF: tuple[Any, ...] = (None, False, "none", [], {})

_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""The other ways of starting a LoRA (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) also change the base they start from; the
adapter then belongs to that base, which nobody saved."""

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?P<part>[AB])(?:\.default)?\.weight|(?P<dora>lora_magnitude_vector)(?:\.default)?(?:\.weight)?)"
)


_WHOLE = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight")


@dataclass(frozen=True)
class Adapter:
    """A whole adapter: its LoRA weights in memory, everything else in `stored`."""

    place: Path
    modules: tuple[LoraModule, ...]
    stored: Checkpoint
    whole: dict[str, str]
    """Module name → tensor name of weights that were saved in full. PEFT adds the embedding and the output layer when
    the latter is a LoRA target; whether they are the base's own, only the base can tell."""


def read_adapter(folder: Path) -> Adapter:
    """Read `adapter_config.json` and `adapter_model.safetensors` as PEFT saves them.

    Raises RunError if they are missing or unreadable, ExportError with all that a merge could not carry over, and
    for an adapter in which nothing was learned or which holds numbers that are not finite.
    """
    config = _read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise RunError(
            f"there is no {WEIGHTS}",
            place=str(folder),
            hint="weights in the pickle format are never read" if any(folder.glob("*.bin")) else None,
        )
    stored = open_file(weights)
    problems = [Problem(message, str(folder / CONFIG)) for message in _refused_settings(config)]
    parts, whole, refused_tensors = _sort_tensors(stored)
    problems += [Problem(message, str(weights)) for message in refused_tensors]
    if not problems:
        problems = [Problem(message, str(weights)) for message in _incomplete(config, parts, stored)]
    if problems:
        raise ExportError(problems)
    modules = tuple(_module(config, name, keys, stored) for name, keys in parts.items())
    if not any(bool(module.b.any()) for module in modules):
        raise ExportError(
            "every lora_B is zero: nothing was learned", place=str(weights), hint="was the run stopped at its start?"
        )
    return Adapter(folder, modules, stored, whole)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"there is no {CONFIG}", place=str(folder)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"is not valid JSON: {error}", place=str(path)) from error
    if not isinstance(config, dict):
        raise RunError("is not a table", place=str(path))
    return config


def _refused_settings(config: dict[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"`peft_type` is {kind!r}; only LORA can be merged"]
    problems = [
        f"`{key}` is {value!r}, which a merge does not carry over yet"
        for key, value in sorted(config.items())
        if key not in _HARMLESS and value not in _OFF
    ]
    init = config.get("init_lora_weights", True)
    if init not in _INITS_THAT_KEEP_THE_BASE:
        problems.append(f"`init_lora_weights: {init}` changed the base during training; this base is not that one")
    for key in ("rank_pattern", "alpha_pattern"):
        try:
            for pattern in config.get(key) or {}:
                re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, TypeError) as error:
            problems.append(f"`{key}` is not a table of patterns: {error}")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        problems.append("`r` and `lora_alpha` must be numbers")
    return problems


def _sort_tensors(stored: Checkpoint) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Module name → part ("A", "B", "dora") → tensor name; module name → name of its whole weight; and a message for
    each tensor that is neither."""
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    refused = []
    for name in stored.tensors:
        if match := _KEY.fullmatch(name):
            part = match["part"] or "dora"
            parts.setdefault(match["module"], {})[part] = name
        elif "lora_" not in name and (match := _WHOLE.fullmatch(name)):
            whole[match["module"]] = name
        else:
            refused.append(f"`{name}` is {_kind(name)}, which a merge does not carry over yet")
    return parts, whole, refused


def _kind(name: str) -> str:
    if "lora_embedding_" in name:
        return "a LoRA of an embedding"
    if "trainable_tokens" in name or "token_adapter" in name:
        return "a set of trained tokens"
    if name.endswith(".bias"):
        return "a trained bias"
    return "a kind of weight that is not known"


def _incomplete(config: dict[str, Any], parts: dict[str, dict[str, str]], stored: Checkpoint) -> list[str]:
    problems = [] if parts else ["it holds no LoRA weights"]
    for module, keys in parts.items():
        wanted = {"A", "B", "dora"} if config.get("use_dora") else {"A", "B"}
        if set(keys) != wanted:
            problems.append(f"`{module}` has the parts {sorted(keys)}, not {sorted(wanted)}")
            continue
        a, b = (stored.tensors[keys[part]] for part in "AB")
        rank = _from_pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _from_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        if not isinstance(alpha, int | float):
            problems.append(f"`{module}` has the alpha {alpha!r}")
        if len(a.shape) != 2 or len(b.shape) != 2:
            problems.append(f"`{module}` is not a linear layer: its LoRA has the shapes {a.shape} and {b.shape}")
        elif (a.shape[0], b.shape[1]) != (rank, rank):
            problems.append(f"`{module}` has the shapes {a.shape} and {b.shape}, its configuration says rank {rank}")
        elif "dora" in keys and stored.tensors[keys["dora"]].shape != (b.shape[0],):
            problems.append(f"`{module}` has a magnitude of the shape {stored.tensors[keys['dora']].shape}")
        problems += [f"`{key}` is stored as {stored.tensors[key].dtype}" for key in keys.values()
                     if not stored.tensors[key].is_float]  # fmt: skip
    return problems


def _module(config: dict[str, Any], name: str, keys: dict[str, str], stored: Checkpoint) -> LoraModule:
    alpha = _from_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    a, b = _read(stored, keys["A"]), _read(stored, keys["B"])
    return LoraModule(
        name=name,
        a=a,
        b=b,
        scaling=scaling(alpha, int(a.shape[0]), rank_stabilised=bool(config.get("use_rslora"))),
        transposed=bool(config.get("fan_in_fan_out")),
        magnitude=_read(stored, keys["dora"]) if "dora" in keys else None,
    )


def _read(stored: Checkpoint, name: str) -> torch.Tensor:
    # PEFT's `autocast_adapter_dtype`: 16-bit adapters are held in float32, so that the sum is rounded once.
    tensor = stored.read(name).float()
    if not bool(tensor.isfinite().all()):
        raise ExportError(
            f"`{name}` has values that are not finite numbers",
            place=str(stored.place),
            hint="use a checkpoint from before the loss went wrong",
        )
    return tensor


def _from_pattern(patterns: Any, module: str, default: Any) -> Any:
    """A module's own rank or alpha: the first pattern that its name ends with, from a dot on
    (`peft.utils.other.get_pattern_key`)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
