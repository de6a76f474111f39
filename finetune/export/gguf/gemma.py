"""Gemma 2 (llama.cpp's `gemma2`) and the text models of Gemma 3 (`gemma3`).

Sources: `modeling_gemma2.py` and `modeling_gemma3.py` of transformers, `src/models/gemma2.cpp` and `gemma3.cpp` of
llama.cpp. llama.cpp multiplies the embeddings by √hidden_size itself, takes the attention's scale from the head size
(not from the file) and reads everything else from the keys below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.export.gguf.family import Config, Family, Metadata, Rule
from finetune.export.gguf.llama import metadata, own_output, unused_tensors
from finetune.export.gguf.rope import scaling_problems

if TYPE_CHECKING:
    import torch


def _plus_one(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """Gemma's norms multiply by 1 + weight, llama.cpp's by the weight. float32: bfloat16 could not hold the sum."""
    return weight.float() + 1


_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."

_SHARED = (
    Rule("model.embed_tokens.weight", "token_embd.weight"),
    Rule("model.norm.weight", "output_norm.weight", _plus_one),
    Rule("lm_head.weight", "output.weight", when=own_output),  # in Gemma 2 it is refused
    Rule(f"{_LAYER}input_layernorm.weight", f"{_BLOCK}attn_norm.weight", _plus_one),
    Rule(f"{_LAYER}self_attn.q_proj.weight", f"{_BLOCK}attn_q.weight"),
    Rule(f"{_LAYER}self_attn.k_proj.weight", f"{_BLOCK}attn_k.weight"),
    Rule(f"{_LAYER}self_attn.v_proj.weight", f"{_BLOCK}attn_v.weight"),
    Rule(f"{_LAYER}self_attn.o_proj.weight", f"{_BLOCK}attn_output.weight"),
    Rule(f"{_LAYER}post_attention_layernorm.weight", f"{_BLOCK}post_attention_norm.weight", _plus_one),
    Rule(f"{_LAYER}pre_feedforward_layernorm.weight", f"{_BLOCK}ffn_norm.weight", _plus_one),
    Rule(f"{_LAYER}mlp.gate_proj.weight", f"{_BLOCK}ffn_gate.weight"),
    Rule(f"{_LAYER}mlp.up_proj.weight", f"{_BLOCK}ffn_up.weight"),
    Rule(f"{_LAYER}mlp.down_proj.weight", f"{_BLOCK}ffn_down.weight"),
    Rule(f"{_LAYER}post_feedforward_layernorm.weight", f"{_BLOCK}post_ffw_norm.weight", _plus_one),
)

_GEMMA3_ONLY = (
    Rule(f"{_LAYER}self_attn.q_norm.weight", f"{_BLOCK}attn_q_norm.weight", _plus_one),
    Rule(f"{_LAYER}self_attn.k_norm.weight", f"{_BLOCK}attn_k_norm.weight", _plus_one),
)


# -- which layers look back how far -------------------------------------------------------------------------------

_USUAL_PERIOD = {"gemma2": 2, "gemma3": 6}
"""What llama.cpp assumes without a key: every second or sixth layer sees the whole text."""


def _period(architecture: str, config: Config) -> int | None:
    """After how many layers the pattern repeats: the last layer of each period sees everything, those before it only
    their window. None if the layers follow no such pattern."""
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    candidates = (_USUAL_PERIOD[architecture], *range(1, len(windowed) + 2))
    fits = (n for n in candidates if windowed == [layer % n < n - 1 for layer in range(len(windowed))])
    return next(fits, None)


def _window(architecture: str, config: Config) -> Metadata:
    period = _period(architecture, config)
    keys: Metadata = {}
    if period != 1 or architecture == "gemma2":  # without the key, gemma2 has a window of 4096, and gemma3 none
        keys[f"{architecture}.attention.sliding_window"] = config.sliding_window
    if period is not None and period != _USUAL_PERIOD[architecture]:
        keys[f"{architecture}.attention.sliding_window_pattern"] = period
    return keys


# -- keys ---------------------------------------------------------------------------------------------------------


def _metadata_gemma2(config: Config) -> Metadata:
    caps: Metadata = {
        "gemma2.attn_logit_softcapping": float(config.attn_logit_softcapping),
        "gemma2.final_logit_softcapping": float(config.final_logit_softcapping),
    }
    return metadata("gemma2", config) | _window("gemma2", config) | caps


def _metadata_gemma3(config: Config) -> Metadata:
    keys = metadata("gemma3", config, config.rope_parameters["full_attention"]) | _window("gemma3", config)
    keys["gemma3.rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        keys["gemma3.final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


# -- refusals -----------------------------------------------------------------------------------------------------

_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def _attention_scalar(architecture: str, config: Config) -> int:
    """What llama.cpp puts in the place of `query_pre_attn_scalar`: it knows the 27B models by their layers."""
    if config.num_hidden_layers == _LAYERS_OF_27B[architecture]:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _refusals(architecture: str, config: Config) -> list[str]:
    problems = []
    if config.hidden_activation != "gelu_pytorch_tanh":
        problems.append(f"its activation is {config.hidden_activation}, llama.cpp's is gelu_pytorch_tanh")
    if config.query_pre_attn_scalar != (expected := _attention_scalar(architecture, config)):
        stated = config.query_pre_attn_scalar
        problems.append(f"it scales attention by 1/√{stated} (query_pre_attn_scalar), llama.cpp by 1/√{expected}")
    if config.attention_bias:
        problems.append("its attention has biases, which llama.cpp's has not")
    if config.use_bidirectional_attention:
        problems.append("it attends in both directions, which llama.cpp does not do for this architecture")
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append("its query heads are not a multiple of its key heads")
    if (period := _period(architecture, config)) is None:
        problems.append("its layers with and without a window (layer_types) do not alternate regularly")
    elif period != 1 and not config.sliding_window:
        problems.append("it has layers with a window, but `sliding_window` is not set")
    return problems


def _refusals_gemma2(config: Config) -> Sequence[str]:
    problems = _refusals("gemma2", config)
    if not (config.attn_logit_softcapping and config.final_logit_softcapping):
        problems.append("it does without soft capping (attn_/final_logit_softcapping), llama.cpp's gemma2 cannot")
    if own_output(config):
        problems.append("its output head has weights of its own, for which llama.cpp's gemma2 has no place")
    return [*problems, *scaling_problems(config.rope_parameters, ("default", "linear"))]


def _refusals_gemma3(config: Config) -> Sequence[str]:
    problems = _refusals("gemma3", config)
    if config.attn_logit_softcapping:
        problems.append("it caps its attention (attn_logit_softcapping), llama.cpp's gemma3 does not")
    # llama.cpp would correct the magnitude of windowed layers for YaRN too.
    whole = ("default", "linear", "yarn") if _period("gemma3", config) == 1 else ("default", "linear")
    problems += scaling_problems(config.rope_parameters["full_attention"], whole)
    return [*problems, *scaling_problems(config.rope_parameters["sliding_attention"], ("default",))]


GEMMA2 = Family(
    architecture="gemma2",
    rules=_SHARED,
    metadata=_metadata_gemma2,
    refusals=_refusals_gemma2,
    ignored=unused_tensors,
)

GEMMA3 = Family(
    architecture="gemma3",
    rules=(*_SHARED, *_GEMMA3_ONLY),
    metadata=_metadata_gemma3,
    refusals=_refusals_gemma3,
    ignored=unused_tensors,
)
