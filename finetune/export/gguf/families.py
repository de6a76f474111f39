"""Which architectures can be converted, and by which rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import BaseError, ExportError, Problem
from finetune.export.gguf import falcon, gemma, llama, moe, neox, phi, qwen
from finetune.export.gguf.family import Config, Family
from finetune.export.gguf.numbers import config_problems, metadata_problems

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": llama.FAMILY,
    "Qwen2ForCausalLM": qwen.QWEN2,
    "Qwen3ForCausalLM": qwen.QWEN3,
    "Gemma2ForCausalLM": gemma.GEMMA2,
    "Gemma3ForCausalLM": gemma.GEMMA3,
    "Phi3ForCausalLM": phi.FAMILY,
    "MixtralForCausalLM": moe.MIXTRAL,
    "Qwen2MoeForCausalLM": moe.QWEN2_MOE,
    "Qwen3MoeForCausalLM": moe.QWEN3_MOE,
    "FalconForCausalLM": falcon.FAMILY,
    "GPTNeoXForCausalLM": neox.FAMILY,
}
"""transformers architecture (`architectures` in config.json) → family."""


def load_config(values: Mapping[str, Any], folder: Path) -> Config:
    """The configuration that a config.json of these values stands for, with every default filled in.

    Raises BaseError, naming the file in `folder`, for one that transformers does not know.
    """
    from transformers import AutoConfig

    kept = {key: value for key, value in values.items() if key != "auto_map"}  # that would run remote code
    try:
        return AutoConfig.for_model(kept.pop("model_type"), **kept)
    except Exception as error:  # transformers raises KeyError, ValueError and its validators' own
        place = str(folder / "config.json")
        raise BaseError(f"its configuration cannot be loaded: {error}", place=place) from error


def family_of(config: Config, folder: Path) -> Family:
    """The family of a configuration. Raises ExportError if there is none, or llama.cpp would run it differently, or for
    numbers that no model can have: after it, `metadata` and `extra` of the family can be asked."""
    place = str(folder / "config.json")
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ExportError("`architectures` is not a list of names", place=place)
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        stated = ", ".join(names) or "not stated"
        raise ExportError(f"its architecture is {stated}; these can be converted: {', '.join(FAMILIES)}", place=place)
    # In this order: each reads what the one before has found to be in order.
    for problems_of in (config_problems, family.refusals, lambda config: metadata_problems(family.metadata(config))):
        if problems := problems_of(config):
            raise ExportError([Problem(message, place) for message in problems])
    return family
