"""Recognising how a byte-level tokenizer cuts text into words before it merges bytes.

llama.cpp has these ways built in, by name (`tokenizer.ggml.pre`); a name that does not match cuts numbers, contractions
or line ends differently and gives the model tokens it has not seen in training. They are recognised here by what
tokenizer.json says, never by the name of a model or by sample outputs.
"""

from __future__ import annotations

import json
import re
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
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}"
_AFTER_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_WORD}*{_LOWER}+|{_WORD}+{_LOWER}*|\p{{N}}{_AFTER_WORDS}"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = rf"{_WORD}*{_LOWER}+{_SHORT}|{_WORD}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}{_AFTER_WORDS}"

Step = tuple[Any, ...]

_FALCON: tuple[Step, ...] = (("punctuation", "Contiguous"), _GPT2, ("digits", False), ("split", "[0-9][0-9][0-9]"))

_KNOWN: dict[tuple[tuple[Step, ...], bool], str] = {
    # (steps, whether a whole word that is in the vocabulary is taken without merging) → llama.cpp's name
    ((_GPT2,), False): "gpt-2",  # GPT-NeoX, Pythia and OLMo too
    ((("split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("split", _LLAMA3), _BYTES), False): "smaug-bpe",  # Phi-4 too
    ((("split", _QWEN2), _BYTES), False): "qwen2",  # Qwen 3 too
    ((("digits", True), _GPT2), False): "smollm",  # StarCoder too
    ((*(("split", regex) for regex in _DEEPSEEK_CODER), ("digits", True), _BYTES), False): "deepseek-coder",
    ((*(("split", regex) for regex in _DEEPSEEK_V3), _BYTES), False): "deepseek-v3",
    (_FALCON, False): "falcon",
}
"""Measured with merges across every border (tests/export/test_gguf_pretokenizer.py): no text differs but for `'ſ`, a
long s after an apostrophe, which `(?i:'s)` takes for a short form and llama.cpp does not. The exceptions are
deepseek-coder and falcon, where llama.cpp leaves out some cuts; see `_NEVER_MERGED`."""

_NEVER_MERGED = {"falcon": re.compile("[0-9²³¹¼½¾]")}
"""Falcon cuts numbers off from what stands beside them, after it has written bytes as characters (six of the bytes
beyond ASCII look like numbers then); llama.cpp does not. No text differs while no merge leads across such a cut."""

_DIFFERENT: dict[tuple[Step, ...], str] = {
    (("split", _TEKKEN), _BYTES): "tekken",
    (("split", _GPT4O), _BYTES): "gpt-4o",
}
"""Ways that llama.cpp has by this name, but with ASCII's letters alone for upper and lower case and without the marks
that are written with a letter: 8 % of texts of the kind that the test uses differ, Hindi among them."""


def recognise(spec: dict[str, Any], place: str) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE, given the content of tokenizer.json.

    Raises ExportError if llama.cpp has none that is known to be the same.
    """
    try:
        steps = _steps(spec["pre_tokenizer"])
    except (KeyError, TypeError):
        steps = ()
    hint = "export in the Hugging Face format, which needs no conversion"
    if steps in _DIFFERENT:
        raise ExportError(
            f"its way of cutting text into words is like llama.cpp's `{_DIFFERENT[steps]}`, but not where letters "
            "carry marks (as in Hindi, or é in two characters) or change case outside ASCII",
            place=place,
            hint=hint,
        )
    name = _KNOWN.get((steps, bool(spec["model"].get("ignore_merges"))))
    if name is None:
        raise ExportError(
            "its way of cutting text into words is not one that llama.cpp is known to share: "
            + json.dumps(spec.get("pre_tokenizer"), ensure_ascii=False),
            place=place,
            hint=hint,
        )
    if (pattern := _NEVER_MERGED.get(name)) and (merged := _first_merged(spec["model"]["merges"], pattern)):
        raise ExportError(
            f"its tokenizer merges numbers with other characters ({merged!r}), which llama.cpp's `{name}` would do in "
            "texts where its tokenizer does not",
            place=place,
            hint=hint,
        )
    return name


def _first_merged(merges: list[Any], pattern: re.Pattern[str]) -> str | None:
    """The first merge that makes a token of which some characters match the pattern and some do not."""
    for merge in merges:
        text = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if 0 < len(pattern.findall(text)) < len(text):
            return text
    return None


def _steps(node: Any) -> tuple[Step, ...]:
    """A pre-tokenizer as a flat list of steps; KeyError for one that is not understood in every detail."""
    kind = node["type"]
    if kind == "Sequence":
        return tuple(step for inner in node["pretokenizers"] for step in _steps(inner))
    if kind == "Split":
        regex = node["pattern"]["Regex"]
        isolated = node["behavior"] == "Isolated" and not node.get("invert")
        # What does not match is thrown away: nothing, for a regex that matches all there can be.
        kept = node["behavior"] == "Removed" and node.get("invert") and regex in (_LLAMA3, _QWEN2, _TEKKEN, _GPT4O)
        if isolated or kept:
            return (("split", regex),)
    if kind == "Punctuation":
        return (("punctuation", node["behavior"]),)
    if kind == "Digits":
        return (("digits", node["individual_digits"]),)
    if kind == "ByteLevel" and not node["add_prefix_space"]:
        return (("bytes", node.get("use_regex", True)),)
    raise KeyError(kind)
