"""Gemma 2 and 3, Phi-3 and 4, and YaRN: llama.cpp computes what transformers computes, or the model is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.export.gguf import convert
from finetune.export.gguf.families import FAMILIES
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp
from finetune.llamacpp.logits import Scorer

from .conftest import LlamaMaker

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

SHORT, LONGER, LONG = [1, 403, 407, 261, 378], [1, *range(100, 140)], [1, *range(60, 160)]
"""Token ids; the windows and original contexts below are shorter than the last."""
LENGTH = 48
CONTEXT = 256

EXACT = 1e-5
"""RMS difference of logits relative to their standard deviation; 2e-6 was measured, which is float32's rounding."""
GELU = 2e-3
"""llama.cpp on a CPU looks GELU up in a table in half precision; 6e-4 was measured."""


def _agree(model: Path, gguf_file: Path, prompts: Sequence[list[int]], tolerance: float) -> None:
    """All logits of prompts and continuations are equal within the tolerance, and the greedy continuations are equal:
    to their end, or to a token that is ahead of the next by less than what logits differ."""
    from transformers import AutoModelForCausalLM

    # Only the eager implementation caps attention scores, as Gemma 2 was trained.
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    compared: list[int] = []
    written = 0
    with (
        Scorer(gguf_file, context=CONTEXT) as scorer,
        LlamaCpp(gguf_file, context=CONTEXT, gpu_layers=0, threads=1, exact=True) as llama,
    ):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            ids = reference.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
            with torch.no_grad():
                expected = reference(ids).logits[0]
            difference = torch.from_numpy(scorer.logits(ids[0].tolist())) - expected
            assert float(difference.pow(2).mean().sqrt() / expected.std()) < tolerance

            first, second = expected[len(prompt) - 1 : -1].topk(2).values.T
            close = (first - second < 2 * difference.abs().max()).nonzero()
            sure = int(close[0]) if len(close) else len(first)
            continuation = ids[0, len(prompt) :].tolist()
            assert llama.generate_ids(prompt, LENGTH)[:sure] == continuation[:sure]
            compared += continuation[:sure]
            written += len(continuation)
    assert len(compared) > written / 2
    assert len(set(compared)) > 10, "a model that repeats itself proves little"


def _shake(model: Path) -> None:
    """Make the norms count, and Gemma's layers too: what its embeddings say is multiplied by √hidden_size."""
    torch.manual_seed(3)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor + 0.3 * torch.randn_like(tensor)
        elif "embed_tokens" in name:
            tensors[name] = tensor * 0.2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


SETTINGS: dict[str, Any] = {"vocab_size": 512, "pad_token_id": None, "eos_token_id": 2}
GEMMA: dict[str, Any] = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16}
GLOBAL_AND_LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 7000.0},
}
W, F = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

