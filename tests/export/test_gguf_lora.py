"""An adapter as a GGUF file: llama.cpp answers with base + adapter as PEFT does, or the adapter is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from finetune.errors import BaseError, ExportError, RunError
from finetune.export.gguf import convert
from finetune.export.gguf.family import Rule
from finetune.export.gguf.llama import FAMILY
from finetune.export.gguf.lora import _row_order, write_lora
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp
from finetune.llamacpp.logits import Scorer

from .conftest import LlamaMaker, peft_allowed, save_adapter

gguf_format = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

IDS = [1, *torch.randint(3, 512, (120,), generator=torch.Generator().manual_seed(0)).tolist()]

CLOSE = 3e-4
"""Logits go up to 25, adapters move them by 13 and more; float32 sums in another order differ by 4e-5 (measured)."""


def _unmerged(base: Path, adapter: Path) -> numpy.ndarray:
    """What PEFT's own layers answer, base and adapter apart as in training: the reference."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with peft_allowed(), torch.no_grad():
        logits: numpy.ndarray = peft.PeftModel.from_pretrained(model, adapter)(torch.tensor([IDS])).logits[0].numpy()
    return logits


def _answers(gguf: Path, *lora: tuple[Path, float]) -> numpy.ndarray:
    with Scorer(gguf, context=128, lora=lora) as scorer:
        logits: numpy.ndarray = scorer.logits(IDS)
    return logits


@pytest.fixture(scope="module")
def stories_gguf(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    convert(open_model(stories), path, quant="f32")
    return path


PATTERNS = {
    "rank_pattern": {"q_proj": 2, "down_proj": 7},
    "alpha_pattern": {"k_proj": 3, r"layers\.1\.mlp\.up_proj": 32},
}

SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "r": 5},
    "patterns": PATTERNS,
    "rsLoRA with patterns": PATTERNS | {"use_rslora": True},
    "one layer": {"layers_to_transform": [2], "target_modules": ["q_proj", "k_proj"]},
}


@pytest.mark.parametrize("case", SCALINGS)
def test_the_scale_is_that_of_peft(stories: Path, stories_gguf: Path, tmp_path: Path, case: str) -> None:
    adapter = save_adapter(stories, tmp_path / "adapter", **SCALINGS[case])
    report = write_lora(adapter, stories, tmp_path / "adapter.gguf")
    assert report.architecture == "llama"
    assert report.nbytes == (tmp_path / "adapter.gguf").stat().st_size
    expected = _unmerged(stories, adapter)
    assert numpy.abs(_answers(stories_gguf, (report.out, 1.0)) - expected).max() < CLOSE
    # What the comparison is worth: one per cent of scale, and the base alone, are far outside.
    assert numpy.abs(_answers(stories_gguf, (report.out, 1.01)) - expected).max() > 30 * CLOSE
    assert numpy.abs(_answers(stories_gguf) - expected).max() > 1000 * CLOSE


