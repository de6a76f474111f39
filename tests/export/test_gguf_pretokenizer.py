"""Ways of cutting text into words: llama.cpp gives the token ids that the tokenizer gives, or the way is refused.

Real vocabularies are trained with the cuts and hide most differences, since no token leads across a border. Here they
are trained without any, so that merges lead across every border and each cut that is missing or added shows.
"""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from finetune.errors import ExportError
from finetune.export.gguf import convert
from finetune.export.gguf.pretokenizer import recognise
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp

from .conftest import LlamaMaker
from .probes import PROBES

TRICKY = [
    "12", "123", "1234 56789", " 12 123 1234", "  3 4", "x²y³", "½¼ 12½3456 ½6789", "١٢٣٤ 一二三", "Ⅷⅸ", "𝟏𝟐𝟑",
    "ὼ ὠδή τοῦ Ὀδυσσέως", "नमस्ते दुनिया की", "дЕлО ПРИВЕТмир м", "ÀÉlan ÉÀ École", "iPhone HTTPServer aB",
    "a'S b'Ll C'RE d'x", "x\r\ny\r\n\r\n z", "\t\t\n  x", "  \n\n  a", "!!\n\n??\r\n/ //\n", "end. \n", "#tag @user",
    "中文。English，混合", "ひらがなカタカナ漢字", "ｆｕｌｌ　ｗｉｄｔｈ！", "a\u3000b", "()[]{}<>$+=^~|`", "_a_b__c",
    "\"quoted\" 'single'", "…—–", "한국어와 조선말", "☃️❤️", "\u0000\u0001", "\u0085next", "x\u000by", "a\u2028b",
    "'ſt 'ſ",
]  # fmt: skip


def _glued(count: int, seed: int) -> list[str]:
    """Texts of random pieces of the others."""
    draw, pool = random.Random(seed), [*PROBES, *TRICKY]
    return ["".join(_piece(draw, pool) for _ in range(draw.randint(2, 6))) for _ in range(count)]


def _piece(draw: random.Random, pool: list[str]) -> str:
    text = draw.choice(pool)
    start = draw.randrange(len(text))
    return text[start : start + draw.randint(1, 8)]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
ALL_DIGITS = {"type": "Digits", "individual_digits": False}
PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}


def _split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")
FALCON = _sequence(PUNCTUATION, GPT2, ALL_DIGITS, _split("[0-9][0-9][0-9]"))
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "gpt-2, pythia, olmo": (GPT2, "gpt-2"),
    "llama 3": (_sequence(_split(LLAMA3), BYTES), "llama-bpe"),
    "phi-4": (_sequence(_split(LLAMA3, "Removed", True), BYTES), "smaug-bpe"),
    "qwen 2 and 3": (_sequence(_split(LLAMA3.replace("{1,3}", "")), BYTES), "qwen2"),
    "smollm and starcoder": (_sequence(SINGLE_DIGITS, GPT2), "smollm"),
    "deepseek v3": (_sequence(*map(_split, DEEPSEEK_V3), BYTES), "deepseek-v3"),
    "deepseek coder": (_sequence(*map(_split, DEEPSEEK_CODER), SINGLE_DIGITS, BYTES), "deepseek-coder"),
    "falcon": (FALCON, "falcon"),
}
TRAINED_WITH_CUTS = ("deepseek-coder", "falcon")
"""llama.cpp leaves out cuts of theirs that no merge of a vocabulary trained with them leads across."""


def _trained(pre_tokenizer: dict[str, Any], *, cut: bool) -> dict[str, Any]:
    """A small BPE that merges within the pre-tokenizer's words, or across them."""
    tokenizer = Tokenizer(models.BPE())
    spec = json.loads(tokenizer.to_str()) | {"pre_tokenizer": pre_tokenizer if cut else BYTES}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PROBES, *TRICKY, *_glued(1500, seed=0)] * 2, trainer)
    trained: dict[str, Any] = json.loads(tokenizer.to_str())
    return trained | {"pre_tokenizer": pre_tokenizer}


def _save(spec: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _differing(spec: dict[str, Any], make_llama: LlamaMaker, tmp_path: Path) -> tuple[list[str], list[str]]:
    """The texts on which llama.cpp gives other ids, and the notes of the export."""
    rows = len(spec["model"]["vocab"]) + len(spec["added_tokens"])
    model = make_llama(
        tokenizer=_save(spec, tmp_path / "tokenizer"), vocab_size=rows, num_hidden_layers=1, tie_word_embeddings=True
    )
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f16")
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    with LlamaCpp(tmp_path / "model.gguf", context=128, gpu_layers=0, threads=1) as llama:
        differing = [
            text
            for text in [*PROBES, *TRICKY, *_glued(600, seed=1)]
            if llama.tokenize(text) != tokenizer.encode(text, add_special_tokens=False).ids
        ]
    return differing, list(report.notes)


@pytest.mark.parametrize("case", CASES)
def test_token_ids_are_the_same(make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    pre_tokenizer, name = CASES[case]
    spec = _trained(pre_tokenizer, cut=name in TRAINED_WITH_CUTS)
    spec["model"]["ignore_merges"] = name == "llama-bpe"
    if name == "deepseek-v3":  # its normaliser is a sequence of no steps
        spec["normalizer"] = {"type": "Sequence", "normalizers": []}
    assert recognise(spec, "here") == name
    differing, notes = _differing(spec, make_llama, tmp_path)
    assert [text for text in differing if "'ſ" not in text] == []
    assert notes == []


def test_pythias_runs_of_spaces_and_its_normal_form(make_llama: LlamaMaker, tmp_path: Path) -> None:
    """Tokens for 2 to 8 spaces are added to the vocabulary; text is composed (NFC) first, which llama.cpp does not."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    spec = _trained(GPT2, cut=True) | {"normalizer": {"type": "NFC"}}
    first = len(spec["model"]["vocab"])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    spec["added_tokens"] += [plain | {"id": first + i, "content": " " * (8 - i)} for i in range(7)]
    differing, notes = _differing(spec, make_llama, tmp_path)
    assert [text for text in differing if unicodedata.normalize("NFC", text) == text] == []
    assert len(notes) == 1
    assert "NFC" in notes[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mistral nemo": (_sequence(_split(TEKKEN), BYTES), "`tekken`"),
    "gpt-4o": (_sequence(_split(GPT4O, "Removed", True), BYTES), "`gpt-4o`"),
    "what matches is thrown away": (_sequence(_split(LLAMA3, "Removed"), BYTES), "way of cutting"),
    "what does not match is thrown away": (_sequence(_split(r"\p{L}+", "Removed", True), BYTES), "way of cutting"),
    "signs one by one": (
        _sequence({"type": "Punctuation", "behavior": "Isolated"}, GPT2, ALL_DIGITS, _split("[0-9][0-9][0-9]")),
        "way of cutting",
    ),
    "whole numbers": (_sequence(ALL_DIGITS, GPT2), "way of cutting"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_ways_are_refused(case: str) -> None:
    pre_tokenizer, words = REFUSED[case]
    with pytest.raises(ExportError, match=words):
        recognise({"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": False, "merges": []}}, "here")


@pytest.mark.parametrize("merge", ["Ġ 1", ["Ð", "¼"], "12 a"])
def test_falcon_with_merges_across_numbers_is_refused(merge: Any) -> None:
    """llama.cpp would make one token of " 1", where Falcon's own tokenizer cuts before the number."""
    spec = {"pre_tokenizer": FALCON, "model": {"merges": [["1", "2"], "a b", merge]}}
    with pytest.raises(ExportError, match="merges numbers with other characters"):
        recognise(spec, "here")
