"""Which architectures can be converted, and by which rules."""

from __future__ import annotations

from finetune.export.gguf import llama, qwen
from finetune.export.gguf.family import Family

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": llama.FAMILY,
    "Qwen2ForCausalLM": qwen.QWEN2,
    "Qwen3ForCausalLM": qwen.QWEN3,
}
"""transformers architecture (`architectures` in config.json) → family."""
