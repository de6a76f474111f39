"""The merge gives PEFT's bits, or says why it will not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from finetune.export.lora import SMALLEST_BLOCK, LoraModule, delta, merge_rows, merge_weight, row_blocks, scaling
from finetune.export.merge import merge
from finetune.export.merged import DType

from .conftest import LlamaMaker, assert_same_bits, peft_merged, save_adapter

DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_a_real_model_gives_the_bits_peft_gives(
    stories: Path, full_adapter: Path, tmp_path: Path, dtype: DType
) -> None:
    seen: list[int] = []

    def on_tensor(done: int, total: int, name: str) -> None:
        seen.append(done)

    report = merge(stories, full_adapter, tmp_path / "merged", tokenizer=stories, dtype=dtype, on_tensor=on_tensor)

    assert_same_bits(tmp_path / "merged", peft_merged(stories, full_adapter, DTYPES[dtype]))
    assert (report.merged, report.copied) == (35, 12)
    assert seen == list(range(47))
    assert report.nbytes == (tmp_path / "merged" / "model.safetensors").stat().st_size


def test_without_a_dtype_each_tensor_keeps_the_bases(make_llama: LlamaMaker, stories: Path, tmp_path: Path) -> None:
    base = make_llama(dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    assert_same_bits(tmp_path / "merged", peft_merged(base, adapter, torch.bfloat16))


def test_the_merged_folder_is_a_model_that_loads_and_keeps_the_runs_tokenizer(
    stories: Path, full_adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "tokenizer"
    shutil.copytree(
        stories, run, ignore=shutil.ignore_patterns("model*", "*config.json"), copy_function=shutil.copyfile
    )
    shutil.copyfile(stories / "tokenizer_config.json", run / "tokenizer_config.json")
    template = "{{ messages }}  \n\n"
    (run / "chat_template.jinja").write_text(template)
    base = tmp_path / "base"
    shutil.copytree(stories, base, copy_function=shutil.copyfile)
    base.chmod(0o755)
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitsandbytes"}, "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))

    merge(base, full_adapter, tmp_path / "merged", tokenizer=run, dtype="bfloat16")

    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == template
    merged_config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged_config["dtype"] == "bfloat16"
    assert not {"quantization_config", "torch_dtype"} & set(merged_config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == template.rstrip("\n") or tokenizer.chat_template == template


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "r": 16},
        {"r": 8, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3}, "alpha_pattern": {"down_proj": 32}},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "o_proj"]},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=["rslora", "patterns", "dora", "one layer", "lm_head", "orthogonal"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_kinds_of_lora(make_llama: LlamaMaker, stories: Path, tmp_path: Path, lora: dict[str, Any], dtype: Any) -> None:
    base = make_llama(tie_word_embeddings=False)
    adapter = save_adapter(base, tmp_path / "adapter", **lora)
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=dtype)
    assert_same_bits(tmp_path / "merged", peft_merged(base, adapter, DTYPES[dtype]))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_conv1d_weights_are_stored_the_other_way_round(make_llama: LlamaMaker, stories: Path, tmp_path: Path) -> None:
    base = make_llama(architecture="GPT2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"])
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    assert_same_bits(tmp_path / "merged", peft_merged(base, adapter, torch.float32))


def test_a_base_in_many_files_saved_without_its_outermost_module(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path
) -> None:
    base = make_llama(shard="60KB", tie_word_embeddings=True)
    assert len(list(base.glob("model-*.safetensors"))) > 2
    adapter = save_adapter(base, tmp_path / "adapter")
    expected = peft_merged(base, adapter, torch.float32)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for file in base.glob("model-*.safetensors"):
        save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    index["weight_map"] = {name.removeprefix("model."): file for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None)

    assert_same_bits(tmp_path / "merged", {name.removeprefix("model."): tensor for name, tensor in expected.items()})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.integers(1, 9),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.5, 64.0)),
    rslora=st.booleans(),
    own_rank=st.one_of(st.none(), st.integers(1, 9)),
    transposed=st.booleans(),
    dtype=st.sampled_from(list(DTYPES.values())),
    seed=st.integers(0, 2**16),
)
def test_any_rank_and_alpha_gives_pefts_layer(
    rank: int, alpha: float, rslora: bool, own_rank: int | None, transposed: bool, dtype: torch.dtype, seed: int
) -> None:
    """Against PEFT's own layer, without files."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    rank = own_rank or rank
    into, out = 24, 40
    inner = Conv1D(out, into) if transposed else torch.nn.Linear(into, out, bias=False)
    inner.weight.data = torch.randn_like(inner.weight)
    inner = inner.to(dtype)
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, fan_in_fan_out=transposed)
    layer = Linear(inner, "default", config, r=rank, lora_alpha=alpha).float()
    inner.to(dtype)
    layer.lora_B["default"].weight.data.normal_()
    module = LoraModule(
        name="layer",
        a=layer.lora_A["default"].weight.data.clone(),
        b=layer.lora_B["default"].weight.data.clone(),
        scaling=scaling(alpha, rank, rank_stabilised=rslora),
        transposed=transposed,
        magnitude=None,
    )
    ours = merge_weight(inner.weight.data.clone(), module)
    assert torch.equal(delta(module), layer.get_delta_weight("default"))
    layer.merge()
    assert torch.equal(ours, inner.weight.data)