GEMMAS: dict[str, dict[str, Any]] = {
    "gemma2": {"architecture": "Gemma2"},
    "gemma2, windows in two of three": {"architecture": "Gemma2", "num_hidden_layers": 4, "layer_types": [W, W, F, W]},
    "gemma2, low caps": {"architecture": "Gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0},
    "gemma3": {"architecture": "Gemma3Text", "num_hidden_layers": 7, "rope_parameters": GLOBAL_AND_LOCAL},
    "gemma3, every second": {
        "architecture": "Gemma3Text", "num_hidden_layers": 3, "layer_types": [W, F, W], "tie_word_embeddings": False,
    },
    "gemma3, windows everywhere, capped": {
        "architecture": "Gemma3Text", "layer_types": [W, W], "final_logit_softcapping": 1.0,
    },
    "gemma3, no window, YaRN": {
        "architecture": "Gemma3Text", "layer_types": [F, F], "final_logit_softcapping": 1.0,
        "rope_parameters": {F: YARN, W: {"rope_type": "default", "rope_theta": 10000.0}},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", GEMMAS)
def test_gemma(stories: Path, make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    model = make_llama(tokenizer=stories, **SETTINGS | GEMMA | GEMMAS[case])
    _shake(model)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert report.architecture == case.partition(",")[0]
    assert report.notes == ()
    _agree(model, tmp_path / "model.gguf", [SHORT, LONGER, LONG], GELU)


def test_norms_of_gemma_in_bfloat16_lose_nothing(stories: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    """In bfloat16, 1 + 0.0117 would be 1.0156."""
    model = make_llama(tokenizer=stories, dtype=torch.bfloat16, architecture="Gemma2", **SETTINGS | GEMMA)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].fill_(0.01171875)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    convert(open_model(model), tmp_path / "model.gguf", quant="bf16")
    (norm,) = (t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "output_norm.weight")
    assert set(norm.data.tolist()) == {1.01171875}


LONG_FACTORS, SHORT_FACTORS = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0], [1.0, 1.05, 1.1, 1.2, 1.3, 1.4]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "long_factor": LONG_FACTORS,
    "short_factor": SHORT_FACTORS,
}

PHIS: dict[str, dict[str, Any]] = {
    "phi-3": {"tie_word_embeddings": False},
    "phi-4-mini": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "a part of each head": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
}


@pytest.mark.parametrize("case", PHIS)
def test_phi(stories: Path, make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    model = make_llama(architecture="Phi3", tokenizer=stories, **SETTINGS | PHIS[case])
    _shake(model)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert (report.architecture, report.notes) == ("phi3", ())
    _agree(model, tmp_path / "model.gguf", [SHORT, LONGER, LONG], EXACT)


@pytest.mark.parametrize(("original", "prompts"), [(CONTEXT, [SHORT, LONG]), (64, [LONG])])
def test_phi_with_positions_for_long_texts(
    stories: Path, make_llama: LlamaMaker, tmp_path: Path, original: int, prompts: list[list[int]]
) -> None:
    """llama.cpp decides by its context which factors to take, transformers by the length of the text."""
    settings = {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": original,
        "max_position_embeddings": 1024,
    }
    model = make_llama(architecture="Phi3", tokenizer=stories, **SETTINGS | settings)
    _shake(model)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert f"a context of more than {original} tokens" in report.notes[0]
    _agree(model, tmp_path / "model.gguf", prompts, EXACT)


def test_a_window_of_phi_is_reported(stories: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    model = make_llama(architecture="Phi3", tokenizer=stories, sliding_window=60, **SETTINGS)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert "the last 60 tokens" in report.notes[0]
    _agree(model, tmp_path / "model.gguf", [SHORT], EXACT)  # with what follows it, within the window


YARNS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, a magnitude of its own": {"attention_factor": 0.9},
    "Qwen3, two scales": {"mscale": 0.7, "mscale_all_dim": 1.2},
}


@pytest.mark.parametrize("case", YARNS)
def test_yarn_beyond_the_original_context(stories: Path, make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    rope = YARN | YARNS[case]
    model = make_llama(
        architecture=case.partition(",")[0], tokenizer=stories, rope_parameters=rope, max_position_embeddings=64,
        **SETTINGS,
    )  # fmt: skip
    _shake(model)
    convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    _agree(model, tmp_path / "model.gguf", [SHORT, LONG], EXACT)


def test_yarn_of_qwen2_as_its_documentation_switches_it_on() -> None:
    """`type` instead of `rope_type`, and the length in the configuration stays what it was before."""
    from transformers import Qwen2Config

    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = Qwen2Config(rope_scaling=scaling, rope_theta=1e6, max_position_embeddings=32768)
    family = FAMILIES["Qwen2ForCausalLM"]
    assert list(family.refusals(config)) == []
    keys = family.metadata(config)
    assert {key: value for key, value in keys.items() if "scaling" in key or "context" in key} == {
        "qwen2.context_length": 131072,
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
        "qwen2.rope.scaling.attn_factor": 1.0,
    }


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation of Gemma": ("Gemma2", {"hidden_activation": "gelu"}, "its activation is gelu"),
    "scale of Gemma": ("Gemma2", {"query_pre_attn_scalar": 144}, "1/√144 (query_pre_attn_scalar), llama.cpp by 1/√256"),
    "scale of a large Gemma": ("Gemma3Text", {"num_hidden_layers": 62}, "llama.cpp by 1/√288"),
    "biases": ("Gemma3Text", {"attention_bias": True}, "biases"),
    "both directions": ("Gemma3Text", {"use_bidirectional_attention": True}, "both directions"),
    "irregular layers": ("Gemma3Text", {"num_hidden_layers": 3, "layer_types": [F, W, F]}, "layer_types"),
    "no window": ("Gemma2", {"sliding_window": None}, "`sliding_window` is not set"),
    "no caps": ("Gemma2", {"final_logit_softcapping": None}, "without soft capping"),
    "untied Gemma 2": ("Gemma2", {"tie_word_embeddings": False}, "output head has weights of its own"),
    "caps in Gemma 3": ("Gemma3Text", {"attn_logit_softcapping": 50.0}, "caps its attention"),
    "YaRN beside windows": ("Gemma3Text", {"rope_parameters": {F: YARN}}, "rope type 'yarn'"),
    "heads of Gemma": ("Gemma2", {"num_key_value_heads": 3}, "not a multiple"),
    "activation of Phi": ("Phi3", {"hidden_act": "gelu"}, "its activation is gelu"),
    "head size of Phi": ("Phi3", {"head_dim": 64}, "its heads have 64 dimensions each, llama.cpp's phi3 expects 96"),
    "heads of Phi": ("Phi3", {"num_key_value_heads": 5}, "not a multiple"),
    "an odd part of each head": (
        "Phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.99}}, "rotates 95 of the 96",
    ),
    "borders of YaRN": ("Llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "beta_fast"),
    "borders of YaRN that are not rounded": ("Qwen2", {"rope_parameters": YARN | {"truncate": False}}, "truncate"),
    "another rope": ("Qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llamacpp_would_run_differently_is_refused(case: str) -> None:
    import transformers

    name, changes, words = REFUSED[case]
    config = getattr(transformers, f"{name}Config")(**changes)
    problems = FAMILIES[f"{name.removesuffix('Text')}ForCausalLM"].refusals(config)
    assert len(problems) == 1
    assert words in problems[0]


def test_the_real_shapes_are_not_refused() -> None:
    """The defaults of transformers are those of real models, except for Gemma's 27B."""
    from transformers import Gemma2Config, Gemma3TextConfig, Phi3Config

    large = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 144}
    larger = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 168}
    for name, config in [
        ("Gemma2ForCausalLM", Gemma2Config()),
        ("Gemma2ForCausalLM", Gemma2Config(num_hidden_layers=46, num_key_value_heads=16, **large)),
        ("Gemma3ForCausalLM", Gemma3TextConfig()),
        ("Gemma3ForCausalLM", Gemma3TextConfig(num_hidden_layers=62, num_key_value_heads=16, **larger)),
        ("Phi3ForCausalLM", Phi3Config()),
    ]:
        assert list(FAMILIES[name].refusals(config)) == []
