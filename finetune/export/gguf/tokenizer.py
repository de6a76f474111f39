"""The tokenizer of a model folder as GGUF metadata, such that llama.cpp gives the token ids that training saw.

How text becomes ids is asked of `finetune/data/tokenizer.py`, with which the model was trained. transformers' own
tokenizer only says which tokens are special, by what names, and renders the template: for some classes
(`GPT2Tokenizer`) transformers 5 cuts text into other words than tokenizer.json does.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.tokenizer import Tokenizer, load_tokenizer
from finetune.errors import BaseError, ExportError
from finetune.export.gguf import pretokenizer, spaces
from finetune.export.gguf.family import Metadata
from finetune.export.gguf.scores import merge_scores
from finetune.export.gguf.tokens import (
    NORMAL,
    USER_DEFINED,
    closes_struck_out_text,
    fill,
    hide_lookalikes,
    mark_bytes,
    token_type,
)
from finetune.export.gguf.turn import end_of_turn, sample_conversation

_IMAGE = "<image_soft_token>"
"""Gemma 3's text models come with the tokenizer of the others; their embedding has no row for its token for images."""


@dataclass(frozen=True)
class GgufTokenizer:
    """What goes into the file, and what a person or a Modelfile needs to know."""

    metadata: Metadata
    stop: tuple[str, ...]
    """The tokens that end an answer, as text: end of turn first, then end of sequence."""
    notes: tuple[str, ...]
    drops_space: bool
    """White space after special tokens is dropped, as in Phi-3: llama.cpp learns that from the model's name alone."""