@pytest.mark.parametrize("shape", [(640, 256), (97, 333), (16, 64), (1, 48), (2, 7), (257, 2)])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_blocks_of_rows_give_the_bits_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dora: bool, transposed: bool
) -> None:
    monkeypatch.setattr("finetune.export.lora.BLOCK_ELEMENTS", 64)
    torch.manual_seed(0)
    out, into = shape[::-1] if transposed else shape
    magnitude = torch.rand(out) if dora else None
    module = LoraModule("layer", torch.randn(5, into), torch.randn(out, 5), 1.5, transposed, magnitude)
    weight = torch.randn(shape).bfloat16()
    blocks = [(0, shape[0])] if module.needs_whole else list(row_blocks(*shape))
    assert sum(count for _, count in blocks) == shape[0]
    assert len(blocks) == 1 or min(count for _, count in blocks) >= SMALLEST_BLOCK
    parts = [
        merge_rows(weight[first : first + count], weight[first : first + count], module, first)
        for first, count in blocks
    ]
    assert torch.equal(torch.cat(parts), merge_weight(weight, module))


IMPORTED = """
import sys
from pathlib import Path
from finetune.export.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
merge(base, adapter, out, tokenizer=base, dtype=None)
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"transformers", "peft", "bitsandbytes", "pydantic"}))
"""


def test_a_merge_loads_nothing_but_torch(stories: Path, full_adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTED, str(stories), str(full_adapter), str(tmp_path / "merged")]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip() == ""


def test_an_interrupted_merge_leaves_nothing_with_a_final_name(
    stories: Path, full_adapter: Path, tmp_path: Path
) -> None:

    def stop(done: int, total: int, name: str) -> None:
        assert (tmp_path / "merged.partial").is_dir()
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(stories, full_adapter, tmp_path / "merged", tokenizer=stories, dtype=None, on_tensor=stop)
    assert not list(tmp_path.glob("merged*"))


KILLED = """
import os, sys
from pathlib import Path
from finetune.export.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
merge(base, adapter, out, tokenizer=base, dtype=None, on_tensor=lambda done, *_: done == 20 and os.kill(os.getpid(), 9))
"""


@pytest.mark.skipif(os.name == "nt", reason="kills a process as POSIX systems do")
def test_a_killed_merge_leaves_nothing_with_a_final_name_and_can_be_repeated(
    stories: Path, full_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(stories), str(full_adapter), str(out)])
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["merged.partial"]
    merge(stories, full_adapter, out, tokenizer=stories, dtype=None)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
