"""An artifact against what was trained: everything is measured here, and judged in `verdict.py`.

The reference (base + adapter in PEFT, unmerged, float32; see `streamed.py`) goes once over all sequences, in groups,
and whatever was exported is asked for its logits on the same tokens. Several artifacts are proven together, since the
reference is what takes the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.store import TokenRow
from finetune.data.template import ChatTemplate
from finetune.data.tokenizer import Tokenizer
from finetune.export.source import Model
from finetune.export.verify.asked import Artifact, Asked, ask
from finetune.export.verify.metrics import Distance, Logits, Shift, distance, gap, joined, losses, shift
from finetune.export.verify.probes import (
    CONVERSATIONS,
    FAR,
    LONG,
    Sequence_,
    long_sequence,
    render,
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
    """"held-out", "training" or "no"."""
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
    asked: Asked
    apart: Distance = field(default_factory=lambda: joined([]))
    """From what it was made of: the adapter on the stored base, or on the NF4 base."""
    apart_on_rows: Distance = field(default_factory=lambda: joined([]))
    apart_far: Distance | None = None
    """The same at the end of a long sequence."""
    apart_from_training: Distance | None = None
    """From the adapter on the base that training saw, where that is another."""
    shift: Shift = field(default_factory=Shift)
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
    long: int = 0
    """Tokens of the long sequence; 0 without one."""
    perplexity: dict[str, float] = field(default_factory=dict)
    """Of "base", "stored" and, where training quantised, "nf4"."""
    base_apart: Distance = field(default_factory=lambda: joined([]))
    """The base from the adapter on it."""
    base_apart_on_rows: Distance = field(default_factory=lambda: joined([]))
    merges_apart: Distance | None = None
    """The adapter on the stored base, from the adapter on the base that training saw."""


def measure(
    subject: Subject, artifacts: Sequence[Artifact], on_progress: OnProgress
) -> tuple[Reference, list[Measured]]:
    """Compare. Raises what the artifacts and the files raise; judges nothing."""
    models = _References(subject)
    parameters = sum(int(np.prod(info.shape)) for info in subject.base.weights.tensors.values())
    sequences = text_sequences(subject.tokenizer, models.vocabulary, models.context)
    sequences += row_sequences(subject.rows, row_tokens(parameters), models.context)
    long = long_sequence(sequences, parameters, models.context)
    prompts = _prompts(subject, sequences, models.context)
    found, answers = [], []
    for number, artifact in enumerate(artifacts):
        on_progress("asking", number, len(artifacts))
        asked = ask(artifact, subject.tokenizer, subject.template, subject.stop_ids)
        found.append(Measured(artifact.name, artifact.precision, asked))
        answers.append(_answers(artifact, prompts, sequences))
        artifact.finish_asking()
    mixture = any(key in subject.base.config for key in _EXPERTS)
    reference = Reference(subject.onto, subject.rows_are, mixture, long=len(long.ids) if long else 0)
    collected = _Collected(subject, len(artifacts))
    own = _owned(answers)
    done = 0
    for group in groups([sequence.ids for sequence in sequences], models.vocabulary):
        on_progress("comparing", done, len(sequences))
        ids = [sequences[index].ids for index in group]
        logits = models.logits(ids)
        shared = [line for line, index in enumerate(group) if index not in own]
        theirs = [artifact.logits([ids[line] for line in shared]) for artifact in artifacts] if shared else []
        for place, line in enumerate(shared):
            rows = {who: of[line] for who, of in logits.items()}
            collected.take(sequences[group[line]], rows, [of[place] for of in theirs])
        for line, index in enumerate(group):
            for number, answer in own.get(index, ()):
                _judge_answer(found[number], logits[subject.onto][line], sequences[index], answer)
        done += len(group)
    collected.finish(reference, found)
    if long is not None:
        on_progress("far from the beginning", 0, 1)
        (expected,) = models.merged.logits([long.ids], last=FAR)
        for artifact, measured in zip(artifacts, found, strict=True):
            measured.apart_far = distance(expected, artifact.far_logits(long.ids, FAR))
    return reference, found


def needed_context(subject: Subject) -> int:
    """How many tokens of context an artifact needs for all that it will be asked."""
    prompts = _conversation_ids(subject)
    return max([LONG, *(len(prompt) + ANSWER_TOKENS + 8 for prompt in prompts)])


class _References:
    """The models in PEFT that artifacts are compared with."""

    def __init__(self, subject: Subject) -> None:
        stored = StreamedModel(subject.base, subject.adapter, device=subject.device)
        self._models = {"stored": stored}
        if subject.nf4 or subject.onto == "nf4":
            self._models["nf4"] = StreamedModel(subject.base, subject.adapter, device=subject.device, nf4=True)
        self.merged = self._models[subject.onto]
        self.vocabulary, self.context = stored.vocabulary, stored.context

    def logits(self, ids: Sequence[Sequence[int]]) -> dict[str, list[Logits]]:
        """Of "stored", "nf4" where there is one, and "base": the one that was merged onto, without the adapter."""
        found = {who: model.logits(ids) for who, model in self._models.items()}
        with self.merged.without_adapter():
            found["base"] = self.merged.logits(ids)
        return found


def _conversation_ids(subject: Subject) -> list[tuple[int, ...]]:
    if subject.template is None:
        return []
    texts = [render(subject.template, messages) for messages in CONVERSATIONS]
    return [tuple(subject.tokenizer.encode(text, special=False)) for text in texts if text]


def _prompts(subject: Subject, sequences: Sequence[Sequence_], context: int) -> list[tuple[int, ...]]:
    """Of rows, where there are some; else conversations in the template."""
    prompts = [sequence.prompt for sequence in sequences if sequence.prompt] or _conversation_ids(subject)
    room = context - ANSWER_TOKENS - 1
    return [prompt for prompt in dict.fromkeys(prompts) if prompt and len(prompt) <= room][:ANSWERS]


@dataclass(frozen=True)
class _Answer:
    prompt: int
    """Tokens of the prompt; what follows is the artifact's."""
    stopped: bool


