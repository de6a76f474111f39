"""Loading a base: which attention it gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from finetune.config.schema import Config
from finetune.model.base import load_base
from finetune.model.hardware import detect


@pytest.mark.parametrize(("architecture", "attention"), [("Llama", "sdpa"), ("Gemma2", "eager"), ("GPTNeoX", "sdpa")])
def test_a_model_that_torchs_attention_cannot_run_gets_its_own(
    tmp_path: Path, architecture: str, attention: str
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{architecture}Config")(vocab_size=64, **shape)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(tmp_path)
    wanted = Config.model_validate({"base": str(tmp_path), "data": [{"path": "/x.jsonl"}], "quantization": "none"})
    loaded = load_base(wanted, tmp_path, detect()).model
    assert loaded.config._attn_implementation == attention
    assert bool(loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all())
