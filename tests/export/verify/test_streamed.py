"""The reference: what PEFT computes with everything in memory, though only a layer at a time is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from finetune.errors import ExportError
from finetune.export.source import open_model
from finetune.export.verify import streamed
from finetune.export.verify.streamed import StreamedModel, groups
from tests.export.conftest import LlamaMaker, peft_allowed, save_adapter

SEQUENCES = [[1, 403, 407, 261, 378, 9, 20, 31], [1, 5, 6, 7, 8, 9, 10, 200]]

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "biases": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["embed_tokens", "norm"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 403]},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with peft_allowed():
        yield


def _in_memory(base: Path, adapter: Path | None) -> list[np.ndarray[Any, Any]]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    model.eval()
    with torch.inference_mode():
        return [row.numpy() for row in model(torch.tensor(SEQUENCES)).logits]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_gives_the_very_logits_of_peft(stories: Path, tmp_path: Path, kind: str) -> None:
    adapter = save_adapter(stories, tmp_path / "adapter", **KINDS[kind])
    _shake(adapter)
    model = StreamedModel(open_model(stories), adapter, device="cpu")
    for found, expected in zip(model.logits(SEQUENCES), _in_memory(stories, adapter), strict=True):
        assert np.array_equal(found, expected)
    with model.without_adapter():
        bases = model.logits(SEQUENCES)
    for found, expected, plain in zip(bases, _in_memory(stories, None), model.logits(SEQUENCES), strict=True):
        assert np.array_equal(found, expected)
        assert np.abs(found - plain).max() > 0.1, "the adapter does nothing"


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Gemma2", "Phi3", "GPTNeoX", "Mixtral"])
def test_other_families_and_files_in_16_bit(make_llama: LlamaMaker, tmp_path: Path, architecture: str) -> None:
    """A 16-bit file is computed with in float32, as PEFT does with a model that is loaded so."""
    settings: dict[str, Any] = {"pad_token_id": 0, "vocab_size": 512}
    if architecture == "GPTNeoX":
        settings |= {"num_key_value_heads": None}
    base = make_llama(architecture=architecture, dtype=torch.bfloat16, shard="100KB", **settings)
    adapter = save_adapter(base, tmp_path / "adapter")
    found = StreamedModel(open_model(base), adapter, device="cpu").logits(SEQUENCES)
    for one, expected in zip(found, _in_memory(base, adapter), strict=True):
        assert np.array_equal(one, expected)


def test_nothing_of_the_model_stays_in_memory(stories: Path, tmp_path: Path) -> None:
    adapter = save_adapter(stories, tmp_path / "adapter")
    model = StreamedModel(open_model(stories), adapter, device="cpu")
    for _ in range(2):
        held = sum(p.untyped_storage().nbytes() for n, p in model._model.named_parameters() if "lora_" not in n)
        assert held == 4 * len([n for n, _ in model._model.named_parameters() if "lora_" not in n])
        model.logits(SEQUENCES)


def test_the_nf4_base_is_the_one_that_training_sees(make_llama: LlamaMaker, tmp_path: Path) -> None:
    from finetune.config.schema import Config
    from finetune.model.base import load_base
    from finetune.model.hardware import detect

    base = make_llama(dtype=torch.bfloat16, vocab_size=512, hidden_size=128)
    adapter = save_adapter(base, tmp_path / "adapter")
    config = Config.model_validate({"base": str(base), "data": [{"path": "/x.jsonl"}], "quantization": "nf4"})
    loaded: Any = load_base(config, base, detect()).model
    trained = peft.PeftModel.from_pretrained(loaded, adapter).eval()
    with torch.inference_mode():
        expected = trained(torch.tensor(SEQUENCES)).logits.float().numpy()
    stored = StreamedModel(open_model(base), adapter, device="cpu").logits(SEQUENCES)
    found = StreamedModel(open_model(base), adapter, device="cpu", nf4=True).logits(SEQUENCES)
    for one, want, other in zip(found, expected, stored, strict=True):
        # bitsandbytes' CPU kernel multiplies in another order than torch does.
        assert np.abs(one - want).max() < 1e-3 * np.abs(want).max()
        assert np.abs(other - want).max() > 1e-2 * np.abs(want).max()


def test_a_model_whose_files_lack_a_tensor(make_llama: LlamaMaker) -> None:
    from safetensors.torch import load_file, save_file

    base = make_llama(vocab_size=512)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"`model\.layers\.1\.mlp\.up_proj\.weight` of the model is not in its files"):
        StreamedModel(open_model(base), None, device="cpu").logits(SEQUENCES)


def test_groups_hold_every_sequence_once_and_never_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "GROUP_TOKENS", 60)
    lengths = [1, 50, 7, 8, 30, 9, 100, 2]
    found = list(groups([[0] * length for length in lengths], 512))
    assert sorted(index for group in found for index in group) == list(range(8))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 60 for group in found)


def _shake(adapter: Path) -> None:
    """Make what PEFT starts as a copy of the base (whole modules, single tokens) differ from it."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(5)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "lora_" not in name and "base_layer" not in name:
            tensors[name] = tensor + 0.05 * torch.randn_like(tensor)
    save_file(tensors, path, {"format": "pt"})
