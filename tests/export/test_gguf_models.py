"""llama.cpp continues a prompt with the tokens that transformers continues it with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.export.gguf import Quant, convert
from finetune.export.merge import merge
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp

from .conftest import LlamaMaker

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

PROMPTS = [[1, 403, 407, 261, 378], [1, 338, 395], [1, 286]]
"""Token ids: "Once upon a time" and two other beginnings of stories."""
LENGTH = 48


def _expected(model: Path, prompt: list[int], dtype: torch.dtype = torch.float32) -> list[int]:
    from transformers import AutoModelForCausalLM

    torch_model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    ids = torch.tensor([prompt])
    output = torch_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0
    )
    return [int(token) for token in output[0, len(prompt) :]]


def _continuations(gguf: Path, prompts: list[list[int]]) -> list[list[int]]:
    with LlamaCpp(gguf, context=256, gpu_layers=0, threads=1, exact=True) as llama:
        return [llama.generate_ids(prompt, LENGTH) for prompt in prompts]


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16"])
def test_a_real_model_continues_as_in_transformers(stories: Path, tmp_path: Path, quant: Quant) -> None:
    report = convert(open_model(stories), tmp_path / "model.gguf", quant=quant)
    assert report.tensors == 47
    assert report.nbytes == (tmp_path / "model.gguf").stat().st_size
    assert _continuations(tmp_path / "model.gguf", PROMPTS) == [_expected(stories, prompt) for prompt in PROMPTS]


def test_a_merged_model_continues_as_in_transformers(stories: Path, full_adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge(stories, full_adapter, merged, tokenizer=stories, dtype=None)
    convert(open_model(merged), tmp_path / "model.gguf", quant="f32")
    continuations = _continuations(tmp_path / "model.gguf", PROMPTS)
    assert continuations == [_expected(merged, prompt) for prompt in PROMPTS]
    assert continuations != [_expected(stories, prompt) for prompt in PROMPTS]


def test_eight_bits_answer_sensibly(stories: Path, tmp_path: Path) -> None:
    """Rows of 172 cannot be cut into blocks of 32: those matrices are float16 in an otherwise 8-bit file."""
    convert(open_model(stories), tmp_path / "model.gguf", quant="q8_0")
    convert(open_model(stories), tmp_path / "f16.gguf", quant="f16")
    assert (tmp_path / "model.gguf").stat().st_size < 0.8 * (tmp_path / "f16.gguf").stat().st_size
    (continuation,) = _continuations(tmp_path / "model.gguf", PROMPTS[:1])
    assert continuation[:8] == _expected(stories, PROMPTS[0])[:8]


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "no GQA": {"num_key_value_heads": 4},
    "heads wider than the hidden size": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "padding rows": {"vocab_size": 520},
    "bfloat16": {"dtype": torch.bfloat16},
    "many files": {"shard": "100KB"},
    "mistral": {"architecture": "Mistral", "sliding_window": None, "head_dim": 24},
}


@pytest.mark.parametrize("case", SHAPES)
def test_every_shape_continues_as_in_transformers(
    stories: Path, make_llama: LlamaMaker, tmp_path: Path, case: str
) -> None:
    settings = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2} | SHAPES[case]
    model = make_llama(tokenizer=stories, **settings)
    if "rope_parameters" in settings or "bias" in case:
        _shake(model)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    long_prompt = [1, *range(100, 140)]
    prompts = [PROMPTS[0], long_prompt]
    assert _continuations(tmp_path / "model.gguf", prompts) == [_expected(model, prompt) for prompt in prompts]
    assert report.notes == ()


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "Qwen2", "tie_word_embeddings": True},
    "qwen2, untied": {"architecture": "Qwen2", "tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen3": {"architecture": "Qwen3", "tie_word_embeddings": False, "head_dim": 24},
}


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_continues_as_in_transformers(
    assets: Path, make_llama: LlamaMaker, tmp_path: Path, case: str
) -> None:
    """With the family's real tokenizer, whose vocabulary is what takes the time."""
    tokenizer = assets / "tokenizers" / "qwen2"
    tokens = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))
    rows = 1 + max(*tokens["model"]["vocab"].values(), *(token["id"] for token in tokens["added_tokens"]))
    model = make_llama(tokenizer=tokenizer, vocab_size=rows, **FAMILIES[case])
    _shake(model)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    prompts = [PROMPTS[0], [1, *range(100, 140)]]
    assert report.architecture == case.partition(",")[0]
    assert _continuations(tmp_path / "model.gguf", prompts) == [_expected(model, prompt) for prompt in prompts]


def test_a_configuration_of_the_old_kind(stories: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    """Before transformers 5 there was `rope_theta` beside `rope_scaling`, and `torch_dtype`."""
    new = make_llama("new", vocab_size=512, tokenizer=stories, rope_parameters=LLAMA3_ROPE)
    old = Path(shutil.copytree(new, tmp_path / "old"))
    config = json.loads((new / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (old / "config.json").write_text(json.dumps(config))
    for folder in (new, old):
        convert(open_model(folder), tmp_path / "model.gguf", quant="f32", name="model")
        (tmp_path / "model.gguf").rename(tmp_path / f"{folder.name}.gguf")
    assert (tmp_path / "old.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


def _shake(model: Path) -> None:
    """Make biases and norms, which start as zeros and ones, count."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor + 0.3 * torch.randn_like(tensor)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
