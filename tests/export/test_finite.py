"""No number that is none leaves the house: not from the base, not from the adapter, not made by rounding.

Every way out is tried with everything that could bring one in. (`merge_and_unload` of PEFT hides them: a model whose
weights are NaN loads, and answers with one token for ever.)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import ExportError
from finetune.export.gguf import convert
from finetune.export.gguf.encode import Quant
from finetune.export.gguf.lora import write_lora
from finetune.export.merge import merge
from finetune.export.merged import merged_model
from finetune.export.source import open_model

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

Tensors = dict[str, torch.Tensor]

QUANTS: tuple[Quant, ...] = ("f32", "bf16", "f16", "q8_0", "q4_k_m", "iq4_xs")
"""What every encoding refuses is in test_gguf_encode.py."""

UNTOUCHED = "model.layers.1.mlp.up_proj.weight"
"""A weight of the base that the adapter does not change."""

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _base(stories: Path, tmp_path: Path, edit: Callable[[Tensors], Any], dtype: torch.dtype = torch.float32) -> Path:
    base = Path(shutil.copytree(stories, tmp_path / "base"))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def _edit(adapter: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def _set(name: str, value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[name].view(-1)[5:6].fill_(value)


def _everything_refused(base: Path, adapter: Path, tmp_path: Path, name: str, quants: tuple[Quant, ...]) -> None:
    """By name, with nothing left on the disk."""
    out = tmp_path / "out"
    for dtype in (None, "float32", "bfloat16", "float16"):
        with pytest.raises(ExportError, match=name):
            merge(base, adapter, out / "merged", tokenizer=base, dtype=dtype)
    for quant in quants:
        with pytest.raises(ExportError, match=name):
            _convert_merged(base, adapter, out / "model.gguf", quant)
    assert not out.exists() or not list(out.iterdir())


def _convert_merged(base: Path, adapter: Path, out: Path, quant: Quant) -> None:
    convert(merged_model(base, adapter, tokenizer=base, dtype="float32"), out, quant=quant)


@pytest.mark.fault("a value of the base that is no number", stage="merge, export", outcome="refused by name")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_from_the_base(stories: Path, q_adapter: Path, tmp_path: Path, value: float) -> None:
    base = _base(stories, tmp_path, _set(UNTOUCHED, value))
    _everything_refused(base, q_adapter, tmp_path, r"model\.layers\.1\.mlp\.up_proj", ("f32", "bf16", "q8_0"))
    for quant in QUANTS:
        with pytest.raises(ExportError, match=r"`blk\.1\.ffn_up\.weight` has values that \w+ cannot hold"):
            convert(open_model(base), tmp_path / "base.gguf", quant=quant)


@pytest.mark.fault("a value of the adapter that is no number", stage="merge, export", outcome="refused by name")
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_from_the_adapter(stories: Path, q_adapter: Path, tmp_path: Path, part: str, value: float) -> None:
    _edit(q_adapter, _set(f"{Q}.lora_{part}.weight", value))
    name = rf"{Q}\.lora_{part}\.weight` has values that are not finite"
    _everything_refused(stories, q_adapter, tmp_path, name, ("f32", "q8_0"))
    with pytest.raises(ExportError, match=name):
        write_lora(q_adapter, stories, tmp_path / "lora.gguf")


@pytest.mark.parametrize("part", ["A", "B"])
def test_from_an_adapter_in_float64(stories: Path, q_adapter: Path, tmp_path: Path, part: str) -> None:
    """A number there, none in float32, in which all ways out compute."""

    def widen(tensors: Tensors) -> None:
        tensors[f"{Q}.lora_{part}.weight"] = tensors[f"{Q}.lora_{part}.weight"].double().fill_(1e300)

    _edit(q_adapter, widen)
    _everything_refused(stories, q_adapter, tmp_path, r"layers\.0\.self_attn\.q_proj", ("f32",))
    with pytest.raises(ExportError, match=r"self_attn\.q_proj` has numbers that are not finite (in|once)"):
        write_lora(q_adapter, stories, tmp_path / "lora.gguf")
    assert not list(tmp_path.glob("lora*"))


def test_from_a_scale(stories: Path, q_adapter: Path, tmp_path: Path) -> None:
    """B is a number until alpha / rank is multiplied in."""
    _edit(q_adapter, lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(3e38))
    with pytest.raises(ExportError, match=r"not finite once its scale is multiplied in \(2\)"):
        write_lora(q_adapter, stories, tmp_path / "lora.gguf")
    assert not list(tmp_path.glob("lora*"))


@pytest.mark.fault("rounding to 16 bit overflows", stage="merge, export", outcome="refused by name")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_from_rounding(stories: Path, q_adapter: Path, tmp_path: Path, dtype: Any) -> None:
    """The largest float32 has no neighbour in bf16 that is a number; float16 ends at 65504."""
    value = 7e4 if dtype == "float16" else torch.finfo(torch.float32).max
    base = _base(stories, tmp_path, _set(UNTOUCHED, value))
    with pytest.raises(ExportError, match="finite"):
        merge(base, q_adapter, tmp_path / "merged", tokenizer=stories, dtype=dtype)
    assert not list(tmp_path.glob("merged*"))
    with pytest.raises(ExportError, match="cannot hold"):
        convert(open_model(base), tmp_path / "out.gguf", quant="f16" if dtype == "float16" else "bf16")
    merge(base, q_adapter, tmp_path / "merged", tokenizer=stories, dtype="float32")


def test_from_the_sum(stories: Path, q_adapter: Path, tmp_path: Path) -> None:
    """Base and adapter are numbers in bf16, their sum is none."""
    top = torch.finfo(torch.bfloat16).max
    base = _base(stories, tmp_path, _set("model.layers.0.self_attn.q_proj.weight", top), torch.bfloat16)

    def add(tensors: Tensors) -> None:
        tensors[f"{Q}.lora_A.weight"].fill_(1.0)
        tensors[f"{Q}.lora_B.weight"].fill_(1e37)

    _edit(q_adapter, add)
    _everything_refused(base, q_adapter, tmp_path, r"layers\.0\.self_attn\.q_proj", ())
    with pytest.raises(ExportError):
        _convert_merged(base, q_adapter, tmp_path / "out.gguf", "bf16")


def test_from_nf4(stories: Path, q_adapter: Path, tmp_path: Path) -> None:
    base = _base(stories, tmp_path, _set("model.layers.0.mlp.down_proj.weight", float("nan")))
    with pytest.raises(ExportError, match=r"down_proj\.weight.*finite"):
        merge(base, q_adapter, tmp_path / "merged", tokenizer=stories, dtype=None, base_precision="nf4")
