"""Bases that are written in a rare way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.export.merge import merge

from .conftest import LlamaMaker, assert_same_bits, peft_merged, save_adapter


def test_a_base_in_float64_becomes_float32(make_llama: LlamaMaker, stories: Path, tmp_path: Path) -> None:
    """As PEFT merges it when it is loaded in float32, which is the most that training computes in."""
    base = make_llama(tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    save_file({name: t.double() + 1e-12 for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert_same_bits(tmp_path / "merged", peft_merged(base, adapter, torch.float32))


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_theta": 5e5}, None),
        ({"rope_theta": 5e5, "rope_type": "default"}, None),
        ({"rope_theta": 5e5, "type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
    ],
    ids=["no kind", "default", "an old kind"],
)
def test_rope_parameters_are_said_for_older_readers_too(
    stories: Path, q_adapter: Path, tmp_path: Path, rope: dict[str, Any], scaling: Any
) -> None:
    base = Path(shutil.copytree(stories, tmp_path / "base", copy_function=shutil.copyfile))
    base.chmod(0o755)
    config = json.loads((stories / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling"):
        config.pop(key, None)
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    merge(base, q_adapter, tmp_path / "merged", tokenizer=base, dtype=None)
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (merged["rope_parameters"], merged["rope_theta"], merged["rope_scaling"]) == (rope, 5e5, scaling)
