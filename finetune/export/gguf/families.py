"""Which architectures can be converted, and by which rules."""

from __future__ import annotations

from finetune.export.gguf import falcon, gemma, llama, moe, neox, phi, qwen
from finetune.export.gguf.family import Family

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
