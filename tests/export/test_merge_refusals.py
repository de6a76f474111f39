"""What a merge refuses, and that it has written nothing by then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import BaseError, ExportError, FinetuneError, RunError, StorageError
from finetune.export.base_identity import check_base, fingerprint
from finetune.export.merge import merge
from finetune.export.safetensors_io import Checkpoint, StoredTensor

from .conftest import LlamaMaker, save_adapter


def _edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(adapter: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj"

REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "only LORA"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "lora_bias": ({"lora_bias": True}, "not ['A', 'B', 'bias']"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "activated LoRA": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    "a setting of the future": ({"use_magic": True}, "use_magic"),
    "an init that changed the base": ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
    "another rank": ({"r": 5}, "rank 5"),
    "a broken pattern": ({"rank_pattern": {"(": 3}}, "rank_pattern"),
    "no table of patterns": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "a rank of nothing": ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern` has 0"),
    "a rank below one": ({"r": 0}, "`r` is 0"),
    "an alpha in words": ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern"),
    "no list of names": ({"modules_to_save": "lm_head"}, "not a list of names"),
    "DoRA without its magnitudes": ({"use_dora": True}, "not ['A', 'B', 'dora']"),
    "Megatron": ({"megatron_config": {"x": 1}}, "megatron_config"),
    "no rank": ({"r": None}, "must be numbers"),
    "an alpha beyond float32": ({"lora_alpha": 10**400}, "`lora_alpha` is not a number that float32 can hold"),
    "an alpha that is not a number": ({"lora_alpha": float("nan")}, "`lora_alpha` is not a number"),
    "an alpha of a pattern beyond float32": ({"alpha_pattern": {"q_proj": 10**400}}, "`alpha_pattern` has 1"),
    "a rank beyond all": ({"r": 10**400}, "`r` is 1000000"),
    "patterns of targets": ({"target_modules": {"q_proj": 1}, "target_parameters": ["x"]}, "not a list of names"),
    "a number as layers": ({"layers_pattern": 5}, "is not text"),
    "a repetition beyond all": ({"rank_pattern": {"a{99999999999999}": 4}}, "not a regular expression"),
    "deep groups": ({"rank_pattern": {"(" * 990 + ")" * 990: 4}}, "not a regular expression"),
    "an endless pattern": ({"rank_pattern": {"a" * 2001: 4}}, "longer than 2000"),
    "flags in a pattern": ({"target_modules": "(?i)Q_PROJ"}, "a rare kind of group"),
}
"""The last ones are what only somebody who means harm would write."""


@pytest.mark.parametrize("case", REFUSED_SETTINGS)
def test_settings_that_cannot_be_merged_are_refused(stories: Path, q_adapter: Path, tmp_path: Path, case: str) -> None:
    changes, words = REFUSED_SETTINGS[case]
    _edit_config(q_adapter, **changes)
    _refused(stories, q_adapter, tmp_path, words)


Tensors = dict[str, torch.Tensor]


def _put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.ones(*shape, dtype=dtype)})


def _for_another_module(tensors: Tensors) -> None:
    tensors.update({name.replace("q_proj", "z_proj"): tensor.clone() for name, tensor in list(tensors.items())})


def _embedding_of_rank(rank: int, *, rows: int = 512) -> Callable[[Tensors], Any]:
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    return lambda tensors: tensors.update({f"{name}A": torch.ones(rank, rows), f"{name}B": torch.ones(64, rank)})


def _scale_b(factor: float) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensor.mul_(factor) for name, tensor in tensors.items() if "lora_B" in name]


BASE = "base_model.model"
REFUSED_TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a part is missing": (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), "has the parts"),
    "a weight in full, of another shape": (_put(f"{BASE}.model.norm.weight", 65), "shape"),
    "an unknown weight in full": (_put(f"{BASE}.model.extra.weight", 64), "in full"),
    "a stray": (_put(f"{Q}.lora_C.weight", 2), "not known"),
    "an embedding": (_put(f"{BASE}.model.embed_tokens.lora_embedding_A", 2, 2), "has the parts ['A']"),
    "a bias": (_put(f"{Q}.lora_B.bias", 2), "bias"),
    "a bias that the base has not": (_put(f"{Q}.base_layer.bias", 64), "in full"),
    "a bias of lora_A": (_put(f"{Q}.lora_A.bias", 4), "not known"),
    "tokens that nobody named": (_put(f"{BASE}.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 64), "tok"),
    "an embedding's rank": (_embedding_of_rank(3), "rank 4"),
    "an embedding's size": (_embedding_of_rank(4, rows=511), "shape"),
    "an infinite weight in full": (
        lambda tensors: tensors.update({f"{BASE}.model.norm.weight": torch.full((64,), float("inf"))}),
        "not finite",
    ),
    "trained tokens": (_put(f"{BASE}.model.embed_tokens.trainable_tokens_delta", 2), "tokens"),
    "no such module": (_for_another_module, "no counterpart"),
    "another shape": (_put(f"{Q}.lora_B.weight", 65, 4), "shape"),
    "not linear": (_put(f"{Q}.lora_B.weight", 64, 4, 1, 1), "not a linear"),
    "not a number": (lambda tensors: tensors[f"{Q}.lora_B.weight"][0].fill_(float("nan")), f"{Q}.lora_B.weight"),
    "integers": (_put(f"{Q}.lora_B.weight", 64, 4, dtype=torch.int32), "stored as I32"),
    "a name without an end": (
        lambda tensors: tensors.update({f"{BASE}{'.base_layer' * 30}.x.lora_A.weight": torch.ones(1)}),
        "200 are allowed",
    ),
    "nothing": (lambda tensors: tensors.clear(), "no LoRA weights"),
    "nothing learned": (_scale_b(0.0), "nothing was learned"),
    "too little learned": (_scale_b(1e-30), "bit for bit"),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_cannot_be_merged_are_refused(stories: Path, q_adapter: Path, tmp_path: Path, case: str) -> None:
    edit, words = REFUSED_TENSORS[case]
    _edit_tensors(q_adapter, edit)
    _refused(stories, q_adapter, tmp_path, words)


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 513), ("hidden_size", 63)])
def test_weights_and_configuration_of_different_models_are_refused(
    stories: Path, q_adapter: Path, tmp_path: Path, key: str, value: int
) -> None:
    base = Path(shutil.copytree(stories, tmp_path / "base", copy_function=shutil.copyfile))
    base.chmod(0o755)
    (base / "config.json").write_text(json.dumps(json.loads((stories / "config.json").read_text()) | {key: value}))
    _refused(base, q_adapter, tmp_path, f"config.json says `{key}` {value}")


def test_no_adapter_is_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no adapter"):
        merge(stories, [], tmp_path / "merged", tokenizer=stories, dtype=None)


def test_a_base_that_was_not_trained_on_is_refused(make_llama: LlamaMaker, stories: Path, tmp_path: Path) -> None:
    """Shapes and names agree; a setting in config.json does not, or the weights lie elsewhere."""
    base = make_llama()
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    recorded = {"revision": None, "base_files": fingerprint(base), "seed": 1}
    check_base(recorded, base)
    check_base({"base": "somebody/else", "revision": "main"}, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(ExportError, match=r"config\.json: is not the file that the adapter was trained on"):
        merge(base, adapter, tmp_path / "merged", tokenizer=stories, dtype=None, recorded=recorded)
    assert not list(tmp_path.glob("merged*"))
    sharded = make_llama("sharded", shard="60KB")
    names = {"config.json", "model.safetensors.index.json", "weights"}
    before = fingerprint(sharded)
    assert before.keys() == names
    # Other values under the same heads, as another training of the same model has them.
    last = sorted(sharded.glob("*.safetensors"))[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    after = fingerprint(sharded)
    assert {name for name in names if before[name] != after[name]} == {"weights"}
    with pytest.raises(ExportError, match="has other weights than the base that the adapter was trained on"):
        check_base({"base_files": before}, sharded)


def test_another_revision_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "snapshots" / ("a" * 40)
    base.mkdir(parents=True)
    check_base({"revision": "a" * 40}, base)
    with pytest.raises(ExportError, match=f"trained on {'b' * 40}"):
        check_base({"revision": "b" * 40}, base)


def test_a_wrong_base_is_refused_without_reading_its_weights(
    make_llama: LlamaMaker, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(make_llama(), tmp_path / "adapter", modules_to_save=["lm_head"])
    other = make_llama("other", hidden_size=32)
    read = Checkpoint._read

    def only_the_adapters(self: Checkpoint, stored: StoredTensor, start: int, nbytes: int) -> torch.Tensor:
        assert stored.file.parent == adapter, stored
        return read(self, stored, start, nbytes)

    monkeypatch.setattr(Checkpoint, "_read", only_the_adapters)
    _refused(other, adapter, tmp_path, "shape", tokenizer=stories)


def test_a_sum_too_large_for_float16_is_refused_by_name(stories: Path, q_adapter: Path, tmp_path: Path) -> None:
    _edit_tensors(q_adapter, lambda t: t[f"{Q}.lora_B.weight"].fill_(1e6))
    with pytest.raises(ExportError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight.*finite"):
        merge(stories, q_adapter, tmp_path / "merged", tokenizer=stories, dtype="float16")
    assert not list(tmp_path.glob("merged*"))


def test_a_quantised_base_is_refused(make_llama: LlamaMaker, stories: Path, tmp_path: Path) -> None:
    base = make_llama()
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96 * 32, 1, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    _refused(base, adapter, tmp_path, "quantised", tokenizer=stories)


def test_what_exists_is_not_overwritten(stories: Path, full_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        merge(stories, full_adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    assert not list((tmp_path / "merged").iterdir())


def test_a_full_disk_is_noticed_before_writing(
    stories: Path, full_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(StorageError, match=r"the merged model: 65\.0 MiB needed, 976\.6 KiB free"):
        merge(stories, full_adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    assert not list(tmp_path.glob("merged*"))


def test_missing_pieces(stories: Path, q_adapter: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match=r"no adapter_config\.json"):
        merge(stories, empty, tmp_path / "merged", tokenizer=stories, dtype=None)
    with pytest.raises(BaseError, match=r"no config\.json"):
        merge(empty, q_adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    with pytest.raises(ExportError, match="no tokenizer"):
        merge(stories, q_adapter, tmp_path / "merged", tokenizer=empty, dtype=None)
    (q_adapter / "adapter_model.safetensors").rename(q_adapter / "adapter_model.bin")
    with pytest.raises(RunError, match=r"no adapter_model\.safetensors") as caught:
        merge(stories, q_adapter, tmp_path / "merged", tokenizer=stories, dtype=None)
    assert caught.value.problems[0].hint == "weights in the pickle format are never read"


def _refused(base: Path, adapter: Path, tmp_path: Path, words: str, *, tokenizer: Path | None = None) -> None:
    with pytest.raises(FinetuneError) as caught:
        merge(base, adapter, tmp_path / "merged", tokenizer=tokenizer or base, dtype="bfloat16")
    assert isinstance(caught.value, ExportError)
    assert words in str(caught.value)
    assert all(problem.place for problem in caught.value.problems)
    assert not list(tmp_path.glob("merged*"))