def read_tokenizer(folder: Path, rows: int) -> GgufTokenizer:
    """Read a model folder's tokenizer for an embedding of `rows` tokens.

    Raises BaseError if there is no tokenizer to load, ExportError if llama.cpp cannot do what it does.
    """
    place = str(folder)
    trained, named = load_tokenizer(folder), _load(folder)
    _require_whole_characters(trained.chat_template or "", place)
    spec = json.loads(trained.backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise ExportError(f"its tokenizer is a {spec['model']['type']}, which cannot be converted yet", place=place)
    added: dict[int, dict[str, Any]] = {token["id"]: token for token in spec["added_tokens"]}
    texts = {index: text for text, index in spec["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    for index in [index for index, text in texts.items() if index >= rows and text == _IMAGE]:
        del texts[index]
        added.pop(index, None)
    if not texts:
        raise ExportError("its tokenizer has no tokens", place=place)
    if (unknown := spec["model"].get("unk_token")) and unknown not in spec["model"]["vocab"]:
        raise ExportError(f"its tokenizer's token for the unknown, {unknown!r}, is not in its vocabulary", place=place)
    if max(texts) >= rows:
        raise ExportError(
            f"its tokenizer has ids up to {max(texts)}, its embedding has {rows} rows",
            place=place,
            hint="tokens were added to the tokenizer that the model was not trained with",
        )
    tokens = fill(texts, rows)
    special = set(named.all_special_tokens)
    types = [token_type(index, texts, added, special, named.unk_token) for index in range(rows)]
    conversation = sample_conversation(named)
    if _is_byte_level(spec):
        metadata, notes = _byte_level(trained, spec, tokens, types, place)
    else:
        metadata, notes = _sentence_pieces(spec, tokens, types, conversation, place)
    end = end_of_turn(conversation, [token["content"] for token in added.values()]) if conversation else None
    ids = _special_ids(named, {text: index for index, text in texts.items()}, end, place)
    # EOS and BOS are always said: left out, llama.cpp takes ids 11 or 1 and 2.
    said = {"bos": ids["eos"]} | ids
    metadata |= {f"tokenizer.ggml.{name}_token_id": index for name, index in said.items()}
    metadata |= _automatic_tokens(trained, tokens, ids, conversation, place)
    if trained.chat_template:
        metadata["tokenizer.chat_template"] = trained.chat_template
        if not conversation:
            notes.append("the chat template did not render a sample conversation")
    stripping = [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"]]
    drops_space = spaces.like_phi3(spec)
    if stripping and not drops_space:
        notes.append(f"white space around {', '.join(stripping[:3])} is dropped in training, but not by llama.cpp")
    if closes_struck_out_text(tokens, types):
        notes.append("llama.cpp ends an answer at `</s>`, which in training is a word: it closes struck-out text")
    stop = dict.fromkeys(tokens[ids[name]] for name in ("eot", "eos") if name in ids)
    return GgufTokenizer(metadata, tuple(stop), tuple(notes), drops_space)


def _byte_level(
    trained: Tokenizer, spec: dict[str, Any], tokens: list[str], types: list[int], place: str
) -> tuple[Metadata, list[str]]:
    if not spec["model"]["merges"]:
        raise ExportError("its tokenizer has no merges, without which llama.cpp does not load the file", place=place)
    metadata: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pretokenizer.recognise(spec, place),
        "tokenizer.ggml.tokens": hide_lookalikes(tokens, types, trained),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge_text(merge, place) for merge in spec["model"]["merges"]],
    }
    return metadata, _normaliser_notes(spec, place)


def _sentence_pieces(
    spec: dict[str, Any], tokens: list[str], types: list[int], conversation: str | None, place: str
) -> tuple[Metadata, list[str]]:
    types = mark_bytes(tokens, types)
    prefix, notes = spaces.choose_prefix(spec, conversation, place)
    # Spaces are marked after added tokens are looked for, so those of marked spaces only (Gemma's) are built by merges.
    pieces = {
        text: index
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == NORMAL or (kind == USER_DEFINED and spaces.MARK in text)
    }
    scores, inexact = merge_scores(pieces, spec["model"]["merges"])
    if inexact:
        notes.append(f"{inexact} ways of building a token cannot be told to llama.cpp; rare words may differ")
    metadata: Metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [scores.get(token, 0.0) for token in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return metadata, notes


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and the Rust library's own
        raise BaseError(f"its tokenizer cannot be loaded: {error}", place=str(folder)) from error
    return tokenizer


def _is_byte_level(spec: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(spec.get("pre_tokenizer"))


def _merge_text(merge: Any, place: str) -> str:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    if " " in first or " " in second:
        raise ExportError(f"its tokenizer merges {merge!r}, which has a space in it", place=place)
    return f"{first} {second}"


def _normaliser_notes(spec: dict[str, Any], place: str) -> list[str]:
    normaliser = spec.get("normalizer")
    steps = [normaliser] if normaliser else []
    if normaliser and normaliser.get("type") == "Sequence":  # DeepSeek's is one of no steps
        steps = normaliser["normalizers"]
    kinds = {step.get("type") for step in steps}
    if not kinds:
        return []
    if kinds == {"NFC"}:
        return ["text that is not in Unicode's composed form (NFC) is composed in training, but not by llama.cpp"]
    raise ExportError(f"its tokenizer changes text first ({json.dumps(normaliser)}), llama.cpp does not", place=place)


def _special_ids(named: Any, ids: dict[str, int], end_of_turn: str | None, place: str) -> dict[str, int]:
    """llama.cpp's name of each special token → its id, EOS at least; `ids` are the tokens that the model has."""
    eos = named.eos_token or end_of_turn
    texts = {
        "bos": named.bos_token,
        "eos": eos,
        "eot": end_of_turn,
        "unknown": named.unk_token,
        "padding": named.pad_token,
    }
    if eos not in ids:
        stated = f" (`eos_token` is {eos!r}, which is none of its tokens)" if eos else ""
        raise ExportError(
            f"its tokenizer has no token that ends a text{stated}", place=place, hint="set its `eos_token`"
        )
    return {name: ids[text] for name, text in texts.items() if text in ids}


def _automatic_tokens(
    trained: Tokenizer, tokens: list[str], ids: dict[str, int], conversation: str | None, place: str
) -> Metadata:
    """Which tokens llama.cpp shall put around every text.

    With a chat template: BOS if a conversation begins with it (llama.cpp does not put it there twice), and never EOS.
    Training sees the rendered template and nothing around it, whatever the tokenizer does with other texts.
    Without one: what the tokenizer does, found out by asking it.
    """
    bare, dressed = (trained.encode("a", special=flag) for flag in (False, True))
    start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), None)
    before, after = (None, None) if start is None else (dressed[:start], dressed[start + len(bare) :])
    if before not in ([], [ids.get("bos")]) or after not in ([], [ids["eos"]]):
        raise ExportError("its tokenizer puts other tokens than BOS and EOS around a text", place=place)
    add_bos, add_eos = bool(before), bool(after)
    if conversation:
        add_bos, add_eos = "bos" in ids and conversation.startswith(tokens[ids["bos"]]), False
    return {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}


def _require_whole_characters(template: str, place: str) -> None:
    """JSON can hold half of a pair of surrogates, which no encoding of text can."""
    try:
        template.encode("utf-8")
    except UnicodeEncodeError as error:
        half = template[error.start : error.end]
        raise ExportError(
            f"its chat template has half a character in it ({half!r})", place=place, hint="take it out of the template"
        ) from error
