"""config.json → the shape of a model: which linear layers a block has, and how many parameters stand outside of them.

A family is what transformers calls a model type. Where config.json leaves a key out, the value is the one that
transformers' class for it takes (transformers/models/<type>/configuration_<type>.py, 5.23), because that is what will
be built. Tests build every family with transformers and compare the counts.

The file is hostile: a wrong type, a number out of bounds or a combination that nobody can build is a BaseError that
names the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune.errors import BaseError
from finetune.plan.setup import Linear, Shape

_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "n_embed": 2**18,
    "intermediate_size": 2**21,
    "moe_intermediate_size": 2**21,
    "ffn_hidden_size": 2**21,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "num_local_experts": 2**12,
    "num_experts": 2**12,
    "num_experts_per_tok": 2**12,
    "num_ln_in_parallel_attn": 2,
    "decoder_sparse_step": 2**12,
}
"""The most that a key may say: some way beyond every published model, and no further."""


class Facts:
    """config.json with the defaults of its family, read key by key. `place` is named in errors."""

    def __init__(self, given: Mapping[str, object], defaults: Mapping[str, object], place: str) -> None:
        self._given, self._defaults, self.place = given, defaults, place

    def get(self, key: str) -> object:
        """What stands there, or what the family takes for a key that is missing."""
        return self._given[key] if key in self._given else self._defaults.get(key)

    def number(self, key: str, default: int | None = None) -> int:
        """A positive whole number within its limit; `default` stands for null. Raises BaseError for anything else."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"`{key}` is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LIMITS[key]:
            raise self.error(f"`{key}` must be a whole number from 1 to {_LIMITS[key]:,}, not {_short(value)}")
        return value

    def optional(self, key: str) -> int | None:
        """As `number`, or None where there is nothing, null or 0."""
        value = self.get(key)
        return None if value is None or (value == 0 and not isinstance(value, bool)) else self.number(key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        value = False if value is None else value
        if not isinstance(value, bool):
            raise self.error(f"`{key}` must be true or false, not {_short(value)}")
        return value

    def divided(self, key: str, by: str) -> int:
        """One number by another, which must divide it."""
        whole, parts = self.number(key), self.number(by)
        if whole % parts:
            raise self.error(f"`{key}` ({whole}) is not a multiple of `{by}` ({parts})")
        return whole // parts

    def error(self, message: str) -> BaseError:
        return BaseError(
            message, place=self.place, hint="download the model again, or give a base that transformers knows"
        )


@dataclass(frozen=True)
class _Family:
    """What sets one family apart from the others."""

    build: Callable[[Facts, str], Shape]
    defaults: Mapping[str, object]


def shape_of(facts: Mapping[str, object], place: str) -> Shape:
    """The shape that a config.json describes. `place` (the file, or the Hub id) is what errors name.

    Raises BaseError for a model type that the plan does not know, and for a key that no model can have.
    """
    model_type = facts.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if not isinstance(model_type, str) or family is None:
        known = ", ".join(sorted(FAMILIES))
        raise BaseError(
            f"the plan does not know the model type {_short(model_type)}", place=place, hint=f"it knows: {known}"
        )
    return family.build(Facts(facts, family.defaults, place), model_type)


# -- the Llama-like families --------------------------------------------------------------------------------------


def _llama_like(facts: Facts, model_type: str) -> Shape:
    """RMSNorm, grouped queries, a gated MLP. What differs from family to family stands in the tables below."""
    hidden, heads = facts.number("hidden_size"), facts.number("num_attention_heads")
    kv_heads = facts.number("num_key_value_heads", heads)
    head_dim = facts.number("head_dim") if facts.get("head_dim") is not None else facts.divided(*_WIDTH_BY_HEADS)
    if heads % kv_heads:
        raise facts.error(f"`num_attention_heads` ({heads}) is not a multiple of `num_key_value_heads` ({kv_heads})")
    attention_bias = model_type == "qwen2" or (model_type in _ATTENTION_BIAS and facts.flag("attention_bias"))
    mlp_bias = model_type in _MLP_BIAS and facts.flag("mlp_bias")
    queries, keys = heads * head_dim, kv_heads * head_dim
    if model_type == "phi3":
        attention = [Linear("qkv_proj", hidden, queries + 2 * keys)]
    else:
        outputs = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
        attention = [Linear(name, hidden, width, attention_bias) for name, width in outputs]
    attention.append(Linear("o_proj", queries, hidden, attention_bias and model_type != "qwen2"))
    if model_type in _EXPERTS:
        intermediate, mlp = _experts(facts, hidden, model_type)
    else:
        intermediate = facts.number("intermediate_size")
        mlp = _gated_mlp(hidden, intermediate, mlp_bias, fused=model_type == "phi3")
    linears = (*attention, *mlp)
    norms = _NORMS.get(model_type, 2) * hidden
    if model_type in _HEAD_NORMS:
        norms += 2 * head_dim
    if model_type == "olmo2":  # one norm over all queries, one over all keys
        norms += queries + keys
    return Shape(
        model_type=model_type,
        hidden=hidden,
        layers=facts.number("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=facts.number("vocab_size"),
        tied=facts.flag("tie_word_embeddings"),
        context=facts.number("max_position_embeddings"),
        window=facts.optional("sliding_window") if model_type in _WINDOW_EVERYWHERE else None,
        local=facts.optional("sliding_window") if model_type in _WINDOW_SOMEWHERE else None,
        linears=linears,
        vectors=norms + _biases(linears),
        outside=hidden,
        gated=True,
        parallel=False,
    )


_WIDTH_BY_HEADS = ("hidden_size", "num_attention_heads")

_ATTENTION_BIAS = {"llama", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3"}
"""Families whose `attention_bias` gives q, k, v and o a bias. Qwen2 has one on q, k and v in any case."""

_MLP_BIAS = {"llama", "granite", "smollm3"}

_NORMS = {"gemma2": 4, "gemma3_text": 4}
"""RMSNorms of width `hidden_size` in a block, where there are not two."""

_HEAD_NORMS = {"qwen3", "qwen3_moe", "gemma3_text"}
"""Families that norm each head's query and key, with one weight for all heads."""

_EXPERTS = {"mixtral", "qwen3_moe"}

_WINDOW_EVERYWHERE = {"mistral", "mixtral", "phi3"}

_WINDOW_SOMEWHERE = {"gemma2", "gemma3_text"}
"""Families in which layers with a window take turns with layers that see everything."""


def _gated_mlp(hidden: int, intermediate: int, bias: bool, *, fused: bool) -> list[Linear]:
    down = Linear("down_proj", intermediate, hidden, bias)
    if fused:
        return [Linear("gate_up_proj", hidden, 2 * intermediate, bias), down]
    return [Linear(name, hidden, intermediate, bias) for name in ("gate_proj", "up_proj")] + [down]


def _experts(facts: Facts, hidden: int, model_type: str) -> tuple[int, list[Linear]]:
    """A router and the experts' stacked matrices, in transformers 5 parameters of three dimensions.

    bitsandbytes quantises modules that are exactly `nn.Linear` (transformers/integrations/bitsandbytes.py,
    replace_with_bnb_linear), so that it leaves them in 16 bit, and PEFT's all-linear adapts them all the same
    (peft/utils/transformers_weight_conversion.py). Both were seen on models built small.
    """
    if model_type == "qwen3_moe" and (facts.number("decoder_sparse_step") != 1 or facts.get("mlp_only_layers")):
        raise facts.error("`decoder_sparse_step` or `mlp_only_layers` makes layers differ, which the plan cannot do")
    width = facts.number("moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size")
    key = "num_experts" if facts.get("num_experts") is not None else "num_local_experts"
    experts, active = facts.number(key), facts.number("num_experts_per_tok")
    if active > experts:
        raise facts.error(f"`num_experts_per_tok` ({active}) is more than `{key}` ({experts})")
    return width, [
        Linear("gate", hidden, experts, quantized=False),
        Linear("gate_up_proj", hidden, 2 * width, copies=experts, active=active, quantized=False),
        Linear("down_proj", width, hidden, copies=experts, active=active, quantized=False),
    ]


def _biases(linears: tuple[Linear, ...]) -> int:
    return sum(linear.copies * linear.outputs for linear in linears if linear.bias)


# -- the others ---------------------------------------------------------------------------------------------------


def _gpt_neox(facts: Facts, model_type: str) -> Shape:
    """LayerNorm, one joint matrix for queries, keys and values, an MLP without a gate (modeling_gpt_neox.py)."""
    hidden, heads = facts.number("hidden_size"), facts.number("num_attention_heads")
    head_dim, bias = facts.divided(*_WIDTH_BY_HEADS), facts.flag("attention_bias")
    intermediate = facts.number("intermediate_size")
    linears = (
        Linear("query_key_value", hidden, 3 * hidden, bias),
        Linear("dense", hidden, hidden, bias),
        Linear("dense_h_to_4h", hidden, intermediate, True),
        Linear("dense_4h_to_h", intermediate, hidden, True),
    )
    parallel = facts.flag("use_parallel_residual")
    return _with_layer_norms(
        facts, model_type, hidden, (heads, heads, head_dim), intermediate, linears, norms=2, parallel=parallel
    )


def _falcon(facts: Facts, model_type: str) -> Shape:
    """Falcon 7B, 40B, 180B and Falcon 2 (modeling_falcon.py). Falcon 3 is a Llama.

    Its linear layers are a class of their own (`FalconLinear`), which bitsandbytes would pass over: they are plain ones
    when the base is loaded quantised (model/families.py).
    """
    hidden = facts.number("n_embed") if facts.get("n_embed") is not None else facts.number("hidden_size")
    heads, bias = facts.number("num_attention_heads"), facts.flag("bias")
    if hidden % heads:
        raise facts.error(f"`hidden_size` ({hidden}) is not a multiple of `num_attention_heads` ({heads})")
    head_dim = hidden // heads
    new, parallel = facts.flag("new_decoder_architecture"), facts.flag("parallel_attn")
    kv_heads = 1 if facts.flag("multi_query") and not new else facts.number("num_kv_heads", heads)
    if heads % kv_heads:
        raise facts.error(f"`num_attention_heads` ({heads}) is not a multiple of `num_kv_heads` ({kv_heads})")
    if not new and kv_heads != 1:  # without groups every head has its own key and value, whatever num_kv_heads says
        kv_heads = heads
    intermediate = facts.number("ffn_hidden_size", 4 * hidden)
    shapes = (
        ("query_key_value", hidden, (heads + 2 * kv_heads) * head_dim),
        ("dense", hidden, hidden),
        ("dense_h_to_4h", hidden, intermediate),
        ("dense_4h_to_h", intermediate, hidden),
    )
    linears = tuple(Linear(name, inputs, outputs, bias) for name, inputs, outputs in shapes)
    two_norms = not parallel or facts.number("num_ln_in_parallel_attn", 2 if new else 1) == 2
    norms = 2 if two_norms else 1
    return _with_layer_norms(
        facts, model_type, hidden, (heads, kv_heads, head_dim), intermediate, linears, norms, parallel=parallel or new
    )


def _with_layer_norms(
    facts: Facts,
    model_type: str,
    hidden: int,
    heads: tuple[int, int, int],
    intermediate: int,
    linears: tuple[Linear, ...],
    norms: int,
    *,
    parallel: bool,
) -> Shape:
    """A model whose norms have a weight and a bias, and whose MLP has no gate.

    heads  of queries, of keys, and the width of each; norms: of one block, beside the last one of the model
    """
    query_heads, kv_heads, head_dim = heads
    return Shape(
        model_type=model_type,
        hidden=hidden,
        layers=facts.number("num_hidden_layers"),
        heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=facts.number("vocab_size"),
        tied=facts.flag("tie_word_embeddings"),
        context=facts.number("max_position_embeddings"),
        window=None,
        linears=linears,
        vectors=norms * 2 * hidden + _biases(linears),
        outside=2 * hidden,
        gated=False,
        parallel=parallel,
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _defaults(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, context: int, **others: object
) -> dict[str, object]:
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate}
    counts = {"num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": context}
    return sizes | counts | others


FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(_llama_like, _defaults(32000, 4096, 11008, 32, 32, 2048)),
    "mistral": _Family(
        _llama_like, _defaults(32000, 4096, 14336, 32, 32, 131072, num_key_value_heads=8, sliding_window=4096)
    ),
    "mixtral": _Family(
        _llama_like,
        _defaults(
            32000, 4096, 14336, 32, 32, 131072, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2
        ),
    ),
    "qwen2": _Family(_llama_like, _defaults(151936, 4096, 22016, 32, 32, 32768, num_key_value_heads=32)),
    "qwen3": _Family(_llama_like, _defaults(151936, 4096, 22016, 32, 32, 32768, num_key_value_heads=32, head_dim=128)),
    "qwen3_moe": _Family(
        _llama_like,
        _defaults(151936, 2048, 6144, 24, 32, 32768, num_key_value_heads=4, decoder_sparse_step=1)
        | {"moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_local_experts": 128},
    ),
    "gemma": _Family(
        _llama_like,
        _defaults(256000, 3072, 24576, 28, 16, 8192, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True),
    ),
    "gemma2": _Family(
        _llama_like,
        _defaults(256000, 2304, 9216, 26, 8, 8192, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True)
        | {"sliding_window": 4096},
    ),
    "gemma3_text": _Family(
        _llama_like,
        _defaults(262208, 2304, 9216, 26, 8, 131072, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True)
        | {"sliding_window": 4096},
    ),
    "phi3": _Family(_llama_like, _defaults(32064, 3072, 8192, 32, 32, 4096)),
    "olmo2": _Family(_llama_like, _defaults(50304, 4096, 11008, 32, 32, 2048)),
    "granite": _Family(_llama_like, _defaults(32000, 4096, 11008, 32, 32, 2048)),
    "smollm3": _Family(
        _llama_like, _defaults(128256, 2048, 11008, 36, 16, 32768, num_key_value_heads=4, tie_word_embeddings=True)
    ),
    "gpt_neox": _Family(
        _gpt_neox,
        _defaults(50432, 6144, 24576, 44, 64, 2048, attention_bias=True, use_parallel_residual=True),
    ),
    "falcon": _Family(
        _falcon,
        _defaults(65024, 4544, 18176, 32, 71, 2048, multi_query=True, parallel_attn=True, tie_word_embeddings=True),
    ),
}
"""Every model type that the plan knows."""
