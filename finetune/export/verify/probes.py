"""What a proof is made on: texts, conversations, sequences of the run's own rows, and one long sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

ADDED_TOKENS = 100
"""How many of the tokens that were added to the vocabulary are tried: all but Llama 3's 250 reserved ones, mostly."""

LONG, LONG_LARGE = 2048, 1024
"""Tokens of the one long sequence, for a model of up to LARGE parameters and for a larger one. Errors of rotary scaling
and of attention windows only show far from the beginning."""

LARGE = 2_000_000_000

FAR = 128
"""How many positions at its end are compared."""


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


def probe_texts(template: ChatTemplate | None, tokenizer: Tokenizer) -> list[str]:
    """The texts, conversations as the template renders them, and every added token between two words."""
    rendered = [render(template, messages, ask=False) for messages in CONVERSATIONS] if template else []
    added = sorted(tokenizer.backend.get_added_tokens_decoder().items())
    return [
        *TEXTS,
        *(text for text in rendered if text),
        *(f"before{token.content}after" for _, token in added[:ADDED_TOKENS]),
    ]


def _said(turns: int) -> tuple[Message, ...]:
    return tuple(
        message
        for turn in range(turns)
        for message in (Message("user", f"What is {turn + 2} times 2?"), Message("assistant", f"It is {2 * turn + 4}."))
    )


_QUESTION = Message("user", "And what is the capital of France?")

CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (_QUESTION,),
    (*_said(1), _QUESTION),
    (Message("system", "Answer in one word."), _QUESTION),
    (Message("system", "Answer in one word."), *_said(3), _QUESTION),
)
"""Each ends with a question: prompts are compared. One branch of a template may be wrong where another is right."""


def render(template: ChatTemplate, messages: Sequence[Message], *, ask: bool = True) -> str | None:
    """A conversation in the template; with `ask`, with what an answer begins with. None if the template refuses it."""
    try:
        return template.render(list(messages), add_generation_prompt=ask)
    except TemplateRefusal:
        return None


def text_sequences(tokenizer: Tokenizer, vocabulary: int, context: int) -> list[Sequence_]:
    """Every fourth text or so, tokenised, as far as the model has the ids and the room."""
    chosen = TEXTS[:: len(TEXTS) // SCORED_TEXTS][:SCORED_TEXTS]
    found = [tuple(tokenizer.encode(text, special=True))[:context] for text in chosen]
    return [Sequence_(ids, _none(len(ids))) for ids in found if len(ids) > 1 and max(ids) < vocabulary]


def row_sequences(rows: Iterable[TokenRow], tokens: int, context: int) -> list[Sequence_]:
    """Rows, until there are so many tokens: of a long one, LONGEST tokens around where its answer begins."""
    longest = min(LONGEST, context)
    found: list[Sequence_] = []
    for row in rows:
        places = np.flatnonzero(row.supervised[1:]) + 1
        if not len(places):
            continue
        begin = max(0, min(int(places[0]) - longest // 2, len(row.ids) - longest))
        ids, scored = row.ids[begin : begin + longest], row.supervised[begin : begin + longest]
        found.append(Sequence_(tuple(int(token) for token in ids), np.asarray(scored, dtype=np.bool_)))
        tokens -= len(ids)
        if tokens <= 0:
            break
    return found


def long_sequence(sequences: Sequence[Sequence_], parameters: int, context: int) -> Sequence_ | None:
    """The others one after the other, again and again, up to the model's context; None if they are as long."""
    length = min(context, LONG if parameters <= LARGE else LONG_LARGE)
    ids = [token for sequence in sequences for token in sequence.ids]
    if length <= LONGEST or not ids:
        return None
    repeated = (ids * (length // len(ids) + 1))[:length]
    return Sequence_(tuple(repeated), _none(length))


def row_tokens(parameters: int) -> int:
    """How many tokens of rows are compared: as many as about 15 TFLOP pay for (two per parameter and token), between
    512 and 2048. A laptop of 200 GFLOP/s then needs some minutes for an 8B model."""
    return int(min(2048, max(512, 1.5e13 / (2 * max(parameters, 1)))))


def _none(length: int) -> npt.NDArray[np.bool_]:
    return np.zeros(length, dtype=np.bool_)
