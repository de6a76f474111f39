"""Models with experts: llama.cpp continues a prompt with the tokens that transformers continues it with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError
from finetune.export.gguf import convert
from finetune.export.gguf.family import plan
from finetune.export.gguf.moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from finetune.export.source import open_model

from .conftest import LlamaMaker
from .test_gguf_models import LLAMA3_ROPE, _continuations, _expected, _shake

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

PROMPTS = [[1, 403, 407, 261, 378], [1, *range(100, 140)], [7, 7, 8]]

MIXTRAL_8: dict[str, Any] = {"architecture": "Mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN2: dict[str, Any] = {
    "architecture": "Qwen2Moe",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 72,
}
QWEN3: dict[str, Any] = {
    "architecture": "Qwen3Moe",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "head_dim": 24,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": MIXTRAL_8,
    "llama, one of three experts, tied": MIXTRAL_8
    | {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    "llama, wide heads and another rope": MIXTRAL_8 | {"head_dim": 32, "rope_parameters": LLAMA3_ROPE},
    "qwen2moe": QWEN2,
    "qwen2moe, tied and without biases": QWEN2 | {"tie_word_embeddings": True, "qkv_bias": False},
    "qwen3moe": QWEN3,
    "qwen3moe, all experts, tied": QWEN3 | {"num_experts_per_tok": 6, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", CASES)
def test_it_continues_as_in_transformers(stories: Path, make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    model = make_llama(tokenizer=stories, vocab_size=512, eos_token_id=2, **CASES[case])
    _shake(model)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert report.architecture == case.partition(",")[0]
    assert report.notes == ()
    expected = [_expected(model, prompt) for prompt in PROMPTS]
    assert _continuations(tmp_path / "model.gguf", PROMPTS) == expected
    assert all(len(set(ids)) > 5 for ids in expected)  # it does not only repeat itself


def test_a_file_has_the_experts_stacked(stories: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    from gguf import GGUFReader

    model = make_llama(tokenizer=stories, vocab_size=512, **QWEN2)
    convert(open_model(model), tmp_path / "model.gguf", quant="f16")
    stored = load_file(model / "model.safetensors")
    written = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    for name in ("gate", "up", "down"):
        experts = [stored[f"model.layers.1.mlp.experts.{i}.{name}_proj.weight"] for i in range(6)]
        expected = torch.stack(experts).to(torch.float16)
        assert torch.equal(torch.tensor(written[f"blk.1.ffn_{name}_exps.weight"].data), expected)
    shared_gate = written["blk.1.ffn_gate_inp_shexp.weight"]
    assert (list(shared_gate.shape), shared_gate.tensor_type.name) == ([64], "F32")


def test_one_expert_is_in_memory_at_a_time(stories: Path, make_llama: LlamaMaker) -> None:
    model = open_model(make_llama(tokenizer=stories, vocab_size=512, **MIXTRAL_8))
    config = _config(model.config)
    planned = {tensor.target: tensor for tensor in plan(MIXTRAL, config, model.weights)}
    stacked = planned["blk.0.ffn_down_exps.weight"]
    assert stacked.shape == (8, 64, 96)
    assert [tuple(piece.shape) for piece in stacked.rows()] == [(1, 64, 96)] * 8


def _config(values: Any) -> Any:
    from transformers import AutoConfig

    settings = dict(values)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


@pytest.mark.parametrize("settings", [MIXTRAL_8, QWEN2, QWEN3], ids=["mixtral", "qwen2", "qwen3"])
def test_experts_that_are_stored_together_make_the_same_file(
    stories: Path, make_llama: LlamaMaker, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """`save_pretrained(save_original_format=False)` writes them as transformers 5 has them in memory."""
    from transformers import AutoModelForCausalLM

    model = make_llama(tokenizer=stories, vocab_size=512, **settings)
    convert(open_model(model), tmp_path / "one.gguf", quant="f32", name="model")
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(model / "model.safetensors")
    convert(open_model(model), tmp_path / "other.gguf", quant="f32", name="model")
    assert _by_name(tmp_path / "one.gguf") == _by_name(tmp_path / "other.gguf")


def _by_name(gguf: Path) -> dict[str, tuple[list[int], bytes]]:
    from gguf import GGUFReader

    return {t.name: ([int(n) for n in t.shape], t.data.tobytes()) for t in GGUFReader(gguf).tensors}


# -- what is refused ----------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.block_sparse_moe.experts.3."
STACK = "model.layers.1.mlp.experts."
DAMAGES: dict[str, tuple[str, Any, str]] = {
    "an expert that is missing": (EXPERT + "w2.weight", None, f"`{EXPERT}w2.weight` is missing"),
    "an expert of another shape": (EXPERT + "w1.weight", (95, 64), f"`{EXPERT}w1.weight` has the shape (95, 64)"),
    "an expert too many": (EXPERT.replace("3", "8") + "w1.weight", (96, 64), "has no place"),
    "a number with a zero before it": (EXPERT.replace("3", "03") + "w1.weight", (96, 64), "has no place"),
    "experts twice": (STACK + "down_proj", (8, 64, 96), "both hold `blk.1.ffn_down_exps.weight`"),
    "quantised experts": (EXPERT + "w1.weight", torch.zeros(96, 64, dtype=torch.int8), "is quantised"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files(stories: Path, make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    name, change, words = DAMAGES[case]
    model = make_llama(tokenizer=stories, vocab_size=512, **MIXTRAL_8)
    tensors = load_file(model / "model.safetensors")
    tensors.pop(name, None)
    if change is not None:
        tensors[name] = change if isinstance(change, torch.Tensor) else torch.zeros(change)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    _refused(model, words)


def test_stacked_experts_of_an_odd_width(stories: Path, make_llama: LlamaMaker) -> None:
    """Gate and up projection have the same width."""
    model = make_llama(tokenizer=stories, vocab_size=512, num_hidden_layers=1, **MIXTRAL_8)
    tensors = {k: t for k, t in load_file(model / "model.safetensors").items() if ".experts." not in k}
    for name, shape in (("gate_up_proj", (8, 191, 64)), ("down_proj", (8, 64, 96))):
        tensors[f"model.layers.0.mlp.experts.{name}"] = torch.zeros(shape)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    _refused(model, "(8, 191, 64), which does not fit the configuration")


def test_a_configuration_with_more_layers_than_tensors(stories: Path, make_llama: LlamaMaker) -> None:
    """No list of a billion names is made."""
    model = make_llama(tokenizer=stories, vocab_size=512, **MIXTRAL_8)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (model / "config.json").write_text(json.dumps(config))
    _refused(model, "has 1000000000 layers, its files have 65 tensors")


def test_a_projection_whose_rows_are_not_the_heads(stories: Path, make_llama: LlamaMaker) -> None:
    model = make_llama(tokenizer=stories, vocab_size=512, **MIXTRAL_8)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(63, 64)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    _refused(model, "`model.layers.0.self_attn.q_proj.weight` has the shape (63, 64), which does not fit")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "weights that add up to 1 (qwen 2)": (QWEN2 | {"norm_topk_prob": True}, "norm_topk_prob is True"),
    "weights that do not (qwen 3)": (QWEN3 | {"norm_topk_prob": False}, "norm_topk_prob is False"),
    "every second layer without experts": (QWEN3 | {"decoder_sparse_step": 2}, "have no experts"),
    "one layer without experts": (QWEN2 | {"mlp_only_layers": [1]}, "have no experts"),
    "more experts per token than there are": (MIXTRAL_8 | {"num_experts_per_tok": 9}, "9 of its 8 experts"),
    "more experts than llama.cpp has room for": (MIXTRAL_8 | {"num_local_experts": 513}, "1 to 512"),
    "wide heads (qwen 2)": (QWEN2 | {"head_dim": 32}, "not as wide as its hidden size"),
    "a window": (QWEN2 | {"use_sliding_window": True}, "window only"),
    "another activation": (MIXTRAL_8 | {"hidden_act": "gelu"}, "its activation is gelu"),
}
FAMILIES = {"Mixtral": MIXTRAL, "Qwen2Moe": QWEN2_MOE, "Qwen3Moe": QWEN3_MOE}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_llamacpp_runs_otherwise(case: str) -> None:
    import transformers

    settings, words = CONFIGS[case]
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    architecture = settings["architecture"]
    config = getattr(transformers, f"{architecture}Config")(**(shape | settings))
    problems = FAMILIES[architecture].refusals(config)
    assert len(problems) == 1
    assert words in problems[0]


def _refused(model: Path, words: str) -> None:
    with pytest.raises(ExportError) as caught:
        convert(open_model(model), model.parent / "out.gguf", quant="f16")
    assert words in str(caught.value)
    assert not list(model.parent.glob("out*"))
