"""Whole files in every quant: the bytes of the float32 file's rows, quantised; loaded and run by llama.cpp."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest
import torch

from finetune.errors import ExportError, MissingExtraError
from finetune.export.gguf import GgufReport, Quant, convert
from finetune.export.gguf import encode as encode_module
from finetune.export.gguf.encode import PIECE_WEIGHTS
from finetune.export.gguf.mix import QUANTS
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp
from finetune.llamacpp.quantize import FORMATS, quantise
from tests.export.conftest import LlamaMaker

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

WIDE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
"""Rows of whole super-blocks; the vocabulary of the small real tokenizer."""

ONCE_UPON_A_TIME = [1, 403, 407, 261, 378]

ERRORS: dict[str, float] = {
    "f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 0.01, "q4_0": 0.12, "q4_1": 0.1, "q5_0": 0.06, "q5_1": 0.05,
    "q2_k": 0.36, "q3_k": 0.2, "q4_k": 0.1, "q5_k": 0.05, "q6_k": 0.025, "iq4_nl": 0.1, "iq4_xs": 0.1,
}  # fmt: skip
"""Bound on a tensor's relative error (root mean squares): what it is for normal weights, and a fifth on top."""


@pytest.fixture
def wide(make_llama: LlamaMaker, stories: Path) -> Path:
    return make_llama(tokenizer=stories, dtype=torch.bfloat16, **WIDE)


@pytest.fixture(scope="module")
def made(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Quant, GgufReport]:
    """One model in every quant: where it lies, and what was said of it."""
    import transformers

    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **WIDE, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2
    )
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "base")
    for file in stories.glob("*token*"):
        shutil.copyfile(file, folder / "base" / file.name)
    model = open_model(folder / "base")
    return {quant: convert(model, folder / f"{quant}.gguf", quant=quant) for quant in QUANTS}


def contents(path: Path) -> dict[str, tuple[str, numpy.ndarray[Any, Any]]]:
    """Tensor → (encoding, bytes by row)."""
    return {t.name: (t.tensor_type.name.lower(), t.data) for t in gguf.GGUFReader(path).tensors}


def decoded(encoding: str, data: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    from gguf.quants import dequantize

    return numpy.asarray(dequantize(data, gguf.GGMLQuantizationType[encoding.upper()]))


@pytest.mark.parametrize("quant", get_args(Quant))
def test_a_file_holds_what_it_says_and_llama_cpp_runs_it(made: dict[Quant, GgufReport], quant: Quant) -> None:
    report, (main, number) = made[quant], QUANTS[quant]
    exact = {name: data for name, (_, data) in contents(made["f32"].out).items()}
    tensors = contents(report.out)
    assert tensors.keys() == exact.keys()
    assert tensors["blk.1.attn_q.weight"][0] == main
    assert gguf.GGUFReader(report.out).get_field("general.file_type").contents() == number
    for name, (encoding, data) in tensors.items():
        if encoding in FORMATS:
            assert numpy.array_equal(data, quantise(numpy.ascontiguousarray(exact[name]), encoding)), name
        wrong = numpy.square(decoded(encoding, data) - exact[name]).mean()
        assert numpy.sqrt(wrong / numpy.square(exact[name]).mean()) <= ERRORS[encoding], name
    assert report.encodings == collections.Counter(encoding for encoding, _ in tensors.values())
    assert report.tensors == len(tensors)
    assert report.nbytes == report.out.stat().st_size
    assert report.notes == ()
    with LlamaCpp(report.out, context=64, gpu_layers=0, threads=1) as llama:
        assert len(llama.generate_ids([1, 403, 407], 3)) == 3


@pytest.mark.parametrize("quant", ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs"])
def test_a_real_model_with_short_rows_still_tells_a_story(stories: Path, tmp_path: Path, quant: Quant) -> None:
    """Rows of 64 and 172: blocks of 32 instead of 256, and float16 where those do not fit either."""
    out = tmp_path / "stories.gguf"
    report = convert(open_model(stories), out, quant=quant)
    assert report.encodings["f16"] == 5  # ffn_down, whose rows have 172 weights
    assert any("f16" in note for note in report.notes)
    with LlamaCpp(out, context=128, gpu_layers=0, threads=1) as llama:
        assert llama.generate_ids(ONCE_UPON_A_TIME, 4) == [432, 383, 286, 261]  # ", there was a", as in float32


def test_tensors_that_come_in_many_pieces_are_the_same(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = tmp_path / "whole.gguf", tmp_path / "pieces.gguf"
    assert PIECE_WEIGHTS >= 512 * 256  # one piece a tensor
    convert(open_model(wide), whole, quant="q4_k_m", name="same")
    monkeypatch.setattr(encode_module, "PIECE_WEIGHTS", 1000)
    convert(open_model(wide), pieces, quant="q4_k_m", name="same")
    assert whole.read_bytes() == pieces.read_bytes()


def test_a_quant_that_needs_ggml_is_refused_before_anything_is_written(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingExtraError("llama.cpp is not installed")

    monkeypatch.setattr(encode_module, "require_quantiser", missing)
    monkeypatch.setattr(encode_module, "has_quantiser", lambda: False)
    with pytest.raises(MissingExtraError, match="not installed"):
        convert(open_model(wide), tmp_path / "q4.gguf", quant="q4_k_m")
    assert not list(tmp_path.glob("*.gguf*"))
    convert(open_model(wide), tmp_path / "q8.gguf", quant="q8_0")
    monkeypatch.undo()
    convert(open_model(wide), tmp_path / "ggml.gguf", quant="q8_0", name="q8")
    assert (tmp_path / "q8.gguf").read_bytes() == (tmp_path / "ggml.gguf").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_a_quant_cannot_hold_leaves_no_file(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, value: float
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_llama(tokenizer=stories, **WIDE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][500, 3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"`blk\.2\.ffn_up\.weight` has values that q4_k cannot hold"):
        convert(open_model(folder), tmp_path / "model.gguf", quant="q4_k_m")
    assert not list(tmp_path.glob("*.gguf*"))
