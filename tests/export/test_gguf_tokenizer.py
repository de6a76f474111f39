"""llama.cpp gives the token ids that transformers gives, for real tokenizers and difficult texts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.data.tokenizer import load_tokenizer
from finetune.export.gguf import convert
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp

from .conftest import LlamaMaker
from .probes import PROBES

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ROWS = {"gpt-2": 50257, "qwen2": 151936, "llama-bpe": 128257, "phi-3": 32064}


def _edited(source: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A tokenizer's files with some parts of tokenizer.json replaced; `model.x` names a part of its model."""
    folder.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    spec = json.loads((source / "tokenizer.json").read_text())
    for key, value in changes.items():
        part, _, inner = key.partition(".")
        if inner:
            spec[part][inner] = value
        else:
            spec[part] = value
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    # So that transformers takes the file as it is and does not build its own.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "TokenizersBackend"}))
    return folder


def _differences(model: Path, gguf: Path, texts: list[str]) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with LlamaCpp(gguf, context=128, gpu_layers=0, threads=1) as llama:
        return [
            text
            for text in texts
            if llama.tokenize(text, add_special=True) != tokenizer(text)["input_ids"]
            or llama.tokenize(text) != tokenizer(text, add_special_tokens=False)["input_ids"]
        ]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = _sequence(
    _split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    BYTES,
)
DEEPSEEK_CODER = _sequence(
    _split(r"[\r\n]"),
    _split(r"\s?\p{L}+"),
    _split(r"\s?\p{P}+"),
    _split("[一-龥ࠀ-一가-\ud7ff]+"),
    SINGLE_DIGITS,
    BYTES,
)
BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [128000], "tokens": ["<|begin_of_text|>"]}
    },
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-2": ("gpt-2", {}),
    "qwen2": ("qwen2", {}),
    "llama-bpe": ("llama-bpe", {"model.ignore_merges": True, "post_processor": BOS_FIRST}),
    "llama3's cuts with merges": ("gpt-2", {"pre_tokenizer": LLAMA3}),
    "single digits": ("gpt-2", {"pre_tokenizer": _sequence(SINGLE_DIGITS, BYTES | {"use_regex": True})}),
    "deepseek-coder's cuts": ("gpt-2", {"pre_tokenizer": DEEPSEEK_CODER}),
    "phi-3": ("phi-3", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_token_ids_are_the_same(assets: Path, make_llama: LlamaMaker, tmp_path: Path, case: str) -> None:
    name, changes = CASES[case]
    tokenizer = assets / "tokenizers" / name
    if changes:
        tokenizer = _edited(tokenizer, tmp_path / "tokenizer", changes)
    model = make_llama(
        tokenizer=tokenizer, vocab_size=ROWS[name], num_hidden_layers=1, tie_word_embeddings=True, hidden_size=32
    )
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f16")
    differing = _differences(model, tmp_path / "model.gguf", [*PROBES, *_mixtures(tokenizer)])
    # transformers composes text for Qwen (NFC) and llama.cpp does not: the one difference that cannot be helped.
    assert differing == (["e\u0301 combining a\u0308\u0323"] if name == "qwen2" else [])
    assert [note for note in report.notes if "NFC" not in note] == []
    assert len(report.notes) == len(differing)


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("GPT2Tokenizer", _sequence(SINGLE_DIGITS, BYTES | {"use_regex": True})),  # SmolLM
        ("GPT2Tokenizer", LLAMA3),  # Phi-4
        ("LlamaTokenizerFast", LLAMA3),  # DeepSeek-R1-Distill-Llama
    ],
)
def test_token_ids_are_those_of_training_and_of_tokenizer_json(
    assets: Path, make_llama: LlamaMaker, tmp_path: Path, name: str, cuts: dict[str, Any]
) -> None:
    """transformers 5 forgets about the cuts where the class is GPT2Tokenizer; training and tokenizer.json do not."""
    from tokenizers import Tokenizer

    tokenizer = _edited(assets / "tokenizers" / "gpt-2", tmp_path / "tokenizer", {"pre_tokenizer": cuts})
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    model = make_llama(
        tokenizer=tokenizer, vocab_size=ROWS["gpt-2"], num_hidden_layers=1, tie_word_embeddings=True, hidden_size=32
    )
    convert(open_model(model), tmp_path / "model.gguf", quant="f16")
    trained, written = load_tokenizer(model), Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    with LlamaCpp(tmp_path / "model.gguf", context=128, gpu_layers=0, threads=1) as llama:
        for text in [*PROBES, *_mixtures(tokenizer)]:
            ids = trained.encode(text, special=False)
            assert llama.tokenize(text) == ids, text
            assert written.encode(text).ids == ids, text


def test_a_real_models_token_ids_are_the_same(stories: Path, tmp_path: Path) -> None:
    convert(open_model(stories), tmp_path / "model.gguf", quant="f32")
    assert _differences(stories, tmp_path / "model.gguf", [*PROBES, *_mixtures(stories)]) == []


PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}


def test_white_space_after_phi3s_tokens_is_dropped(assets: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    """As in Microsoft's tokenizer.json: `<|user|>` swallows the line end that the template writes after it."""
    source = assets / "tokenizers" / "phi-3"
    added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    strict = [token | {"rstrip": token["content"] not in PHI3_KEEPS} for token in added]
    tokenizer = _edited(source, tmp_path / "tokenizer", {"added_tokens": strict})
    model = make_llama(
        tokenizer=tokenizer, vocab_size=ROWS["phi-3"], num_hidden_layers=1, tie_word_embeddings=True, hidden_size=32
    )
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f16", name="no-matter-what")
    turn = "<|user|>\n\n  hello  <|end|>\n<|assistant|>\nhi<|end|> \n<|endoftext|>\n</s>  x<s>\n y"
    assert _differences(model, tmp_path / "model.gguf", [*PROBES, turn]) == []
    assert report.notes == ()


def test_white_space_that_llamacpp_cannot_drop_is_told(stories: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    added = json.loads((stories / "tokenizer.json").read_text())["added_tokens"]
    tokenizer = _edited(stories, tmp_path / "tokenizer", {"added_tokens": [t | {"rstrip": True} for t in added]})
    report = convert(open_model(make_llama(tokenizer=tokenizer, vocab_size=512)), tmp_path / "model.gguf", quant="f16")
    assert any("white space around <unk>" in note for note in report.notes)


# -- Gemma --------------------------------------------------------------------------------------------------------

GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_RUNS = [character * length for character in "\n▁" for length in range(2, 9)]
GEMMA_TAGS = ["<s>", "</s>", "<b>", "</b>"]
IMAGE = "<image_soft_token>"


def _gemma(stories: Path, template: Path, folder: Path) -> int:
    """A tokenizer of Gemma's kind with the vocabulary of the small model; returns how many rows it needs.

    As in Gemma's: runs of line ends and of spaces, and HTML tags, are added tokens that are not special; the runs are
    also built by merges, before all others; the token for images has the first id beyond the embedding.
    """
    small = json.loads((stories / "tokenizer.json").read_text())["model"]
    pieces = sorted(small["vocab"], key=small["vocab"].__getitem__)[3:]  # without <unk>, <s>, </s>
    texts = dict.fromkeys([*GEMMA_SPECIAL, *GEMMA_RUNS, *GEMMA_TAGS, "\n", *pieces])
    vocab = {text: index for index, text in enumerate(texts)}
    runs = [[run[:cut], run[cut:]] for run in GEMMA_RUNS for cut in range(1, len(run))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": vocab[text], "content": text, "special": True, **flags} for text in GEMMA_SPECIAL]
    added += [{"id": vocab[text], "content": text, "special": False, **flags} for text in GEMMA_RUNS + GEMMA_TAGS]
    added.append({"id": len(vocab), "content": IMAGE, "special": True, **flags})
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": _split(" ") | {"pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": [*runs, *small["merges"]],
        },
    }  # fmt: skip
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"} | names))
    shutil.copyfile(template, folder / "chat_template.jinja")
    return len(vocab)


def test_gemmas_token_ids_are_the_same(assets: Path, stories: Path, make_llama: LlamaMaker, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = _gemma(stories, assets / "chat_templates" / "google-gemma-2-2b-it.jinja", tmp_path / "tokenizer")
    model = make_llama(tokenizer=tmp_path / "tokenizer", vocab_size=rows, architecture="Gemma2", pad_token_id=0)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert report.stop == ("<end_of_turn>", "<eos>")
    assert len(report.notes) == 1
    assert "`</s>`" in report.notes[0]

    runs = [f"a{character * length}b" for character in "\n ▁" for length in range(1, 20)]
    tagged = ["a</s>b", "<s> <b>x</b>\n</s>", "  <b>\n\n  x", "<start_of_turn>user\n  hi <end_of_turn>\n\n"]
    texts = [*PROBES, *_mixtures(tmp_path / "tokenizer"), *runs, *tagged]
    assert _differences(model, tmp_path / "model.gguf", texts) == []

    turns = [
        {"role": "user", "content": "Once upon\n\na  time"},
        {"role": "assistant", "content": "Lily"},
        {"role": "user", "content": "</s>?"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    with LlamaCpp(tmp_path / "model.gguf", context=128, gpu_layers=0, threads=1) as llama:
        assert llama.tokenize(llama.apply_template(turns), add_special=True) == tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        assert len(llama.tokenize(IMAGE)) > 1  # plain text: the model has no row for it


def _mixtures(tokenizer: Path) -> list[str]:
    """Texts of random tokens glued together: they cross the borders that sentences do not."""
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    pieces = sorted(text.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n") for text in spec["model"]["vocab"])
    pieces = [piece for piece in pieces if piece.isascii()]
    choose = random.Random(1).choices
    return ["".join(choose(pieces, k=8)) for _ in range(200)]
