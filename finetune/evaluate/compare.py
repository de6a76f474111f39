"""Base against tuned, on the same held-out rows: loss, perplexity, exact match, and answers side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.config.schema import Config
from finetune.data.conversation import Conversation
from finetune.data.prepare import PreparedData
from finetune.data.store import IGNORED, TokenRow
from finetune.data.template import end_of_turn
from finetune.errors import TrainingError
from finetune.model.base import LoadedModel
from finetune.model.generate import greedy
from finetune.model.memory import in_fitting_batches, is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BATCH_LOGITS = 2**28
"""Logits in one evaluation batch, unless one row alone has more: half a gigabyte in 16 bit. They are freed before the
next batch, so memory does not grow with the number of rows."""

SLICE = 256
"""Positions whose loss is computed at a time: only these logits exist in float32 as well."""


@dataclass(frozen=True)
class Score:
    """One model on the held-out rows."""

    loss: float
    """Mean negative log likelihood of the tokens with loss, in nats."""
    exact_match: float | None = None
    """Share of greedy answers equal to the reference, white space at the ends aside; None if not asked for."""

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and what was answered."""

    prompt: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Comparison:
    base: Score
    tuned: Score
    rows: int
    tokens: int
    answered: int
    """How many prompts were answered for exact match."""
    samples: tuple[Sample, ...]

    def as_dict(self) -> dict[str, Any]:
        """As written to evaluation.json."""

        def score(value: Score) -> dict[str, float | None]:
            perplexity = value.perplexity if math.isfinite(value.perplexity) else None
            return {"loss": value.loss, "perplexity": perplexity, "exact_match": value.exact_match}

        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "answered": self.answered,
            "base": score(self.base),
            "tuned": score(self.tuned),
            "samples": [asdict(sample) for sample in self.samples],
        }


def compare(
    config: Config, data: PreparedData, loaded: LoadedModel, on_progress: Callable[[str, int, int], None] | None = None
) -> Comparison | None:
    """Evaluate `loaded.model` (a PeftModel) with its adapter and without. None when nothing was held out.

    `on_progress` is called with what is being done, how much is done and how much there is.
    """
    rows = data.held_out[: config.evaluation.max_rows]
    if not rows:
        return None
    tell = on_progress or (lambda what, done, total: None)
    try:
        return _compare(config, data, rows, loaded.model, tell)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory on {loaded.hardware.name}, evaluating one row at a time; what was trained is saved",
            hint="lower evaluation.max_new_tokens and give the same command again: only the evaluation is left to do",
        ) from error


def _compare(
    config: Config,
    data: PreparedData,
    rows: Sequence[TokenRow],
    model: PeftModel,
    tell: Callable[[str, int, int], None],
) -> Comparison:
    chats = [c for c in (row.conversation for row in rows) if c is not None and c.text is None]
    answered = chats if config.evaluation.metric == "exact-match" else chats[: config.evaluation.samples]
    losses: dict[str, tuple[float, int]] = {}
    answers: dict[str, list[str]] = {}
    for who in ("base", "tuned"):
        without_adapter = model.disable_adapter() if who == "base" else contextlib.nullcontext()
        with without_adapter:
            losses[who] = held_out_loss(model, rows, data.tokenizer.pad_id, partial(tell, f"loss, {who}"))
            tell(f"answers, {who}", 0, len(answered))
            answers[who] = _answers(config, data, model, answered)
    references = [conversation.messages[-1].content for conversation in answered]
    scores = {}
    for who in ("base", "tuned"):
        exact = None
        if config.evaluation.metric == "exact-match" and answered:
            exact = sum(a.strip() == r.strip() for a, r in zip(answers[who], references, strict=True)) / len(answered)
        scores[who] = Score(losses[who][0], exact)
    samples = [
        Sample(conversation.messages[-2].content, reference, base, tuned)
        for conversation, reference, base, tuned in zip(
            answered, references, answers["base"], answers["tuned"], strict=True
        )
    ]
    return Comparison(
        scores["base"],
        scores["tuned"],
        len(rows),
        losses["base"][1],
        len(answered),
        tuple(samples[: config.evaluation.samples]),
    )


