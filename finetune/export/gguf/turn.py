"""What a chat template writes after an assistant's answer: the token that ends a turn."""

from __future__ import annotations

from typing import Any

from finetune.data.limits import bounded
from finetune.errors import BaseError

_QUESTION, _ANSWER = "Qxq", "Axa"
"""Words that no template contains."""


def sample_conversation(tokenizer: Any) -> str | None:
    """Two exchanges in the tokenizer's own template, or None if it has none or cannot render them.

    Raises BaseError for a template that goes beyond the bounds of `data/limits.py`.
    """
    turns = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
    ]
    if not tokenizer.chat_template:
        return None
    try:
        text = bounded(
            str(tokenizer.name_or_path),
            lambda: str(tokenizer.apply_chat_template(turns + turns, tokenize=False, add_generation_prompt=False)),
        )
        text.encode("utf-8")  # half a character, which a template can write, is no text
    except BaseError:
        raise  # one that loops for ever is not written into a file that others run
    except Exception:  # a template is a program: it may raise whatever it likes
        return None
    return text


def end_of_turn(conversation: str, added_tokens: list[str]) -> str | None:
    """The first added token after the last answer, which is what the model was trained to stop with.

    None if the template puts plain text there, or nothing.
    """
    tail = conversation[conversation.rindex(_ANSWER) + len(_ANSWER) :] if _ANSWER in conversation else ""
    found = [(tail.index(token), -len(token), token) for token in added_tokens if token and token in tail]
    return min(found)[2] if found else None
