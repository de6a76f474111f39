"""GPT-NeoX and Pythia (llama.cpp's `gptneox`): layer norms, biases everywhere, rotary positions on a part of each head.

Source: llama.cpp, `src/models/gptneox.cpp`; transformers, `GPTNeoXAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.export.gguf.family import Config, Family, Metadata, Rule
from finetune.export.gguf.llama import own_output
from finetune.export.gguf.rope import scaling_keys, scaling_problems

if TYPE_CHECKING:
    import torch

_GELUS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""By transformers' names: the exact function, and its approximation by tanh, which is what llama.cpp computes."""


def split_groups(weight: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Reorder the rows of a fused projection (weight or bias): all queries, then all keys, then all values.

    transformers keeps every key head and its value head behind the query heads that share them, group by group;
    llama.cpp wants three blocks. Shape and dtype stay. One group is in llama.cpp's order already.
    """
    import torch

    shared = heads // groups
    grouped = weight.reshape(groups, shared + 2, -1, *weight.shape[1:])
    blocks = (grouped[:, :shared], grouped[:, shared], grouped[:, shared + 1])
    return torch.cat([block.reshape(-1, *weight.shape[1:]) for block in blocks])


def activation_refusals(activation: str) -> list[str]:
    """What llama.cpp would run differently about the activation of a feed-forward layer that it computes by gelu."""
    return [] if activation in _GELUS else [f"its activation is {activation}, llama.cpp's is gelu"]


def activation_notes(config: Config) -> Sequence[str]:
    """llama.cpp's `ggml_gelu` uses the approximation by tanh, on a CPU from a table in half precision."""
    return [
        "llama.cpp approximates its activation (gelu); where two tokens are almost as likely, it may take the other"
    ]


def _split_heads(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return split_groups(weight, config.num_attention_heads, config.num_attention_heads)


def _tied(config: Config) -> bool:
    return not own_output(config)


_LAYER, _BLOCK = "gpt_neox.layers.{layer}.", "blk.{layer}."

_RULES = (
    Rule("gpt_neox.embed_in.weight", "token_embd.weight"),
    Rule("gpt_neox.final_layer_norm.weight", "output_norm.weight"),
    Rule("gpt_neox.final_layer_norm.bias", "output_norm.bias"),
    Rule("embed_out.weight", "output.weight", when=own_output),
    Rule("gpt_neox.embed_in.weight", "output.weight", when=_tied),  # llama.cpp wants it written out here
    *(
        Rule(f"{_LAYER}{source}.{kind}", f"{_BLOCK}{target}.{kind}", reorder)
        for source, target, reorder in (
            ("input_layernorm", "attn_norm", None),
            ("attention.query_key_value", "attn_qkv", _split_heads),
            ("attention.dense", "attn_output", None),
            ("post_attention_layernorm", "ffn_norm", None),
            ("mlp.dense_h_to_4h", "ffn_up", None),
            ("mlp.dense_4h_to_h", "ffn_down", None),
        )
        for kind in ("weight", "bias")
    ),
)


def _rotated(config: Config) -> int:
    """How many dimensions of each head are rotated: the first ones, rounded down as transformers does."""
    head_dim = config.hidden_size // config.num_attention_heads
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _metadata(config: Config) -> Metadata:
    rope = config.rope_parameters
    keys: Metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "use_parallel_residual": bool(config.use_parallel_residual),
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "rope.dimension_count": _rotated(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    keys |= scaling_keys(rope)
    return {f"gptneox.{key}": value for key, value in keys.items()}


def _refusals(config: Config) -> list[str]:
    problems = [
        *activation_refusals(config.hidden_act),
        *scaling_problems(config.rope_parameters, ("default", "linear")),
    ]
    if not config.attention_bias:
        problems.append("its attention has no biases, llama.cpp's has")
    if _rotated(config) % 2 or not _rotated(config):
        problems.append(f"it rotates {_rotated(config)} dimensions of each head, llama.cpp pairs")
    return problems


def _unused_tensors(config: Config) -> Sequence[str]:
    # Masks and tables that old files carry along.
    unused = [r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"]
    return [*unused, r"embed_out\.weight"] if _tied(config) else unused


FAMILY = Family(
    architecture="gptneox",
    rules=_RULES,
    metadata=_metadata,
    refusals=_refusals,
    notes=activation_notes,
    ignored=_unused_tensors,
)