def held_out_loss(
    model: PreTrainedModel, rows: Sequence[TokenRow], pad_id: int, on_progress: Callable[[int, int], None]
) -> tuple[float, int]:
    """Mean negative log likelihood over all tokens with loss, in nats, and how many there are.

    Summed in float64 from float32 logits. Every token counts alike, so long answers weigh more than short ones.
    """
    total, tokens, done = 0.0, 0, 0
    was_training = model.training
    model.eval()
    batch_tokens = BATCH_LOGITS // model.config.vocab_size
    batches: list[list[TokenRow]] = []
    # The longest first: if memory does not suffice, that is known at once.
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].ids) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    for batch, (loss, counted) in in_fitting_batches(batches, partial(_batch_loss, model, pad_id)):
        total += loss
        tokens += counted
        done += len(batch)
        on_progress(done, len(rows))
    model.train(was_training)
    return total / max(tokens, 1), tokens


def try_longest(data: PreparedData, loaded: LoadedModel) -> None:
    """Evaluate the longest held-out row, to no other end than to see that memory suffices for it.

    Raises TrainingError if it does not: after hours of training is the wrong moment to learn it.
    """
    if not data.held_out:
        return
    longest = data.held_out[int(data.held_out.lengths.argmax())]
    try:
        held_out_loss(loaded.model, [longest], data.tokenizer.pad_id, lambda done, total: None)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory on {loaded.hardware.name}, evaluating a row of {len(longest.ids):,} tokens",
            place=longest.place,
            hint="lower train.sequence_length, or leave such rows out of evaluation.path",
        ) from error


def _batch_loss(model: PreTrainedModel, pad_id: int, batch: Sequence[TokenRow]) -> tuple[float, int]:
    """Summed negative log likelihood of some rows, and how many tokens with loss they have."""
    import torch

    width = max(len(row.ids) for row in batch)
    ids = np.full((len(batch), width), pad_id, dtype=np.int64)
    labels = np.full((len(batch), width), IGNORED, dtype=np.int64)
    for line, row in enumerate(batch):
        ids[line, : len(row.ids)] = row.ids
        labels[line, : len(row.ids)] = row.labels()
    total = 0.0
    with torch.inference_mode():
        # Padding stands on the right, where causal attention never looks from the left.
        logits = model(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False).logits[:, :-1]
        wanted = torch.from_numpy(labels[:, 1:]).to(logits.device)
        for line in range(len(batch)):
            for begin in range(0, width - 1, SLICE):
                some = slice(begin, begin + SLICE)
                loss = torch.nn.functional.cross_entropy(
                    logits[line, some].float(), wanted[line, some], ignore_index=IGNORED, reduction="sum"
                )
                total += float(loss)
    return total, int((labels[:, 1:] != IGNORED).sum())


def _answers(config: Config, data: PreparedData, model: PreTrainedModel, rows: Sequence[Conversation]) -> list[str]:
    """Greedy answers to the last question of each row."""
    if not rows:
        return []
    assert data.template is not None
    prompts = [
        data.tokenizer.encode(
            data.template.render(row.messages[:-1], tools=row.tools, add_generation_prompt=True), special=False
        )
        for row in rows
    ]
    stop_ids, stop_texts = end_of_turn(data.template, data.tokenizer)
    found = []
    for ids in greedy(
        model,
        prompts,
        max_new_tokens=config.evaluation.max_new_tokens,
        stop_ids=stop_ids,
        pad_id=data.tokenizer.pad_id,
    ):
        text = data.tokenizer.decode(ids)
        # An end of turn of several tokens is only seen in the text.
        for stop in stop_texts:
            text = text.partition(stop)[0]
        found.append(text.strip())
    return found
