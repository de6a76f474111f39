"""An artifact against what was trained: everything is measured here, and judged in `verdict.py`.

The reference (base + adapter in PEFT, unmerged, float32; see `streamed.py`) goes once over all sequences, in groups,
and whatever was exported is asked for its logits on the same tokens. Several artifacts are proven together, since the
reference is what takes the time.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finetune.data.conversation import Message
from finetune.data.store import TokenRow
from finetune.data.template import ChatTemplate
from finetune.data.tokenizer import Tokenizer
from finetune.export.source import Model
from finetune.export.verify.metrics import Distance, Logits, distance, gap, joined, losses
from finetune.export.verify.probes import (
    Sequence_,
    conversation,
    conversation_messages,
    probe_texts,
    row_sequences,
    row_tokens,
    text_sequences,
)
from finetune.export.verify.streamed import StreamedModel, groups

ANSWERS, ANSWER_TOKENS = 4, 48
"""How many prompts an artifact continues, and by how many tokens at most."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What config.json of a mixture of experts has."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Artifact(Protocol):
    """What was exported, ready to run."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str:
        """How its matrices are stored: what decides how near it must be (`verdict.LIMITS`)."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text as it stands, special tokens in it read as such."""

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        """(tokens, vocabulary) for each sequence."""

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int] | None:
        """The most likely continuation up to a token that ends an answer; None if it would take too long to ask."""

    def ends(self, token: int) -> bool:
        """Whether it stops at this token by itself."""

    def prompt(self, messages: Sequence[Message]) -> str | None:
        """The prompt it makes of a conversation with the template inside it; None if it has none."""


@dataclass(frozen=True)
class Subject:
    """What was trained, and on what it is shown."""

    base: Model
    adapter: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop_ids: Sequence[int]
    """Tokens that end an answer; the one that training put there comes first."""
    rows: Sequence[TokenRow]
    rows_are: str
    """"held-out" or "training"."""
    nf4: bool
    """Whether training held the base in NF4."""
    onto: str
    """What the artifact was merged onto: "stored" or "nf4"."""
    device: str


@dataclass
class Measured:
    """What was found out about one artifact."""

    name: str
    precision: str
    texts: int
    different: list[str] = field(default_factory=list)
    """Texts with other token ids than in training, for no known reason."""
    normalised: int = 0
    """Texts whose ids are those of training only once they are in Unicode's composed form (NFC)."""
    prompt_as_trained: bool | None = None
    ends: bool = False
    apart: Distance = field(default_factory=lambda: joined([]))
    """From what it was made of: the adapter on the stored base, or on the NF4 base."""
    apart_on_rows: Distance = field(default_factory=lambda: joined([]))
    apart_from_training: Distance | None = None
    """From the adapter on the base that training saw, where that is another."""
    perplexity: float | None = None
    answers: int = 0
    stopped: int = 0
    tokens: int = 0
    same_tokens: int = 0
    """Of `tokens` written greedily, how many the reference would have written too."""
    worst_gap: float = 0.0
    """By how much, in logits, the reference preferred another token, at most."""


@dataclass
class Reference:
    """What was found out about base and adapter themselves."""

    onto: str
    rows_are: str
    mixture: bool = False
    """Whether the model routes tokens to experts."""
    positions: int = 0
    sequences: int = 0
    perplexity: dict[str, float] = field(default_factory=dict)
    """Of "base", "stored" and, where training quantised, "nf4"."""
    base_apart: Distance = field(default_factory=lambda: joined([]))
    base_apart_on_rows: Distance = field(default_factory=lambda: joined([]))
    merges_apart: Distance | None = None
    """The adapter on the stored base, from the adapter on the base that training saw."""


def measure(
    subject: Subject, artifacts: Sequence[Artifact], on_progress: OnProgress
) -> tuple[Reference, list[Measured]]:
    """Compare. Raises what the artifacts and the files raise; judges nothing."""
    trained = StreamedModel(subject.base, subject.adapter, device=subject.device)
    seen = None
    if subject.nf4 or subject.onto == "nf4":
        seen = StreamedModel(subject.base, subject.adapter, device=subject.device, nf4=True)
    parameters = sum(int(np.prod(info.shape)) for info in subject.base.weights.tensors.values())
    sequences = text_sequences(subject.tokenizer, trained.vocabulary)
    sequences += row_sequences(subject.rows, row_tokens(parameters))
    found = [_ask(subject, artifact, on_progress) for artifact in artifacts]
    prompts = _prompts(subject, sequences)
    answers = [_answers(artifact, prompts, sequences, on_progress) for artifact in artifacts]
    reference = Reference(subject.onto, subject.rows_are, any(key in subject.base.config for key in _EXPERTS))
    collected = _Collected(len(artifacts))
    done = 0
    for group in groups([sequence.ids for sequence in sequences], trained.vocabulary):
        some = [sequences[index] for index in group]
        ids = [sequence.ids for sequence in some]
        on_progress("comparing", done, len(sequences))
        logits = {"stored": trained.logits(ids)}
        with trained.without_adapter():
            logits["base"] = trained.logits(ids)
        if seen is not None:
            logits["nf4"] = seen.logits(ids)
        own = _owned(answers)
        shared = [line for line, index in enumerate(group) if index not in own]
        theirs = [artifact.logits([ids[line] for line in shared]) for artifact in artifacts] if shared else []
        for place, line in enumerate(shared):
            rows = {who: found[line] for who, found in logits.items()}
            collected.take(sequences[group[line]], rows, subject.onto, [found[place] for found in theirs])
        for line, index in enumerate(group):
            for number, answer in own.get(index, ()):
                _judge_answer(found[number], logits[subject.onto][line], sequences[index], answer)
        done += len(group)
    on_progress("comparing", done, len(sequences))
    collected.finish(reference, found)
    return reference, found


