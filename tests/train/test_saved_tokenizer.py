"""The tokenizer that a run keeps gives the ids of training: to us from `adapter/`, to transformers from `merged/`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune.data.tokenizer import load_tokenizer
from finetune.train.saved import copy_tokenizer

TEXTS = ["In 2024 there were 12345.", "<s>hi <|end|>you <|user|>\n there", " lead e\u0301 cafe\u0301", "a\n\n b's"]
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}

CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "smollm": ("gpt-2", "llama", {"tokenizer_class": "GPT2Tokenizer"}, {"pre_tokenizer": DIGITS}),
    "phi-4": ("llama-bpe", "phi3", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "phi-3": ("phi-3", "phi3", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, {}),
    "mistral": ("phi-3", "mistral", {"tokenizer_class": "LlamaTokenizer", "legacy": True}, {}),
    "llama 2": ("phi-3", "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False}, {}),
    "r1, qwen": ("qwen2", "qwen2", {"tokenizer_class": "LlamaTokenizerFast"}, {}),
    "r1, llama": ("llama-bpe", "llama", {"tokenizer_class": "LlamaTokenizerFast"}, {}),
    "pythia": ("gpt-2", "gpt_neox", {"tokenizer_class": "GPTNeoXTokenizerFast"}, {}),
}
"""A real tokenizer that stands for the family's, the model type, and what the family's files say."""


@pytest.mark.parametrize("case", CASES)
def test_everybody_has_the_ids_of_training(assets: Path, tmp_path: Path, case: str) -> None:
    source, kind, settings, spec = CASES[case]
    base = Path(shutil.copytree(assets / "tokenizers" / source, tmp_path / "base", copy_function=shutil.copyfile))
    base.chmod(0o755)
    for name, changes in (("tokenizer_config.json", settings), ("tokenizer.json", spec)):
        path = base / name
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    (base / "config.json").write_text(json.dumps({"model_type": kind}))
    trained = load_tokenizer(base)
    ids = [trained.encode(text, special=False) for text in TEXTS]

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    copy_tokenizer(trained, adapter)
    kept = load_tokenizer(adapter)
    assert [kept.encode(text, special=False) for text in TEXTS] == ids
    assert kept.special == trained.special

    (adapter / "config.json").write_text(json.dumps({"model_type": kind}))  # as a merge has it
    loaded = AutoTokenizer.from_pretrained(adapter)
    assert [loaded(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == ids


def test_code_that_comes_with_a_tokenizer_is_not_kept(assets: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(assets / "tokenizers" / "gpt-2", tmp_path / "base", copy_function=shutil.copyfile))
    base.chmod(0o755)
    path = base / "tokenizer_config.json"
    remote = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | remote), "utf-8")
    (tmp_path / "adapter").mkdir()
    copy_tokenizer(load_tokenizer(base), tmp_path / "adapter")
    assert "auto_map" not in json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text("utf-8"))
