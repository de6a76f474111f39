"""Models with experts: Mixtral (llama.cpp's `llama`), Qwen 1.5/2 MoE (`qwen2moe`) and Qwen 3 MoE (`qwen3moe`).

A GGUF file holds one matrix of all experts of a layer, stacked. Model folders hold a matrix per expert, as
`save_pretrained` writes it, or stacked ones with gate and up projection in one, as transformers 5 has them in memory
(`transformers/conversion_mapping.py`); `Rule`s for both stand side by side.
Sources: llama.cpp, `src/models/{llama,qwen2moe,qwen3moe}.cpp` and `build_moe_ffn` in `src/llama-graph.cpp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.export.gguf import llama, qwen
from finetune.export.gguf.family import Config, Family, Metadata, Rule

if TYPE_CHECKING:
    import torch

MAX_EXPERTS = 512
"""llama.cpp aborts on more (`LLAMA_MAX_EXPERTS` in `src/llama-hparams.h`)."""

_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."


def _first_half(rows: torch.Tensor) -> torch.Tensor:
    """(experts, 2 · width, hidden) → the gate projections, (experts, width, hidden)."""
    return rows.reshape(len(rows), 2, -1, rows.shape[2])[:, 0].contiguous()


def _second_half(rows: torch.Tensor) -> torch.Tensor:
    """(experts, 2 · width, hidden) → the up projections, (experts, width, hidden)."""
    return rows.reshape(len(rows), 2, -1, rows.shape[2])[:, 1].contiguous()


def _without_rows(row: torch.Tensor) -> torch.Tensor:
    """(1, hidden) → (hidden,): llama.cpp has a vector here, which stays float32 in quantised files."""
    return row.squeeze(0)


_STACKED = (
    Rule(f"{_LAYER}mlp.experts.gate_up_proj", f"{_BLOCK}ffn_gate_exps.weight", part=_first_half),
    Rule(f"{_LAYER}mlp.experts.gate_up_proj", f"{_BLOCK}ffn_up_exps.weight", part=_second_half),
    Rule(f"{_LAYER}mlp.experts.down_proj", f"{_BLOCK}ffn_down_exps.weight"),
)

_MIXTRAL_RULES = (
    *(rule for rule in llama.RULES if ".mlp." not in rule.source),
    Rule(f"{_LAYER}block_sparse_moe.gate.weight", f"{_BLOCK}ffn_gate_inp.weight"),
    Rule(f"{_LAYER}block_sparse_moe.experts.{{expert}}.w1.weight", f"{_BLOCK}ffn_gate_exps.weight"),
    Rule(f"{_LAYER}block_sparse_moe.experts.{{expert}}.w3.weight", f"{_BLOCK}ffn_up_exps.weight"),
    Rule(f"{_LAYER}block_sparse_moe.experts.{{expert}}.w2.weight", f"{_BLOCK}ffn_down_exps.weight"),
    Rule(f"{_LAYER}mlp.gate.weight", f"{_BLOCK}ffn_gate_inp.weight"),
    *_STACKED,
)

_QWEN_EXPERTS = (
    Rule(f"{_LAYER}mlp.gate.weight", f"{_BLOCK}ffn_gate_inp.weight"),
    Rule(f"{_LAYER}mlp.experts.{{expert}}.gate_proj.weight", f"{_BLOCK}ffn_gate_exps.weight"),
    Rule(f"{_LAYER}mlp.experts.{{expert}}.up_proj.weight", f"{_BLOCK}ffn_up_exps.weight"),
    Rule(f"{_LAYER}mlp.experts.{{expert}}.down_proj.weight", f"{_BLOCK}ffn_down_exps.weight"),
    *_STACKED,
)


def _qkv_bias(config: Config) -> bool:
    return bool(config.qkv_bias)


def _tied(config: Config) -> bool:
    return not llama.own_output(config)


_QWEN2_RULES = (
    *(rule for rule in qwen.QWEN2.rules if ".mlp." not in rule.source and ".bias" not in rule.source),
    *(
        Rule(f"{_LAYER}self_attn.{name}_proj.bias", f"{_BLOCK}attn_{name}.bias", when=_qkv_bias)
        for name in ("q", "k", "v")
    ),
    Rule("model.embed_tokens.weight", "output.weight", when=_tied),  # llama.cpp wants it written out here
    *_QWEN_EXPERTS,
    Rule(f"{_LAYER}mlp.shared_expert.gate_proj.weight", f"{_BLOCK}ffn_gate_shexp.weight"),
    Rule(f"{_LAYER}mlp.shared_expert.up_proj.weight", f"{_BLOCK}ffn_up_shexp.weight"),
    Rule(f"{_LAYER}mlp.shared_expert.down_proj.weight", f"{_BLOCK}ffn_down_shexp.weight"),
    Rule(f"{_LAYER}mlp.shared_expert_gate.weight", f"{_BLOCK}ffn_gate_inp_shexp.weight", part=_without_rows),
)

_QWEN3_RULES = (*(rule for rule in qwen.QWEN3.rules if ".mlp." not in rule.source), *_QWEN_EXPERTS)


def _metadata(architecture: str, config: Config) -> Metadata:
    return llama.metadata(architecture, config) | {
        f"{architecture}.expert_count": config.num_experts,
        f"{architecture}.expert_used_count": config.num_experts_per_tok,
    }


def _qwen2_metadata(config: Config) -> Metadata:
    return _metadata("qwen2moe", config) | {
        "qwen2moe.expert_feed_forward_length": config.moe_intermediate_size,
        "qwen2moe.expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
    }


def _qwen3_metadata(config: Config) -> Metadata:
    return _metadata("qwen3moe", config) | {"qwen3moe.expert_feed_forward_length": config.moe_intermediate_size}


def _routing_refusals(config: Config) -> list[str]:
    problems = []
    if not 0 < config.num_experts <= MAX_EXPERTS:
        problems.append(f"it has {config.num_experts} experts, llama.cpp runs 1 to {MAX_EXPERTS}")
    if not 0 < config.num_experts_per_tok <= config.num_experts:
        problems.append(f"{config.num_experts_per_tok} of its {config.num_experts} experts are used per token")
    return problems


def _sparse_refusals(config: Config, *, normalised: bool) -> list[str]:
    """What is fixed in llama.cpp's Qwen MoE models: experts in every layer, and one way to weigh them."""
    problems = _routing_refusals(config)
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        problems.append(
            "some of its layers have no experts (decoder_sparse_step, mlp_only_layers), in llama.cpp all have"
        )
    if bool(config.norm_topk_prob) is not normalised:
        does = "adds up to 1 in llama.cpp" if normalised else "does not add up to 1 in llama.cpp"
        problems.append(f"norm_topk_prob is {config.norm_topk_prob}, but what the chosen experts weigh {does}")
    return problems


def _qwen2_refusals(config: Config) -> list[str]:
    problems = [*qwen.QWEN2.refusals(config), *_sparse_refusals(config, normalised=False)]
    if llama.head_dim(config) * config.num_attention_heads != config.hidden_size:
        problems.append("its heads together are not as wide as its hidden size")
    return problems


MIXTRAL = Family(
    architecture="llama",
    rules=_MIXTRAL_RULES,
    metadata=lambda config: _metadata("llama", config),
    refusals=lambda config: [*llama.FAMILY.refusals(config), *_routing_refusals(config)],
    notes=llama.FAMILY.notes,
    extra=llama.FAMILY.extra,
    ignored=llama.unused_tensors,
)

QWEN2_MOE = Family(
    architecture="qwen2moe",
    rules=_QWEN2_RULES,
    metadata=_qwen2_metadata,
    refusals=_qwen2_refusals,
    ignored=llama.unused_tensors,
)

QWEN3_MOE = Family(
    architecture="qwen3moe",
    rules=_QWEN3_RULES,
    metadata=_qwen3_metadata,
    refusals=lambda config: [*qwen.QWEN3.refusals(config), *_sparse_refusals(config, normalised=True)],
    ignored=llama.unused_tensors,
)
