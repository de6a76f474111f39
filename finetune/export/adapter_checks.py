"""What of an adapter a merge would not carry over, said before anything is merged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError

if TYPE_CHECKING:
    from finetune.export.adapter import Adapter

_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
}  # fmt: skip
"""What a LoRA configuration may say: read below, or without influence on the merged weights."""

_OFF: tuple[Any, ...] = (None, False, "none", [], {})

_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""The other ways of starting a LoRA (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) also change the base they start from; the
adapter then belongs to that base, which nobody saved."""


def refused_settings(config: dict[str, Any]) -> list[str]:
    """What the configuration says that is not understood, or does not make sense."""
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
    for key, kinds in (("rank_pattern", int), ("alpha_pattern", int | float)):
        try:
            for pattern, value in (config.get(key) or {}).items():
                re.compile(rf"(.*\.)?({pattern})$")
                if not isinstance(value, kinds) or value <= 0:
                    problems.append(f"`{key}` has {value!r} for `{pattern}`")
        except (re.error, TypeError, AttributeError) as error:
            problems.append(f"`{key}` is not a table of patterns: {error}")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        problems.append("`r` and `lora_alpha` must be numbers")
    elif config["r"] < 1:
        problems.append(f"`r` is {config['r']}")
    for key in ("modules_to_save", "target_parameters"):
        names = config.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            problems.append(f"`{key}` is {names!r}, not a list of names")
    return problems


def incomplete(adapter: Adapter) -> list[str]:
    """What the configuration promises and the tensors do not hold, and the other way round."""
    config = adapter.config
    problems = [] if adapter.layers else ["it holds no LoRA weights"]
    for layer in adapter.layers:
        wanted = {"A", "B"} | ({"dora"} if config.get("use_dora") else set())
        if config.get("lora_bias") and not layer.embedding:
            wanted.add("bias")
        if set(layer.parts) != wanted:
            problems.append(f"`{layer.nested}` has the parts {sorted(layer.parts)}, not {sorted(wanted)}")
            continue
        a, b, rank = layer.shape("A"), layer.shape("B"), adapter.rank(layer.module)
        if len(a) != 2 or len(b) != 2:
            problems.append(f"`{layer.nested}` is not a linear layer: its LoRA has the shapes {a} and {b}")
        elif not layer.parameters and (a[0], b[1]) != (rank, rank):
            problems.append(f"`{layer.nested}` has the shapes {a} and {b}, its configuration says rank {rank}")
        elif a[0] != b[1]:
            problems.append(f"`{layer.nested}` has the shapes {a} and {b}, which do not belong together")
        else:
            problems += [
                f"`{layer.nested}` has a {what} of the shape {layer.shape(part)}"
                for part, what in (("dora", "magnitude"), ("bias", "bias"))
                if part in layer.parts and layer.shape(part) != (b[0],)
            ]
    for key, found in (
        ("trainable_token_indices", [tokens.module for tokens in adapter.tokens]),
        ("target_parameters", [layer.module for layer in adapter.layers if layer.parameters]),
        ("modules_to_save", [name for name in adapter.whole if adapter.saves(name.rpartition(".")[0])]),
    ):
        if config.get(key) and not found:
            problems.append(f"`{key}` is {config[key]!r} in adapter_config.json, and nothing of it is stored")
    return problems


def require_numbers(adapter: Adapter) -> None:
    """Every value is finite, and something was learned. Reads the adapter once, a tensor at a time."""
    for name in adapter.stored.tensors:
        for chunk in adapter.stored.chunks(name):
            if not bool(chunk.isfinite().all()):
                raise ExportError(
                    f"`{name}` has values that are not finite numbers",
                    place=str(adapter.stored.place),
                    hint="use a checkpoint from before the loss went wrong",
                )
    learned = (bool(layer.read("B").any()) and bool(layer.read("A").any()) for layer in adapter.layers)
    if not (adapter.whole or adapter.tokens or any(learned)):
        raise ExportError(
            "every lora_B is zero: nothing was learned",
            place=str(adapter.stored.place),
            hint="was the run stopped at its start?",
        )
