"""Mixtures of experts as `ft train` trains them by default: LoRA on all linear layers, which is stacked experts too."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import ExportError
from finetune.export.adapter import read_adapter
from finetune.export.merge import merge
from finetune.export.safetensors_io import Checkpoint, StoredTensor

from .conftest import LlamaMaker, assert_same_bits, default_adapter, merged_bits, peft_merged, save_adapter

MIXTRAL = {"architecture": "Mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
QWEN = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "qwen 2": QWEN | {"architecture": "Qwen2Moe", "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "qwen 3": QWEN | {"architecture": "Qwen3Moe", "head_dim": 16},
    "qwen 3, layers without experts": QWEN | {"architecture": "Qwen3Moe", "head_dim": 16, "mlp_only_layers": [0]},
    "gpt-oss": {"architecture": "GptOss", "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16},
    "a single expert": MIXTRAL | {"num_local_experts": 1, "num_experts_per_tok": 1},
}
WITH_EXPERTS = set(FAMILIES) - {"qwen 2", "gpt-oss"}
"""Where PEFT counts experts among the linear layers, and writes their parameters' names without a module's."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_adapter_is_merged_as_peft_merges_it(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, family: str, dtype: Any
) -> None:
    base = make_llama(tie_word_embeddings=False, **FAMILIES[family])
    # `ft train` does not load GPT-OSS (it has no SDPA attention); PEFT alone makes the same adapter.
    make = save_adapter if family == "gpt-oss" else default_adapter
    adapter = make(base, tmp_path / "adapter")
    named = json.loads((adapter / "adapter_config.json").read_text())["target_parameters"] or []
    assert ("down_proj" in named) == (family in WITH_EXPERTS)
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=dtype)
    expected = peft_merged(base, adapter, getattr(torch, dtype), as_saved=tmp_path / "peft")
    assert_same_bits(tmp_path / "merged", expected)
    stored = merged_bits(base)
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, stored[name].to(tensor.dtype))}
    assert any(".experts." in name for name in changed) == (family in WITH_EXPERTS)


@pytest.mark.parametrize(
    "targets", [["q_proj", "lm_head"], r"(.*\.self_attn\.q_proj|lm_head)"], ids=["list", "pattern"]
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_name_without_a_dot_is_of_no_layer_that_is_a_target_itself(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, targets: Any
) -> None:
    """In bfloat16 the two kinds are rounded differently. GPT-OSS, where PEFT keeps a pattern as it is."""
    base = make_llama(tie_word_embeddings=False, **FAMILIES["gpt-oss"])
    adapter = save_adapter(
        base, tmp_path / "adapter", target_modules=targets, target_parameters=["gate_up_proj", "down_proj"]
    )
    assert type(json.loads((adapter / "adapter_config.json").read_text())["target_modules"]) is type(targets)
    own = {layer.module.rpartition(".")[2]: layer.parameters for layer in read_adapter(adapter).layers}
    assert {name for name, parameters in own.items() if parameters} == {"experts"}
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype="bfloat16")
    assert_same_bits(tmp_path / "merged", peft_merged(base, adapter, torch.bfloat16, as_saved=tmp_path / "peft"))


def test_a_linear_layer_that_no_setting_names_is_refused(make_llama: LlamaMaker, stories: Path, tmp_path: Path) -> None:
    base = make_llama(tie_word_embeddings=False, **MIXTRAL)
    adapter = default_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["k_proj", "v_proj"]}))
    with pytest.raises(ExportError, match=r"o_proj` fits none of"):
        merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)


# -- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_an_adapter_is_read_a_few_times_and_not_once_for_every_expert(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacked: bool
) -> None:
    """128 experts: reading a layer's LoRA for each of its 384 tensors took more than 200 times the adapter's size."""
    many = {"num_hidden_layers": 2, "intermediate_size": 32, "hidden_size": 32, "head_dim": 8}
    if stacked:
        base = make_llama(architecture="GptOss", num_local_experts=128, num_experts_per_tok=2, **many)
        monkeypatch.setattr("finetune.export.safetensors_io.reader.CHUNK_BYTES", 2**14)  # three experts at a time
        names = ["gate_up_proj", "down_proj"]
        adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names)
    else:
        base = make_llama(
            architecture="Qwen3Moe", num_experts=128, num_experts_per_tok=2, moe_intermediate_size=16, **many
        )
        adapter = default_adapter(base, tmp_path / "adapter")
    count, lock = {"bytes": 0}, threading.Lock()
    read = Checkpoint._read

    def counting(self: Checkpoint, stored: StoredTensor, start: int, nbytes: int) -> torch.Tensor:
        with lock:
            count["bytes"] += nbytes if stored.file.parent == adapter else 0
        return read(self, stored, start, nbytes)

    monkeypatch.setattr(Checkpoint, "_read", counting)
    read_adapter(adapter)
    to_check, count["bytes"] = count["bytes"], 0
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    size = sum(tensor.nbytes for tensor in load_file(adapter / "adapter_model.safetensors").values())
    # Gate and up have the same A, and threads work on two layers at their border.
    assert size <= count["bytes"] - to_check <= 3 * size
    assert to_check <= 3 * size