FAMILIES: dict[str, dict[str, Any]] = {
    "llama, untied, biases": {"architecture": "Llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"architecture": "Mistral", "sliding_window": None, "head_dim": 24},
    "qwen2": {"architecture": "Qwen2", "tie_word_embeddings": True},
    "qwen3": {"architecture": "Qwen3", "head_dim": 24},
}


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_answers_as_peft(stories: Path, make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    settings = {"tie_word_embeddings": False, "vocab_size": 520, "bos_token_id": 1, "eos_token_id": 2} | FAMILIES[case]
    base = make_llama(tokenizer=stories, **settings)
    convert(open_model(base), tmp_path / "base.gguf", quant="f32")
    adapter = save_adapter(base, tmp_path / "adapter", strength=0.2)
    report = write_lora(adapter, base, tmp_path / "adapter.gguf")
    expected = _unmerged(base, adapter)
    assert report.modules == 2 * 7
    assert numpy.abs(_answers(tmp_path / "base.gguf", (report.out, 1.0)) - expected).max() < CLOSE
    assert numpy.abs(_answers(tmp_path / "base.gguf") - expected).max() > 1000 * CLOSE


def test_the_server_takes_the_file_too(stories: Path, full_adapter: Path, stories_gguf: Path, tmp_path: Path) -> None:
    write_lora(full_adapter, stories, tmp_path / "adapter.gguf")
    prompt = IDS[:20]
    with Scorer(stories_gguf, context=128, lora=[(tmp_path / "adapter.gguf", 1.0)]) as scorer:
        expected = scorer.greedy(prompt, 40, [])
    lora = [tmp_path / "adapter.gguf"]
    with LlamaCpp(stories_gguf, context=128, gpu_layers=0, threads=1, exact=True, lora=lora) as llama:
        assert llama.generate_ids(prompt, 40) == expected
    with LlamaCpp(stories_gguf, context=128, gpu_layers=0, threads=1, exact=True) as llama:
        assert llama.generate_ids(prompt, 40) != expected


def test_two_adapters_add_up(stories: Path, stories_gguf: Path, tmp_path: Path) -> None:
    """Each counts as much as it is asked to: the same one twice by half is the same as once."""
    write_lora(save_adapter(stories, tmp_path / "adapter"), stories, tmp_path / "adapter.gguf")
    half = (tmp_path / "adapter.gguf", 0.5)
    whole = _answers(stories_gguf, (tmp_path / "adapter.gguf", 1.0))
    assert numpy.abs(_answers(stories_gguf, half, (_copy(half[0]), 0.5)) - whole).max() < CLOSE


def _copy(path: Path) -> Path:
    copy = path.with_name("copy.gguf")
    copy.write_bytes(path.read_bytes())
    return copy


def test_what_the_file_says(stories: Path, full_adapter: Path, tmp_path: Path) -> None:
    """Plain LoRA of one rank, alpha twice the rank: B is written doubled, alpha as the rank; A bit for bit."""
    from safetensors.torch import load_file

    report = write_lora(full_adapter, stories, tmp_path / "adapter.gguf", name="Stories")
    reader = gguf_format.GGUFReader(report.out)
    values = {field.name: field.contents() for field in reader.fields.values()}
    assert (values["general.type"], values["general.architecture"]) == ("adapter", "llama")
    assert (values["general.name"], values["adapter.type"]) == ("Stories", "lora")
    assert values["adapter.lora.alpha"] == report.rank == 4
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(written) == 2 * report.modules == 2 * 35
    trained = load_file(full_adapter / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.3.mlp.down_proj"
    assert numpy.array_equal(written["blk.3.ffn_down.weight.lora_a"], trained[f"{layer}.lora_A.weight"].numpy())
    assert numpy.array_equal(written["blk.3.ffn_down.weight.lora_b"], 2 * trained[f"{layer}.lora_B.weight"].numpy())


# -- refusals -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "is a magnitude of DoRA"),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "changes the embedding"),
    "shared output layer": (
        {"target_modules": ["lm_head", "q_proj"]},
        "was trained in full|no weight of its own|shares its weight",
    ),
    "whole modules": ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "was trained in full"),
    "tokens": ({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, "holds trained tokens"),
    "biases": ({"lora_bias": True, "target_modules": ["q_proj"]}, "is a trained bias"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's about tied weights
def test_what_llama_cpp_would_not_do_is_refused(stories: Path, tmp_path: Path, case: str) -> None:
    settings, words = REFUSED[case]
    adapter = save_adapter(stories, tmp_path / "adapter", **settings)
    with pytest.raises(ExportError, match=words) as caught:
        write_lora(adapter, stories, tmp_path / "adapter.gguf")
    assert "merged" in str(caught.value.problems[0].hint)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_another_model_is_refused(
    stories: Path, make_llama: LlamaMaker, q_adapter: Path, tmp_path: Path
) -> None:
    """With nothing but the base's config.json: its family, its layers and its width."""
    for settings, words in (
        ({"num_hidden_layers": 3}, r"`model\.layers\.[34]\.self_attn\.q_proj` has no weight of its own"),
        ({"num_hidden_layers": 5, "hidden_size": 96}, r"of the shape \(64, 64\); this base's hidden size is 96"),
        ({"num_hidden_layers": 5, "num_attention_heads": 64, "num_key_value_heads": 64}, "rearranged"),
    ):
        base = make_llama(f"base{len(list(tmp_path.iterdir()))}", **settings)
        (base / "model.safetensors").unlink()
        with pytest.raises(ExportError, match=words):
            write_lora(q_adapter, base, tmp_path / "adapter.gguf")


def test_what_is_missing_or_there_already_is_said(stories: Path, q_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    with pytest.raises(RunError, match=r"adapter_config\.json"):
        write_lora(stories, stories, out)
    with pytest.raises(BaseError, match=r"config\.json"):
        write_lora(q_adapter, q_adapter, out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ExportError, match="its architecture is GPT2LMHeadModel"):
        write_lora(q_adapter, other, out)
    write_lora(q_adapter, stories, out)
    with pytest.raises(ExportError, match="exists already"):
        write_lora(q_adapter, stories, out)


def test_only_rules_that_move_rows_can_be_followed() -> None:
    class Heads:
        num_attention_heads = 2

    queries = next(rule for rule in FAMILY.rules if rule.target.endswith("attn_q.weight"))
    order = _row_order(queries, 8, Heads())
    assert order is not None
    assert order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    b, a = torch.randn(8, 3), torch.randn(3, 5)
    assert queries.reorder is not None
    assert torch.equal(queries.reorder(b @ a, Heads()), (b @ a)[order])
    plain = _row_order(Rule("a", "b"), 8, Heads())
    assert plain is not None
    assert plain.tolist() == list(range(8))
    for other in (
        lambda weight, _: weight + 1,
        lambda weight, _: weight.flip(1),
        lambda weight, _: weight[[0, 0, *range(2, 8)]],
        lambda weight, _: weight[:4],
        lambda weight, _: weight.T,
        lambda weight, _: weight.reshape(3, -1),
    ):
        assert _row_order(replace(queries, reorder=other), 8, Heads()) is None
