"""transformers' tokenizer classes overrule tokenizer.json; the ids trained on must be the ids that users get."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.data.tokenizer import load_tokenizer

TEXTS = (
    "Hello you",
    "<s>Hello you</s><s>What now</s>",
    "<s>### User:\nA question ?\n\n### Assistant:\nAn answer</s>\n\n",
    "  two spaces  and\n\n a line",
    "</s> after",
    "e\u0301 café 日本 🙂",
)


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"]
)
@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
def test_ids_are_those_of_the_class_that_the_base_names(
    assets: Path, tmp_path: Path, name: str, settings: dict[str, bool]
) -> None:
    from transformers import AutoTokenizer

    for file in ("tokenizer.json", "config.json"):
        shutil.copyfile(assets / "models" / "stories260K" / file, tmp_path / file)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, **special, **settings}), "utf-8"
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        for added in (False, True):
            assert ours.encode(text, special=added) == theirs.encode(text, add_special_tokens=added), (text, added)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "phi3", None])
@pytest.mark.parametrize("legacy", [True, False])
def test_some_model_types_overrule_the_class(assets: Path, tmp_path: Path, kind: str | None, legacy: bool) -> None:
    """Phi-3 and Mistral say LlamaTokenizer too, but transformers takes their tokenizer.json as it is."""
    shutil.copyfile(assets / "models" / "stories260K" / "tokenizer.json", tmp_path / "tokenizer.json")
    _write(tmp_path, kind, {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "unk_token": "<unk>"})
    _same_ids(tmp_path)


# -- byte-level tokenizers ----------------------------------------------------------------------------------------

QWEN_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _byte_level(folder: Path, *, digits: bool = False) -> None:
    """A tokenizer of bytes that merges digits, spaces with letters, and letters with what marks them, wherever its way
    of cutting text (Qwen's, or GPT-2's with single digits) lets these meet."""
    import tokenizers
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("12", "3"), ("Ġ", "1"), ("Ġ", "y"), ("Ġ", "Ġ"), ("l", "l"), ("Ì", "ģ"), ("e", "Ìģ")]
    pieces = ["<s>", "</s>", *alphabet, *(first + second for first, second in merges)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    cuts = pre_tokenizers.Split(tokenizers.Regex(QWEN_CUTS), "isolated")
    steps = [pre_tokenizers.Digits(individual_digits=True) if digits else cuts]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen2_moe", "mistral", "phi3", None])
def test_bytes_stay_bytes(tmp_path: Path, name: str | None, kind: str | None) -> None:
    """DeepSeek's R1 distills name LlamaTokenizerFast over the byte-level tokenizers of Qwen and Llama 3."""
    _byte_level(tmp_path)
    _write(tmp_path, kind, {"tokenizer_class": name} if name else {})
    _same_ids(tmp_path)
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("you 12 3", special=False)) == "you 12 3"


def test_neox_composes_characters(tmp_path: Path) -> None:
    import tokenizers

    _byte_level(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    for name in ("GPTNeoXTokenizerFast", None):
        _write(tmp_path, "gpt_neox", {"tokenizer_class": name} if name else {})
        _same_ids(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "phi3", None])
def test_a_class_that_forgets_how_words_are_cut_is_not_followed(tmp_path: Path, kind: str | None) -> None:
    """SmolLM says GPT2Tokenizer, as which transformers 5 cuts "12" as one word; its tokenizer.json cuts it into two."""
    import tokenizers

    _byte_level(tmp_path, digits=True)
    _write(tmp_path, kind, {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"})
    ours = load_tokenizer(tmp_path)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*TEXTS, "in 123 of 12"):
        assert ours.encode(text, special=False) == written.encode(text).ids
    assert len(ours.encode("123", special=False)) == 3


def _write(folder: Path, kind: str | None, settings: dict[str, object]) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings), "utf-8")
    if kind:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}), "utf-8")


def _same_ids(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in (*TEXTS, "it cost 1234 12 in 2024, isn't  it"):
        assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False), text
