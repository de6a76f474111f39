"""A stored output head: transformers uses it unless it is the embedding again, whatever config.json says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError
from finetune.export.gguf import convert
from finetune.export.gguf.families import FAMILIES
from finetune.export.gguf.head import as_stored
from finetune.export.safetensors_io import TensorInfo
from finetune.export.source import open_model
from finetune.llamacpp.logits import Scorer

from .conftest import LlamaMaker

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

NAMES = {
    "Falcon": ("lm_head.weight", "transformer.word_embeddings.weight"),
    "GPTNeoX": ("embed_out.weight", "gpt_neox.embed_in.weight"),
}
USUAL = ("lm_head.weight", "model.embed_tokens.weight")
SETTINGS = {
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0},
    "Gemma3Text": {"head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0},
    "Phi3": {"pad_token_id": 0, "num_key_value_heads": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}
IDS = [1, *range(100, 120)]


def _tied(make: LlamaMaker, stories: Path, architecture: str) -> Path:
    settings = {"architecture": architecture, "vocab_size": 512} | SETTINGS.get(architecture, {})
    return make(tokenizer=stories, tie_word_embeddings=True, **settings)


def _add_head(model: Path, architecture: str, head: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    """Store a head; None takes the embedding, which is stored in `dtype`."""
    name, embedding = NAMES.get(architecture, USUAL)
    tensors = load_file(model / "model.safetensors")
    tensors[embedding] = tensors[embedding].to(dtype)
    tensors[name] = tensors[embedding].float().clone() if head is None else head
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen2Moe", "Phi3", "Gemma3Text", "Falcon", "GPTNeoX"])
def test_a_head_of_its_own_is_used(stories: Path, make_llama: LlamaMaker, tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    model = _tied(make_llama, stories, architecture)
    _add_head(model, architecture, torch.randn(512, 64))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = reference.eval()(torch.tensor([IDS])).logits[0]
    convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    with Scorer(tmp_path / "model.gguf", context=64, exact=True) as scorer:
        found = torch.tensor(scorer.logits(IDS))
    # Logits are of size 8; llama.cpp takes Gemma's, Falcon's and GPT-NeoX's GELU from a table in half precision.
    assert (found - expected).abs().max() < 0.05
    assert expected.std() > 3


@pytest.mark.parametrize("architecture", ["Llama", "Falcon", "GPTNeoX"])
def test_the_embedding_stored_twice_is_written_once(
    stories: Path, make_llama: LlamaMaker, tmp_path: Path, architecture: str
) -> None:
    model = _tied(make_llama, stories, architecture)
    _add_head(model, architecture, torch.zeros(512, 64))
    one_more = convert(open_model(model), tmp_path / "zeros.gguf", quant="f32")
    _add_head(model, architecture, None, torch.bfloat16)
    report = convert(open_model(model), tmp_path / "same.gguf", quant="f32")
    # GPT-NeoX's file has an output layer in any case: llama.cpp does not take the embedding for it.
    assert one_more.tensors - report.tensors == (0 if architecture == "GPTNeoX" else 1)


def test_gemma_2_has_no_place_for_it(stories: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    model = _tied(make_llama, stories, "Gemma2")
    _add_head(model, "Gemma2", None)
    convert(open_model(model), tmp_path / "same.gguf", quant="f32")
    _add_head(model, "Gemma2", torch.randn(512, 64))
    with pytest.raises(ExportError, match=r"its output head has weights of its own, for which llama\.cpp"):
        convert(open_model(model), tmp_path / "own.gguf", quant="f32")


# -- the comparison -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """An embedding and a head that come in groups of so many rows."""

    embedding: torch.Tensor
    head: torch.Tensor
    groups: tuple[int, int]
    place = Path("here")

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
        stored = {"model.embed_tokens.weight": self.embedding, "lm_head.weight": self.head}
        return {name: TensorInfo(name, kinds[t.dtype], tuple(t.shape)) for name, t in stored.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.head if name == "lm_head.weight" else self.embedding

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        yield from torch.split(self.read(name), self.groups[name == "lm_head.weight"])


def _is_tied(embedding: torch.Tensor, head: torch.Tensor, groups: tuple[int, int] = (7, 7)) -> bool:
    import transformers

    config = transformers.LlamaConfig(tie_word_embeddings=True)
    found = as_stored(FAMILIES["LlamaForCausalLM"], config, _Weights(embedding, head, groups))
    assert config.tie_word_embeddings
    return bool(found.tie_word_embeddings)


@pytest.mark.parametrize("groups", [(7, 7), (7, 3), (1, 20), (20, 20), (100, 9)])
def test_every_number_counts(groups: tuple[int, int]) -> None:
    embedding = torch.randn(20, 3)
    assert _is_tied(embedding, embedding.clone(), groups)
    for row in range(20):
        other = embedding.clone()
        other[row, row % 3] += 1
        assert not _is_tied(embedding, other, groups)


def test_what_is_equal() -> None:
    embedding = torch.randn(20, 3).bfloat16()
    assert _is_tied(embedding, embedding.float())
    assert not _is_tied(embedding, torch.cat([embedding, embedding]))
    assert not _is_tied(torch.ones(4, 4), torch.ones(4, 4, dtype=torch.uint8))
    assert not _is_tied(torch.full((4, 4), torch.nan), torch.full((4, 4), torch.nan))
    assert _is_tied(torch.zeros(0, 3), torch.zeros(0, 3))
