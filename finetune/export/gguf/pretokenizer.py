"""Recognising how a byte-level tokenizer cuts text into words before it merges bytes.

llama.cpp has these ways built in, by name (`tokenizer.ggml.pre`); a name that does not match cuts numbers, contractions
or line ends differently and gives the model tokens it has not seen in training. They are recognised here by what
tokenizer.json says, never by the name of a model or by sample outputs.
"""

from __future__ import annotations

import json
from typing import Any

from finetune.errors import ExportError

_GPT2 = ("bytes", True)
_BYTES = ("bytes", False)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")

Step = tuple[Any, ...]

_KNOWN: dict[tuple[tuple[Step, ...], bool], str] = {
    # (steps, whether a whole word that is in the vocabulary is taken without merging) → llama.cpp's name
    ((_GPT2,), False): "gpt-2",
    ((("split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("split", _LLAMA3), _BYTES), False): "smaug-bpe",
    ((("split", _QWEN2), _BYTES), False): "qwen2",
    ((("digits", True), _GPT2), False): "smollm",
    ((*(("split", regex) for regex in _DEEPSEEK_CODER), ("digits", True), _BYTES), False): "deepseek-coder",
}


def recognise(spec: dict[str, Any], place: str) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE, given the content of tokenizer.json.

    Raises ExportError if llama.cpp has none that is known to be the same.
    """
    try:
        steps = _steps(spec["pre_tokenizer"])
    except (KeyError, TypeError):
        steps = ()
    name = _KNOWN.get((steps, bool(spec["model"].get("ignore_merges"))))
    if name is None:
        raise ExportError(
            "its way of cutting text into words is not one that llama.cpp is known to share: "
            + json.dumps(spec.get("pre_tokenizer"), ensure_ascii=False),
            place=place,
            hint="export in the Hugging Face format, which needs no conversion",
        )
    return name


def _steps(node: Any) -> tuple[Step, ...]:
    """A pre-tokenizer as a flat list of steps; KeyError for one that is not understood in every detail."""
    kind = node["type"]
    if kind == "Sequence":
        return tuple(step for inner in node["pretokenizers"] for step in _steps(inner))
    if kind == "Split" and node["behavior"] == "Isolated" and not node.get("invert"):
        return (("split", node["pattern"]["Regex"]),)
    if kind == "Digits":
        return (("digits", node["individual_digits"]),)
    if kind == "ByteLevel" and not node["add_prefix_space"]:
        return (("bytes", node.get("use_regex", True)),)
    raise KeyError(kind)
