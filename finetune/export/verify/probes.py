"""What a proof is made on: texts on which tokenizers tend to disagree, and sequences of the run's own rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finetune.data.conversation import Message
from finetune.data.jinja import TemplateRefusal
from finetune.data.store import TokenRow
from finetune.data.template import ChatTemplate
from finetune.data.tokenizer import Tokenizer
from finetune.export.verify.texts import TEXTS

SCORED_TEXTS = 16
"""How many of the texts the models are also compared on; the rest is for the tokenizers alone."""

LONGEST = 256
"""Tokens of a row that are compared."""


@dataclass(frozen=True)
class Sequence_:
    """Token ids that models are compared on."""

    ids: tuple[int, ...]
    scored: npt.NDArray[np.bool_]
    """True where a token counts for the perplexity."""

    @property
    def prompt(self) -> tuple[int, ...] | None:
        """What stands before the first scored token, or None if that is nothing."""
        places = np.flatnonzero(self.scored)
        return self.ids[: int(places[0])] if len(places) and places[0] else None


def probe_texts(template: ChatTemplate | None) -> list[str]:
    """The texts, and conversations as the template renders them."""
    return [*TEXTS, *(text for text in (conversation(template, turns) for turns in (1, 2)) if text)]


def conversation(template: ChatTemplate | None, turns: int, *, ask: bool = False) -> str | None:
    """A short conversation in the template; with `ask`, one more question and what an answer begins with. None if there
    is no template, or it refuses."""
    if template is None:
        return None
    try:
        return template.render(conversation_messages(turns, ask=ask), add_generation_prompt=ask)
    except TemplateRefusal:
        return None


def conversation_messages(turns: int, *, ask: bool) -> list[Message]:
    said = [
        message
        for turn in range(turns)
        for message in (
            Message("user", f"What is {turn + 2} times 2?"),
            Message("assistant", f"It is {2 * turn + 4}."),
        )
    ]
    return [*said, Message("user", "And what is the capital of France?")] if ask else said


def text_sequences(tokenizer: Tokenizer, vocabulary: int) -> list[Sequence_]:
    """Every fourth text or so, tokenised, as far as the model has the ids."""
    chosen = TEXTS[:: len(TEXTS) // SCORED_TEXTS][:SCORED_TEXTS]
    found = [tuple(tokenizer.encode(text, special=True)) for text in chosen]
    return [
        Sequence_(ids, np.zeros(len(ids), dtype=np.bool_)) for ids in found if len(ids) > 1 and max(ids) < vocabulary
    ]


def row_sequences(rows: Iterable[TokenRow], tokens: int) -> list[Sequence_]:
    """Rows, cut to LONGEST, until there are so many tokens; rows of which nothing scored is left are passed over."""
    found: list[Sequence_] = []
    for row in rows:
        ids, scored = row.ids[:LONGEST], row.supervised[:LONGEST]
        if len(ids) < 2 or not scored[1:].any():
            continue
        found.append(Sequence_(tuple(int(token) for token in ids), np.asarray(scored, dtype=np.bool_)))
        tokens -= len(ids)
        if tokens <= 0:
            break
    return found


def row_tokens(parameters: int) -> int:
    """How many tokens of rows are compared: as many as about 15 TFLOP pay for (two per parameter and token), between
    512 and 2048. A laptop of 200 GFLOP/s then needs some minutes for an 8B model."""
    return int(min(2048, max(512, 1.5e13 / (2 * max(parameters, 1)))))
