"""Which architectures can be converted, and by which rules."""

from __future__ import annotations

from finetune.export.gguf import llama
from finetune.export.gguf.family import Family

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": llama.FAMILY,
}
"""transformers architecture (`architectures` in config.json) → family."""
