"""What an artifact is asked before its numbers are compared: token ids, prompts, and where it stops."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from finetune.data.conversation import Message
from finetune.data.template import ChatTemplate
from finetune.data.tokenizer import Tokenizer
from finetune.export.verify.metrics import Logits
from finetune.export.verify.probes import CONVERSATIONS, probe_texts, render


class Artifact(Protocol):
    """What was exported, ready to run."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str:
        """How its matrices are stored: what decides how near it must be (`verdict.LIMITS`)."""

    @property
    def template(self) -> str | None:
        """The chat template that it carries."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text as it stands, special tokens in it read as such."""

    def tokenize_prompt(self, text: str) -> list[int] | None:
        """The ids of a whole prompt, with the tokens that the runtime puts around it by itself; None if that is up to
        whoever calls it."""

    def prompt(self, messages: Sequence[Message]) -> list[int] | None:
        """The ids of the prompt that it makes of a conversation; None if it cannot."""

    def ends(self, token: int) -> bool:
        """Whether it stops at this token by itself."""

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int] | None:
        """The most likely continuation up to a token that ends an answer; None if it would take too long to ask."""

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        """(tokens, vocabulary) for each sequence."""

    def far_logits(self, ids: Sequence[int], positions: int) -> Logits:
        """Of the last positions of one sequence."""

    def finish_asking(self) -> None:
        """Only logits will be wanted from here on: what else is in memory may go."""


@dataclass
class Asked:
    """What was found out."""

    texts: int = 0
    different: list[str] = field(default_factory=list)
    """Texts with other token ids than in training, for no known reason."""
    normalised: int = 0
    """Texts whose ids are those of training only once they are in Unicode's composed form (NFC)."""
    framed: list[int] | None = None
    """What the runtime makes of a prompt "a", if training put other tokens around it or none."""
    template_as_trained: bool = True
    prompts: int = 0
    """Conversations that the template takes, of those that were tried."""
    other_prompts: list[str] = field(default_factory=list)
    """The roles in conversations of which the runtime makes another prompt."""
    ends: bool = False


def ask(artifact: Artifact, tokenizer: Tokenizer, template: ChatTemplate | None, stop_ids: Sequence[int]) -> Asked:
    """Compare with what training did. `stop_ids` ends an answer; what training put there comes first."""
    texts = probe_texts(template, tokenizer)
    found = Asked(len(texts), template_as_trained=artifact.template == tokenizer.chat_template)
    for text in texts:
        ours = tokenizer.encode(text, special=False)
        if artifact.tokenize(text) == ours:
            continue
        composed = unicodedata.normalize("NFC", text)
        if composed != text and artifact.tokenize(composed) == ours:
            found.normalised += 1
        else:
            found.different.append(text)
    framed = artifact.tokenize_prompt("a")
    if framed is not None and framed != _framed_in_training(tokenizer, template):
        found.framed = framed
    for messages in CONVERSATIONS:
        prompt = render(template, messages) if template else None
        if prompt is None:
            continue
        found.prompts += 1
        # The runtime may leave out a BOS that it puts there itself: the ids are what counts.
        if artifact.prompt(messages) != tokenizer.encode(prompt, special=False):
            found.other_prompts.append(f"({', '.join(message.role for message in messages)})")
    found.ends = bool(stop_ids) and artifact.ends(stop_ids[0])
    return found


def _framed_in_training(tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """The ids of "a" with what a runtime must put around every prompt: what the tokenizer does, and with a template a
    BOS if conversations begin with it."""
    if template is None:
        return tokenizer.encode("a", special=True)
    bos = template.special.get("bos_token")
    text = next((text for text in (render(template, messages) for messages in CONVERSATIONS) if text), "")
    begins = bool(bos) and text.startswith(str(bos))
    return tokenizer.encode(f"{bos}a" if begins else "a", special=False)
