"""Whatever stands in config.json where a number belongs: it is refused, or it fits into the file."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import FinetuneError
from finetune.export.gguf.families import FAMILIES, family_of, load_config
from finetune.export.gguf.family import Metadata
from finetune.export.gguf.numbers import metadata_problems

VALUES: list[Any] = [None, 0, -8, 1, 2**40, 1e300, math.inf, math.nan, "x", [["x"]], {"a": 1}, True]
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
    "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 32, "beta_slow": 1,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
ROPES: list[dict[str, Any]] = [
    YARN | {"rope_type": "default"},
    YARN | {"rope_type": "linear"},
    YARN,
    YARN | LLAMA3 | {"rope_type": "llama3"},
    YARN | LONG | {"rope_type": "longrope"},
]
CLASSES = {"Gemma3ForCausalLM": "Gemma3TextConfig"}


def _small(architecture: str) -> dict[str, Any]:
    import transformers

    name = CLASSES.get(architecture, architecture.replace("ForCausalLM", "Config"))
    shape = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
    values = getattr(transformers, name)(**shape).to_dict()
    own = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "norm_topk_prob": "3" in name}
    return dict(values | {key: own[key] for key in own if key in values} | {"architectures": [architecture]})


def _accepted(values: dict[str, Any]) -> bool:
    """Whether a configuration is accepted. Then its keys are packed as in a file, and its tensors computed."""
    try:
        config = load_config(values, Path("here"))
        family = family_of(config, Path("here"))
    except FinetuneError:
        return False
    for value in family.metadata(config).values():
        for one in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(one, str):
                struct.pack("<f" if isinstance(one, float) else "<I", one)
    for tensor in family.extra(config).values():
        assert tensor.isfinite().all()
    return True


@pytest.mark.parametrize("architecture", FAMILIES)
def test_any_value_for_any_key(architecture: str) -> None:
    plain = _small(architecture)
    assert _accepted(plain)
    accepted = [_accepted(plain | {key: value}) for key in plain for value in VALUES]
    assert not all(accepted)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM", "FalconForCausalLM"])
def test_any_value_for_any_rope_parameter(architecture: str) -> None:
    plain = _small(architecture)
    whole = [_accepted(plain | {"rope_parameters": rope}) for rope in ROPES]
    assert whole == [
        architecture in known
        for known in (
            {"LlamaForCausalLM", "Phi3ForCausalLM", "FalconForCausalLM"},
            {"LlamaForCausalLM", "FalconForCausalLM"},
            {"LlamaForCausalLM"},
            {"LlamaForCausalLM"},
            {"Phi3ForCausalLM"},
        )
    ]
    for rope in ROPES:
        for key in rope:
            for value in VALUES:
                _accepted(plain | {"rope_parameters": rope | {key: value}})
            _accepted(plain | {"rope_parameters": {name: rope[name] for name in rope if name != key}})


def test_what_has_room_in_a_file() -> None:
    fits: Metadata = {"a": 2**32 - 1, "b": -3.4e38, "c": True, "d": "text", "e": [1, 2], "f": [0.5], "g": ["x", "y"]}
    assert metadata_problems(fits) == []
    wrong: Metadata = {"a": 2**32, "b": -1, "c": 3.5e38, "d": math.nan, "e": [1, 2**32], "f": [0.5, math.inf]}
    assert [problem[:3] for problem in metadata_problems(wrong)] == [f"`{key}`" for key in wrong]