def _ask(subject: Subject, artifact: Artifact, on_progress: OnProgress) -> Measured:
    """What needs no reference model: token ids, the prompt, what ends an answer."""
    texts = probe_texts(subject.template)
    measured = Measured(artifact.name, artifact.precision, len(texts))
    for done, text in enumerate(texts):
        on_progress("token ids", done, len(texts))
        ours = subject.tokenizer.encode(text, special=False)
        if artifact.tokenize(text) == ours:
            continue
        composed = unicodedata.normalize("NFC", text)
        if composed != text and artifact.tokenize(composed) == ours:
            measured.normalised += 1
        else:
            measured.different.append(text)
    asked = conversation(subject.template, 1, ask=True)
    if asked is not None:
        theirs = artifact.prompt(conversation_messages(1, ask=True))
        measured.prompt_as_trained = theirs == asked
    measured.ends = all(artifact.ends(token) for token in subject.stop_ids[:1])
    return measured


def _prompts(subject: Subject, sequences: Sequence[Sequence_]) -> list[tuple[int, ...]]:
    prompts = [sequence.prompt for sequence in sequences if sequence.prompt]
    asked = conversation(subject.template, 1, ask=True)
    if not prompts and asked is not None:
        prompts = [tuple(subject.tokenizer.encode(asked, special=False))]
    return [prompt for prompt in dict.fromkeys(prompts) if prompt][:ANSWERS]


@dataclass(frozen=True)
class _Answer:
    prompt: int
    """Tokens of the prompt; what follows is the artifact's."""
    stopped: bool


def _answers(
    artifact: Artifact, prompts: Sequence[tuple[int, ...]], sequences: list[Sequence_], on_progress: OnProgress
) -> dict[int, _Answer]:
    """Let an artifact continue the prompts, and append what comes out to the sequences. Index → the answer."""
    answers: dict[int, _Answer] = {}
    for done, prompt in enumerate(prompts):
        on_progress("answers", done, len(prompts))
        written = artifact.greedy(prompt, ANSWER_TOKENS)
        if written is None:
            return {}
        if written:
            answers[len(sequences)] = _Answer(len(prompt), artifact.ends(written[-1]))
            ids = (*prompt, *written)
            sequences.append(Sequence_(ids, np.zeros(len(ids), dtype=np.bool_)))
    return answers


def _owned(answers: Sequence[dict[int, _Answer]]) -> dict[int, list[tuple[int, _Answer]]]:
    """Which sequences were written by which artifact."""
    owned: dict[int, list[tuple[int, _Answer]]] = {}
    for number, own in enumerate(answers):
        for index, answer in own.items():
            owned.setdefault(index, []).append((number, answer))
    return owned


def _judge_answer(measured: Measured, logits: Logits, sequence: Sequence_, answer: _Answer) -> None:
    written = sequence.ids[answer.prompt :]
    gaps = gap(logits[answer.prompt - 1 : -1], written)
    measured.answers += 1
    measured.stopped += answer.stopped
    measured.tokens += len(written)
    measured.same_tokens += int((gaps == 0).sum())
    measured.worst_gap = max(measured.worst_gap, float(gaps.max()))


class _Collected:
    """What the passes leave behind, per pair of models."""

    def __init__(self, artifacts: int) -> None:
        self.sequences = 0
        self.apart: list[list[Distance]] = [[] for _ in range(artifacts)]
        self.apart_on_rows: list[list[Distance]] = [[] for _ in range(artifacts)]
        self.from_training: list[list[Distance]] = [[] for _ in range(artifacts)]
        self.losses: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(artifacts)]
        self.base: list[Distance] = []
        self.base_on_rows: list[Distance] = []
        self.merges: list[Distance] = []
        self.reference_losses: dict[str, list[np.ndarray[Any, Any]]] = {}

    def take(self, sequence: Sequence_, logits: dict[str, Logits], onto: str, artifacts: Sequence[Logits]) -> None:
        self.sequences += 1
        row = bool(sequence.scored.any())
        self.base.append(distance(logits[onto], logits["base"]))
        if row:
            self.base_on_rows.append(self.base[-1])
            for who, of in logits.items():
                self.reference_losses.setdefault(who, []).append(losses(of, sequence.ids, sequence.scored))
        if "nf4" in logits:
            self.merges.append(distance(logits["nf4"], logits["stored"]))
        for number, found in enumerate(artifacts):
            self.apart[number].append(distance(logits[onto], found))
            if row:
                self.apart_on_rows[number].append(self.apart[number][-1])
                self.losses[number].append(losses(found, sequence.ids, sequence.scored))
            if "nf4" in logits and onto != "nf4":
                self.from_training[number].append(distance(logits["nf4"], found))

    def finish(self, reference: Reference, found: Sequence[Measured]) -> None:
        reference.sequences = self.sequences
        reference.base_apart, reference.base_apart_on_rows = joined(self.base), joined(self.base_on_rows)
        reference.positions = len(reference.base_apart.divergence)
        reference.merges_apart = joined(self.merges) if self.merges else None
        reference.perplexity = {who: _perplexity(parts) for who, parts in self.reference_losses.items()}
        for number, measured in enumerate(found):
            measured.apart, measured.apart_on_rows = joined(self.apart[number]), joined(self.apart_on_rows[number])
            if self.from_training[number]:
                measured.apart_from_training = joined(self.from_training[number])
            if self.losses[number]:
                measured.perplexity = _perplexity(self.losses[number])


def _perplexity(parts: Sequence[np.ndarray[Any, Any]]) -> float:
    every = np.concatenate(parts)
    return float(np.exp(min(every.mean(), 700.0))) if len(every) else float("nan")
