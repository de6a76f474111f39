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


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_is_quantised_although_its_linear_layers_are_a_class_of_their_own(tmp_path: Path, bias: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    from finetune.export.nf4 import nf4_round_trip, quantised_modules

    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=bias, multi_query=True
    )
    plain = transformers.FalconForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    wanted = Config.model_validate({"base": str(tmp_path), "data": [{"path": "/x.jsonl"}], "quantization": "nf4"})
    loaded = load_base(wanted, tmp_path, detect()).model.eval()
    held = {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    assert len(held) == 2 * 4
    assert held == quantised_modules(config.to_dict())
    for name, module in plain.named_modules():
        if name in held:
            module.weight.data = nf4_round_trip(module.weight.data)
    ids = torch.tensor([[1, 2, 3, 4]])
    # The same weights; only the order of multiplying and adding the bias differs.
    assert torch.allclose(loaded(ids).logits, plain(ids).logits, atol=1e-5)
