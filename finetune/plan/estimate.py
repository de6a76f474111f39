"""Config, shape and data → what the training needs on a card: memory, time, cost, disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetune.config.schema import Config
from finetune.plan.amount import Amount, sequences_in, steps_in_all, typical
from finetune.plan.disk import Disk, Ram, disk_of, ram_of
from finetune.plan.fit import budget, cut_as, fitted
from finetune.plan.gpus import Card
from finetune.plan.memory import Memory, evaluation_memory, training_memory
from finetune.plan.setup import HEAD, Fit, Kernels, Setup, Shape
from finetune.plan.time import work_of

OWN_ATTENTION = ("gemma2", "falcon")
"""Families whose attention takes no other in its place: a soft cap on the scores, ALiBi or no interface for it
(`model/kernels/attention.py` decides on the real model; a test holds the two together)."""

EAGER = ("gemma2",)
"""Families that compute attention in plain torch, having no sdpa (model/base.py, `_attention`; a test asks transformers
for each family)."""

LARGEST_FLASH_HEAD, WIDE_HEADS, WIDEST_HEAD = 192, {(8, 0), (9, 0), (10, 0)}, 256
"""Wider heads have flash attention's backward pass on these chips only (torch, flash_api.cpp), up to the widest."""


@dataclass(frozen=True)
class Estimate:
    """What a training is expected to need on one card."""

    card: str
    fit: Fit
    memory: Memory
    evaluation: int
    """Bytes of the evaluation afterwards, in its worst case."""
    available: int
    """Bytes of the card that may be used."""
    steps: int
    tokens: int
    """Of the whole training, without padding."""
    tokens_counted: bool
    seconds: float
    dollars: float | None
    """At the card's rental price, or None where it has none."""
    kilowatt_hours: float
    """At most: the card at its full power all the time."""
    disk: Disk
    ram: Ram

    @property
    def peak(self) -> int:
        return max(self.memory.total, self.evaluation)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON and for the run's manifest: plain numbers, in bytes and seconds."""
        return {
            "card": self.card,
            "fits": self.fits,
            "fit": asdict(self.fit),
            "memory": self.memory.as_dict() | {"total": self.memory.total},
            "evaluation": self.evaluation,
            "available": self.available,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_counted": self.tokens_counted,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "seconds": round(self.seconds, 1),
            "dollars": None if self.dollars is None else round(self.dollars, 4),
            "kilowatt_hours": round(self.kilowatt_hours, 4),
            "disk": self.disk.as_dict(),
            "ram": self.ram.as_dict(),
        }


def expected_kernels(config: Config, shape: Shape, card: Card | None) -> Kernels:
    """Which faster ways a run will use, as far as that can be said without the model. None for the card is the CPU.

    Compiled layers have no kernels of ours (train/speed.py). An adapter on the head leaves that to TRL.
    """
    speed, own = config.speed, not config.speed.compile
    varlen = speed.attention != "sdpa" and shape.model_type not in OWN_ATTENTION and _flash(shape.head_dim, card)
    return Kernels(
        attention="varlen" if varlen else "eager" if shape.model_type in EAGER else "sdpa",
        fused=own and speed.fused is not False and shape.gated,
        lora=own and speed.lora and config.lora.dropout == 0,
        head=speed.head and HEAD not in config.lora.targets,
    )


def _flash(head_dim: int, card: Card | None) -> bool:
    """Whether there is a kernel for rows end to end (model/kernels/attention.py, `_refused_by_gpu`). A CPU's needs
    nothing, a GPU's Ampere or later, which is where bfloat16 begins too."""
    if card is None:
        return True
    limit = WIDEST_HEAD if card.capability in WIDE_HEADS else LARGEST_FLASH_HEAD
    return card.bf16 and head_dim <= limit and head_dim % 8 == 0


