"""The tokenizer of a model folder as GGUF metadata, such that llama.cpp gives the token ids that training saw.

The reference is what transformers makes of the folder, not what the folder says: transformers 5 rebuilds some
tokenizers (`LlamaTokenizer`) with rules of its own, and the model was trained with those.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    tokenizer = _load(folder)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    place = str(folder)
    if spec["model"]["type"] != "BPE":
        raise ExportError(f"its tokenizer is a {spec['model']['type']}, which cannot be converted yet", place=place)
    added: dict[int, dict[str, Any]] = {token["id"]: token for token in spec["added_tokens"]}
    texts = {index: text for text, index in spec["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    for index in [index for index, text in texts.items() if index >= rows and text == _IMAGE]:
        del texts[index]
        added.pop(index, None)
    if max(texts) >= rows:
        raise ExportError(
            f"its tokenizer has ids up to {max(texts)}, its embedding has {rows} rows",
            place=place,
            hint="tokens were added to the tokenizer that the model was not trained with",
        )
    tokens = fill(texts, rows)
    special = set(tokenizer.all_special_tokens)
    types = [token_type(index, texts, added, special, tokenizer.unk_token) for index in range(rows)]
    conversation = sample_conversation(tokenizer)
    if _is_byte_level(spec):
        metadata, notes = _byte_level(tokenizer, spec, tokens, types, place)
    else:
        metadata, notes = _sentence_pieces(spec, tokens, types, conversation, place)
    end = end_of_turn(conversation, [token["content"] for token in added.values()]) if conversation else None
    end_id = None if end is None else int(tokenizer.convert_tokens_to_ids(end))
    metadata |= _special_ids(tokenizer, end_id, place) | _automatic_tokens(tokenizer, conversation, place)
    if template := _template(tokenizer):
        metadata["tokenizer.chat_template"] = template
        if not conversation:
            notes.append("the chat template did not render a sample conversation")
    stripping = [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"]]
    drops_space = spaces.like_phi3(spec)
    if stripping and not drops_space:
        notes.append(f"white space around {', '.join(stripping[:3])} is dropped in training, but not by llama.cpp")
    if closes_struck_out_text(tokens, types):
        notes.append("llama.cpp ends an answer at `</s>`, which in training is a word: it closes struck-out text")
    stop = dict.fromkeys(token for token in (end, tokenizer.eos_token) if token)
    return GgufTokenizer(metadata, tuple(stop), tuple(notes), drops_space)


def _byte_level(
    tokenizer: Any, spec: dict[str, Any], tokens: list[str], types: list[int], place: str
) -> tuple[Metadata, list[str]]:
    metadata: Metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pretokenizer.recognise(spec, place),
        "tokenizer.ggml.tokens": hide_lookalikes(tokens, types, tokenizer),
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
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ExportError("its tokenizer has no tokenizer.json", place=str(folder))
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


def _special_ids(tokenizer: Any, end_of_turn_id: int | None, place: str) -> Metadata:
    """The ids of the special tokens. EOS and BOS are always said: left out, llama.cpp takes ids 11 or 1 and 2."""
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else end_of_turn_id
    if eos is None:
        raise ExportError("its tokenizer has no token that ends a text", place=place, hint="set its `eos_token`")
    ids = {
        "bos": eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos": eos,
        "eot": end_of_turn_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {f"tokenizer.ggml.{name}_token_id": int(i) for name, i in ids.items() if i is not None}


def _automatic_tokens(tokenizer: Any, conversation: str | None, place: str) -> Metadata:
    """Which tokens llama.cpp shall put around every text.

    With a chat template: BOS if a conversation begins with it (llama.cpp does not put it there twice), and never EOS.
    Training sees the rendered template and nothing around it, whatever the tokenizer does with other texts.
    Without one: what the tokenizer does, found out by asking it.
    """
    bare, dressed = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    start = next((i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare), None)
    before, after = (None, None) if start is None else (dressed[:start], dressed[start + len(bare) :])
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise ExportError("its tokenizer puts other tokens than BOS and EOS around a text", place=place)
    if conversation:
        before, after = tokenizer.bos_token and conversation.startswith(tokenizer.bos_token), None
    return {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}


def _template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
