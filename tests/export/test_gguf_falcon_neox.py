"""Falcon and GPT-NeoX: llama.cpp continues a prompt with the tokens that transformers continues it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError
from finetune.export.gguf import convert, falcon, neox
from finetune.export.gguf.neox import split_groups
from finetune.export.source import open_model

from .conftest import LlamaMaker
from .test_gguf_models import _continuations, _expected, _shake

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

PROMPTS = [[1, 403, 407, 261, 378], [1, *range(100, 140)], [7, 7, 8]]

NEW: dict[str, Any] = {"architecture": "Falcon", "new_decoder_architecture": True, "num_kv_heads": 2}
CASES: dict[str, dict[str, Any]] = {
    "falcon, one key head": {"architecture": "Falcon"},
    "falcon, one key head, untied": {"architecture": "Falcon", "tie_word_embeddings": False},
    "falcon, a key head for each": {"architecture": "Falcon", "multi_query": False},
    "falcon, groups and two norms": NEW,
    "falcon, groups and one norm": NEW | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "falcon, large theta": NEW | {"rope_parameters": {"rope_type": "default", "rope_theta": 500042.0}},
    "falcon, narrow feed-forward": {"architecture": "Falcon", "ffn_hidden_size": 96, "activation": "gelu_new"},
    "gptneox, a quarter rotated": {"architecture": "GPTNeoX"},
    "gptneox, all rotated": {
        "architecture": "GPTNeoX",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
    },
    "gptneox, one after the other": {"architecture": "GPTNeoX", "use_parallel_residual": False},
    "gptneox, tied": {"architecture": "GPTNeoX", "tie_word_embeddings": True, "hidden_act": "gelu_fast", "seed": 1},
    "gptneox, linear rope": {
        "architecture": "GPTNeoX",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_it_continues_as_in_transformers(stories: Path, make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    """llama.cpp's gelu has about three digits: seeds are such that no two tokens are that close."""
    settings = {"vocab_size": 512, "eos_token_id": 2, "initializer_range": 0.3} | CASES[case]
    model = make_llama(tokenizer=stories, **settings)
    _shake(model)
    _edit(model, lambda tensors: [tensor.mul_(2) for name, tensor in tensors.items() if "value.weight" in name])
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert report.architecture == case.partition(",")[0]
    assert len(report.notes) == 1
    assert "approximates its activation" in report.notes[0]
    expected = [_expected(model, prompt) for prompt in PROMPTS]
    assert _continuations(tmp_path / "model.gguf", PROMPTS) == expected
    assert len({token for ids in expected for token in ids}) > 30  # it does not only repeat itself


def _edit(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_rows_go_into_three_blocks() -> None:
    """4 query heads in 2 groups, heads of one row: q0 q1 k0 v0 q2 q3 k1 v1 → queries, keys, values."""
    bias = torch.tensor([0, 1, 10, 20, 2, 3, 11, 21])
    assert split_groups(bias, 4, 2).tolist() == [0, 1, 2, 3, 10, 11, 20, 21]
    assert torch.equal(split_groups(bias[:6, None], 4, 1), bias[:6, None])
    with pytest.raises(RuntimeError):
        split_groups(bias[:7], 4, 2)


def test_a_fused_projection_of_another_size(stories: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    model = make_llama(tokenizer=stories, vocab_size=512, **NEW)
    name = "transformer.h.1.self_attention.query_key_value.weight"
    _edit(model, lambda tensors: tensors.update({name: torch.zeros(127, 64)}))
    with pytest.raises(ExportError, match=r"`transformer.h.1.*\(127, 64\), which does not fit"):
        convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("Falcon", ["transformer.h.0.self_attention.rotary_emb.inv_freq"]),
        ("GPTNeoX", ["gpt_neox.layers.1.attention.masked_bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
    ],
)
def test_tables_of_old_files_are_left_out(
    stories: Path, make_llama: LlamaMaker, tmp_path: Path, architecture: str, names: list[str]
) -> None:
    model = make_llama(tokenizer=stories, vocab_size=512, architecture=architecture)
    plain = convert(open_model(model), tmp_path / "plain.gguf", quant="f32", name="model")
    _edit(model, lambda tensors: tensors.update({name: torch.zeros(512, 64) for name in names}))
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32", name="model")
    assert report.tensors == plain.tensors


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "alibi": ({"architecture": "Falcon", "alibi": True}, "ALiBi"),
    "falcon with biases": ({"architecture": "Falcon", "bias": True}, "linear layers have biases"),
    "falcon, one after the other": ({"architecture": "Falcon", "parallel_attn": False}, "side by side"),
    "falcon's activation": ({"architecture": "Falcon", "activation": "relu"}, "its activation is relu"),
    "falcon's groups": (NEW | {"num_kv_heads": 3}, "not a multiple"),
    "neox's activation": ({"architecture": "GPTNeoX", "hidden_act": "silu"}, "its activation is silu"),
    "neox without biases": ({"architecture": "GPTNeoX", "attention_bias": False}, "has no biases"),
    "nothing rotated": (
        {"architecture": "GPTNeoX", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.05}},
        "rotates 0 dimensions",
    ),
    "a rope that is not known": (
        {"architecture": "GPTNeoX", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope type 'dynamic'",
    ),
}
FAMILIES = {"Falcon": falcon.FAMILY, "GPTNeoX": neox.FAMILY}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_llamacpp_runs_otherwise(case: str) -> None:
    import transformers

    settings, words = CONFIGS[case]
    config = getattr(transformers, f"{settings['architecture']}Config")(
        **({"hidden_size": 64, "num_attention_heads": 4} | settings)
    )
    problems = FAMILIES[settings["architecture"]].refusals(config)
    assert len(problems) == 1
    assert words in problems[0]