def setup_of(
    config: Config,
    shape: Shape,
    *,
    kernels: Kernels,
    longest_row: int,
    sequence: int,
    supervised: float,
    device: Literal["cuda", "cpu"],
) -> Setup:
    """The setup that a config describes, its step cut as it is written.

    longest_row, sequence  tokens of the longest row and of the longest sequence (pack) of the data
    supervised             the share of the tokens with loss
    """
    fit = as_written(config, shape.layers, device)
    return Setup(
        shape=shape,
        quantization=config.quantization,
        rank=config.lora.rank,
        targets=config.lora.targets,
        optimizer="adamw" if config.train.optimizer == "auto" else config.train.optimizer,
        dtype_bytes=2 if device == "cuda" else 4,
        micro_batch=fit.micro_batch,
        sequence=sequence,
        row=longest_row,
        supervised=supervised,
        recomputed=fit.recomputed,
        offload=fit.offload,
        kernels=kernels,
        dropout=config.lora.dropout > 0,
        answer=config.evaluation.max_new_tokens if answers(config) else 0,
    )


def as_written(config: Config, layers: int, device: Literal["cuda", "cpu"]) -> Fit:
    """The step as the config cuts it; `auto` is everything recomputed on a GPU and nothing on a CPU, no offload."""
    train = config.train
    recomputed = kept_recomputed(config, layers)
    if recomputed is None:
        recomputed = layers if device == "cuda" else 0
    return Fit(train.micro_batch_size, train.gradient_accumulation_steps, recomputed, kept_offload(config) is True)


def kept_recomputed(config: Config, layers: int) -> int | None:
    """How many layers the config itself wants recomputed, or None where it leaves that open."""
    wanted = config.train.gradient_checkpointing
    if wanted == "auto":
        return None
    if isinstance(wanted, bool):
        return layers if wanted else 0
    return min(wanted, layers)


def kept_offload(config: Config) -> bool | None:
    """What the config itself wants offloaded, or None where it leaves that open. Compiled layers never are."""
    if config.train.offload == "auto":
        return False if config.speed.compile else None
    return config.train.offload


def chosen_fit(config: Config, setup: Setup, amount: Amount, card: Card) -> Fit | None:
    """How `ft train` will cut a step on this card, or None where it does not fit, however it is cut."""
    train = config.train
    if train.fit == "as-written":
        fit = as_written(config, setup.shape.layers, "cuda")
        needed = training_memory(cut_as(setup, fit, amount)).total
        if evaluates(config):
            needed = max(needed, evaluation_memory(setup))
        return fit if needed <= budget(card) else None
    return fitted(
        setup,
        amount,
        train.effective_batch,
        budget(card),
        card,
        evaluated=evaluates(config),
        keep_recomputed=kept_recomputed(config, setup.shape.layers),
        keep_offload=kept_offload(config),
    )


def estimate(config: Config, setup: Setup, amount: Amount, card: Card, *, stored_bytes: int, here: bool) -> Estimate:
    """What a setup, cut as it is, needs on a card.

    stored_bytes  of a parameter in the base's files; here: whether these are on this machine already
    """
    train = config.train
    memory = training_memory(setup)
    steps = steps_in_all(amount.sequences, train)
    sequences = sequences_in(steps, amount.sequences, train)
    seconds = work_of(typical(setup, amount)).seconds(card) * sequences / setup.micro_batch
    hours = seconds / 3600
    return Estimate(
        card=card.label,
        fit=Fit(setup.micro_batch, train.effective_batch // setup.micro_batch, setup.recomputed, setup.offload),
        memory=memory,
        evaluation=evaluation_memory(setup) if evaluates(config) else 0,
        available=budget(card),
        steps=steps,
        tokens=round(amount.tokens / amount.sequences * sequences),
        tokens_counted=amount.counted,
        seconds=seconds,
        dollars=None if card.price is None else card.price * hours,
        kilowatt_hours=card.watts * hours / 1000,
        disk=disk_of(config, setup, stored_bytes=stored_bytes, here=here),
        ram=ram_of(setup, memory),
    )


def evaluates(config: Config) -> bool:
    """Whether rows are held out."""
    return config.evaluation.path is not None or config.evaluation.split > 0


def answers(config: Config) -> bool:
    """Whether the evaluation also writes answers (evaluate/compare.py)."""
    return evaluates(config) and (config.evaluation.samples > 0 or config.evaluation.metric == "exact-match")
