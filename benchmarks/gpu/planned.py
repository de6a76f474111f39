"""What ft's own plan says of a case: how the step is cut, what memory it takes, how many operations it is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from benchmarks.gpu.models import facts
from benchmarks.measuring import Failed
from finetune.plan.amount import amount_of, typical
from finetune.plan.estimate import as_written, chosen_fit, expected_kernels, setup_of
from finetune.plan.fit import RESERVE, cut_as
from finetune.plan.gpus import Card, card_like
from finetune.plan.memory import CONTEXT, training_memory
from finetune.plan.setup import Fit, Kernels, Setup
from finetune.plan.shape import shape_of
from finetune.plan.time import operations, work_of

if TYPE_CHECKING:
    from finetune.config.schema import Config
    from finetune.data.prepare import PreparedData
    from finetune.model.hardware import Hardware

FASTEST = Kernels(attention="varlen", fused=True, lora=True, head=True)


def setup_for(config: Config, data: PreparedData, shape: str, hardware: Hardware) -> Setup:
    """The setup that the plan makes of a config, with the data's real lengths."""
    amount = amount_of(data)
    model = shape_of(facts(shape), shape)
    return setup_of(
        config,
        model,
        kernels=expected_kernels(config, model, card_of(hardware)),
        longest_row=amount.longest_row,
        sequence=amount.longest,
        supervised=amount.share,
        device=hardware.device,
    )


def card_of(hardware: Hardware) -> Card | None:
    """The card, with as much memory as the hardware is said to have; None on a CPU."""
    return card_like(hardware.name, hardware.memory) if hardware.device == "cuda" else None


def fit_for(config: Config, data: PreparedData, shape: str, hardware: Hardware) -> Fit:
    """How ft cuts the step on this hardware. Raises Failed where the plan finds no cut that fits."""
    setup, card = setup_for(config, data, shape, hardware), card_of(hardware)
    if card is None or config.train.fit == "as-written":
        return as_written(config, setup.shape.layers, hardware.device)
    fit = chosen_fit(config, setup, amount_of(data), card)
    if fit is None:
        raise Failed(f"the plan finds no way to fit this into {card.memory / 2**30:.1f} GiB")
    return fit


def within(tensors: int) -> int:
    """Bytes of a card on which the plan takes at most `tensors` for tensors: CUDA's context comes on top of them, and
    a share of a card is left free."""
    return int((tensors + CONTEXT) / (1 - RESERVE))


def least_fit(config: Config, data: PreparedData, shape: str, hardware: Hardware) -> tuple[Fit, int]:
    """The cut of a step that takes least memory, and the bytes of tensors that the plan gives it."""
    setup = setup_for(config, data, shape, hardware)
    effective = config.train.effective_batch
    fit = Fit(1, effective, setup.shape.layers, True)
    plan = training_memory(cut_as(setup, fit))
    return fit, plan.total - plan.context


def planned_tokens_per_s(config: Config, data: PreparedData, shape: str, hardware: Hardware, fit: Fit) -> float | None:
    """Tokens a second, padding left out, that the plan foretells; None on a CPU, which it does not time."""
    if (card := card_of(hardware)) is None:
        return None
    amount = amount_of(data)
    work = work_of(typical(cut_as(setup_for(config, data, shape, hardware), fit), amount))
    return amount.tokens / amount.sequences * fit.micro_batch / work.seconds(card)


def operations_per_token(config: Config, data: PreparedData, shape: str, hardware: Hardware, fit: Fit) -> float:
    """Floating point operations a token of an ideal trainer that recomputes as much: nothing on padding, nothing across
    rows, the head for tokens with loss only."""
    setup = dataclasses.replace(cut_as(setup_for(config, data, shape, hardware), fit), kernels=FASTEST)
    return operations(typical(setup, amount_of(data))).total
