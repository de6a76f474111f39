"""Where a SentencePiece-style tokenizer puts a space that is not in the text, and what llama.cpp makes of that.

llama.cpp knows one switch: a space before every piece of text that starts the input or follows a special token, or
none at all. tokenizer.json knows more ways (only before the first piece; only if there is none yet), so the switch is
set to what gives the training's tokens for a conversation.
"""

from __future__ import annotations

import json
import re
from typing import Any

from finetune.errors import ExportError

MARK = "▁"
"""What stands for a space in such a tokenizer's vocabulary."""


def choose_prefix(spec: dict[str, Any], conversation: str | None, place: str) -> tuple[bool, list[str]]:
    """The value of `tokenizer.ggml.add_space_prefix`, and a note if neither value gives the training's tokens.

    spec is the content of tokenizer.json, `conversation` a sample in the chat template (None without one).
    Raises ExportError for tokenizers that do more to a text than to mark its spaces.
    """
    _require_only_spaces(spec, place)
    # Without a template the model continues plain text; with one it never sees a text that does not begin as it does.
    sample = conversation or "Once upon a time"
    reference, plain = _build(spec, {}), _build(spec, {"pre_tokenizer": None, "normalizer": _MARK_SPACES})
    wanted = reference.encode(sample, add_special_tokens=False).ids
    for prefix in (True, False):
        if _like_llamacpp(plain, spec, sample, prefix=prefix) == wanted:
            return prefix, []
    shares = {
        prefix: _agreement(_like_llamacpp(plain, spec, sample, prefix=prefix), wanted) for prefix in (True, False)
    }
    prefix = shares[True] > shares[False]
    return prefix, ["llama.cpp puts spaces at the start of a text or after a special token where training did not"]


_MARK_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}


def _build(spec: dict[str, Any], changes: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(spec | {"post_processor": None} | changes))


def _like_llamacpp(plain: Any, spec: dict[str, Any], text: str, *, prefix: bool) -> list[int]:
    """The ids llama.cpp gives: special tokens are cut out, the pieces between them get their space and are merged."""
    ids = {token["content"]: token["id"] for token in spec["added_tokens"] if token["content"]}
    cuts = "|".join(re.escape(token) for token in sorted(ids, key=len, reverse=True))
    stripping = _stripping(spec) if like_phi3(spec) else frozenset()
    found: list[int] = []
    before = None
    for cut in re.split(f"({cuts})", text) if cuts else [text]:
        piece = cut.lstrip() if before in stripping else cut
        before = cut or before
        if piece in ids:
            found.append(ids[piece])
        elif piece:
            found += plain.encode((" " if prefix else "") + piece, add_special_tokens=False).ids
    return found


_PHI3_KEEPS, _PHI3_STRIPS = frozenset({"<unk>", "<s>", "<|endoftext|>"}), "</s>"


def like_phi3(spec: dict[str, Any]) -> bool:
    """Whether white space after added tokens is dropped as llama.cpp drops it in models whose name says Phi-3: after
    all of them except three (`llama_vocab::impl::load`). It is the only way to make it do so."""
    texts = {token["content"] for token in spec["added_tokens"]}
    before = any(token["lstrip"] for token in spec["added_tokens"])
    # llama.cpp does not load a file with that name that lacks one of the four.
    complete = {*_PHI3_KEEPS, _PHI3_STRIPS} <= texts
    return complete and not before and _stripping(spec) == texts - _PHI3_KEEPS


def _stripping(spec: dict[str, Any]) -> frozenset[str]:
    return frozenset(token["content"] for token in spec["added_tokens"] if token["rstrip"])


def _agreement(ours: list[int], wanted: list[int]) -> float:
    from difflib import SequenceMatcher

    return SequenceMatcher(None, ours, wanted, autojunk=False).ratio()


def _require_only_spaces(spec: dict[str, Any], place: str) -> None:
    normaliser, splitter = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = normaliser["normalizers"] if normaliser and normaliser["type"] == "Sequence" else [normaliser]
    for step in steps:
        known = step is None or step == _MARK_SPACES or step == {"type": "Prepend", "prepend": MARK}
        if not known:
            raise ExportError(f"its tokenizer changes text first ({json.dumps(step)}), llama.cpp does not", place=place)
    whole = (
        splitter is None
        or (splitter["type"] == "Metaspace" and splitter["replacement"] == MARK and not splitter.get("split", True))
        # Gemma's says that it cuts at spaces, of which none is left at that point.
        or (splitter["type"] == "Split" and splitter["pattern"] == {"String": " "} and _MARK_SPACES in steps)
    )
    if not whole or not spec["model"].get("byte_fallback"):
        raise ExportError("its tokenizer is neither byte-level nor of SentencePiece's kind", place=place)
