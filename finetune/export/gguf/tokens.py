"""One text and one type for every row of the embedding, as llama.cpp wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.data.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type`, from the enum `llama_token_type` of llama.h."""

_READ_AS_SPECIAL = frozenset(
    {
        "</s>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>",
        "<|flush|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "<eos>", "<turn|>",
        "<|tool_response>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[",
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "<|code_prefix|>", "<|prefix|>",
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "<|code_suffix|>", "<|suffix|>",
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "<|code_middle|>", "<|middle|>",
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
        "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
        "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>",
    }
)  # fmt: skip
"""llama.cpp takes tokens with these texts for special ones, whatever type the file gives them (`llama-vocab.cpp`)."""


def fill(texts: dict[int, str], rows: int) -> list[str]:
    """A text for every row. Rows beyond the vocabulary get made-up ones: llama.cpp wants each text once."""
    used = set(texts.values())
    tokens = []
    for index in range(rows):
        text = texts.get(index)
        if text is None:
            text = f"[PAD{index}]"
            while text in used:
                text += "_"
            used.add(text)
        tokens.append(text)
    return tokens


def token_type(
    index: int, texts: dict[int, str], added: dict[int, dict[str, Any]], special: set[str], unknown: str | None
) -> int:
    """The type of one row; `added` are the added tokens of tokenizer.json, `special` the named special ones."""
    if index not in texts:
        return UNUSED
    if texts[index] == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index]["special"] or texts[index] in special else USER_DEFINED
    return NORMAL


def mark_bytes(tokens: list[str], types: list[int]) -> list[int]:
    """The types, with `<0x00>` … `<0xFF>` as bytes: what a character outside the vocabulary falls apart into."""
    names = {f"<0x{byte:02X}>" for byte in range(256)}
    return [BYTE if kind == NORMAL and token in names else kind for token, kind in zip(tokens, types, strict=True)]


def hide_lookalikes(tokens: list[str], types: list[int], trained: Tokenizer) -> list[str]:
    """Give ordinary tokens that llama.cpp would take for special ones another text, where no text leads to them.

    Qwen's vocabulary has `</s>` from merges that its own way of cutting words never makes; llama.cpp would read it in a
    text that speaks of HTML, and stop when the model writes it.
    """
    hidden = list(tokens)
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == NORMAL and token in _READ_AS_SPECIAL:
            reached = trained.encode(token, special=False) == [index]
            hidden[index] = token if reached else f"[UNREACHED{index}]"
    return hidden


def closes_struck_out_text(tokens: list[str], types: list[int]) -> bool:
    """Whether `</s>` is an HTML tag of the vocabulary, as in Gemma's. llama.cpp reads it as the end of an answer."""
    kinds = dict(zip(tokens, types, strict=True))
    return kinds.get("<s>") == kinds.get("</s>") == USER_DEFINED