def _answers(artifact: Artifact, prompts: Sequence[tuple[int, ...]], sequences: list[Sequence_]) -> dict[int, _Answer]:
    """Let an artifact continue the prompts, and append what comes out to the sequences. Index → the answer."""
    answers: dict[int, _Answer] = {}
    for prompt in prompts:
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

    def __init__(self, subject: Subject, artifacts: int) -> None:
        self._subject = subject
        self.apart: list[list[Distance]] = [[] for _ in range(artifacts)]
        self.apart_on_rows: list[list[Distance]] = [[] for _ in range(artifacts)]
        self.from_training: list[list[Distance]] = [[] for _ in range(artifacts)]
        self.losses: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(artifacts)]
        self.shifts = [Shift() for _ in range(artifacts)]
        self.base: list[Distance] = []
        self.base_on_rows: list[Distance] = []
        self.merges: list[Distance] = []
        self.reference_losses: dict[str, list[np.ndarray[Any, Any]]] = {}

    def take(self, sequence: Sequence_, logits: dict[str, Logits], artifacts: Sequence[Logits]) -> None:
        merged = logits[self._subject.onto]
        row = bool(sequence.scored.any())
        self.base.append(distance(merged, logits["base"]))
        if row:
            self.base_on_rows.append(self.base[-1])
            for who, of in logits.items():
                self.reference_losses.setdefault(who, []).append(losses(of, sequence.ids, sequence.scored))
        if "nf4" in logits:
            self.merges.append(distance(logits["nf4"], logits["stored"]))
        for number, found in enumerate(artifacts):
            self.apart[number].append(distance(merged, found))
            self.shifts[number] += shift(merged, logits["base"], found)
            if row:
                self.apart_on_rows[number].append(self.apart[number][-1])
                self.losses[number].append(losses(found, sequence.ids, sequence.scored))
            if self._subject.nf4 != (self._subject.onto == "nf4"):
                trained = logits["nf4" if self._subject.nf4 else "stored"]
                self.from_training[number].append(distance(trained, found))

    def finish(self, reference: Reference, found: Sequence[Measured]) -> None:
        reference.sequences = len(self.base)
        reference.base_apart, reference.base_apart_on_rows = joined(self.base), joined(self.base_on_rows)
        reference.positions = len(reference.base_apart.divergence)
        reference.merges_apart = joined(self.merges) if self.merges else None
        reference.perplexity = {who: _perplexity(parts) for who, parts in self.reference_losses.items()}
        for number, measured in enumerate(found):
            measured.apart, measured.apart_on_rows = joined(self.apart[number]), joined(self.apart_on_rows[number])
            measured.shift = self.shifts[number]
            if self.from_training[number]:
                measured.apart_from_training = joined(self.from_training[number])
            if self.losses[number]:
                measured.perplexity = _perplexity(self.losses[number])


def _perplexity(parts: Sequence[np.ndarray[Any, Any]]) -> float:
    every = np.concatenate(parts)
    return float(np.exp(min(every.mean(), 700.0))) if len(every) else float("nan")
