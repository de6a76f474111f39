"""Putting a LoRA on a base, and what PEFT cannot do, said in our words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from finetune.config.schema import Config
from finetune.errors import ConfigError
from finetune.model.adapter import add_adapter, check_targets
from finetune.model.base import load_base
from finetune.model.hardware import detect


def test_dropout_on_experts_is_refused_with_the_key_to_change(tmp_path: Path) -> None:
    """All linear layers of a mixture include its experts, on which PEFT knows no dropout."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=2, **shape)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(tmp_path)
    values = {"base": str(tmp_path), "data": [{"path": "/x.jsonl"}], "quantization": "none", "lora": {"dropout": 0.1}}
    wanted = Config.model_validate(values)
    with pytest.raises(ConfigError, match=r"lora\.dropout"):
        add_adapter(wanted, load_base(wanted, tmp_path, detect()))
    plain = Config.model_validate(values | {"lora": {"dropout": 0.0}})
    assert add_adapter(plain, load_base(plain, tmp_path, detect())) is not None


def test_an_adapter_on_the_output_head_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=64, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    values = {"base": str(tmp_path), "data": [{"path": "/x.jsonl"}], "lora": {"targets": ["q_proj", "lm_head"]}}
    with pytest.raises(ConfigError, match=r"lm_head is the output head, which gets no adapter") as caught:
        check_targets(Config.model_validate(values), tmp_path, "x.yaml:7")
    assert caught.value.problems[0].place == "x.yaml:7"
    # Also of a base whose layers are not known yet.
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lm_head is the output head"):
        check_targets(Config.model_validate(values), tmp_path, "x.yaml:7")
