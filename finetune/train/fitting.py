"""What a run is expected to need on the device that is there, and how its steps are cut for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from finetune.config.schema import Config
from finetune.console import duration, size
from finetune.data.prepare import PreparedData
from finetune.errors import BaseError, ConfigError
from finetune.model.hardware import Hardware
from finetune.plan.amount import amount_of
from finetune.plan.disk import LIBRARIES
from finetune.plan.estimate import Estimate, as_written, chosen_fit, estimate, expected_kernels, setup_of
from finetune.plan.fit import cut_as
from finetune.plan.gpus import Card, card_like
from finetune.plan.memory import CONTEXT, training_memory
from finetune.plan.setup import Fit
from finetune.plan.shape import shape_of
from finetune.runs.folder import RunFolder
from finetune.train.length import remembered


@dataclass(frozen=True)
class Expected:
    """The plan for one run."""

    fit: Fit | None
    """How a step is cut; None where the plan does not know the base, and it is cut as it is written."""
    why: str
    memory: int | None
    """Bytes at the peak of the training, as they are measured: tensors on a GPU (CUDA's context comes on top), or all
    of this process where there is none. None: not known."""
    estimate: Estimate | None
    """All that `ft plan` says; None on a CPU, which it does not time."""

    def lines(self) -> list[str]:
        """For a person."""
        cut = [f"step: {self.fit}; {self.why}"] if self.fit is not None else [f"no estimate: {self.why}"]
        if self.memory is None:
            return cut
        if (plan := self.estimate) is None:
            return [*cut, f"estimate: {size(self.memory)} at the peak"]
        cost = "" if plan.dollars is None else f", ${plan.dollars:,.2f}"
        what = f"{size(plan.peak)} of {size(plan.available)} that may be used, {plan.tokens_per_second:,.0f} tokens/s"
        return [*cut, f"estimate: {what}, {duration(plan.seconds)}{cost} (docs/plan.md: not measured yet)"]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        fit = None if self.fit is None else asdict(self.fit)
        plan = None if self.estimate is None else self.estimate.as_dict()
        return {"fit": fit, "why": self.why, "memory_bytes": self.memory, "plan": plan}


def expected(
    config: Config, data: PreparedData, facts: Mapping[str, object], hardware: Hardware, run: RunFolder
) -> Expected:
    """The plan for this run, before its base is loaded.

    facts  the base's config.json

    A run that goes on is cut as it was before. What the plan does not know is no error: it is only not planned, and the
    training itself has the last word.
    """
    try:
        return _expected(config, data, facts, hardware, run)
    except (BaseError, ConfigError) as error:
        return Expected(None, error.problems[0].message, None, None)


def _expected(
    config: Config, data: PreparedData, facts: Mapping[str, object], hardware: Hardware, run: RunFolder
) -> Expected:
    shape = shape_of(facts, config.base)
    amount = amount_of(data)
    card = _card(hardware) if hardware.device == "cuda" else None
    setup = setup_of(
        config,
        shape,
        kernels=replace(expected_kernels(config, shape, card), liger=find_spec("liger_kernel") is not None),
        longest_row=amount.longest_row,
        sequence=amount.longest,
        supervised=amount.share,
        device=hardware.device,
    )
    written = as_written(config, shape.layers, hardware.device)
    fit, why = remembered(config, run), "as before in this run"
    if fit is None and card is not None and config.train.fit == "auto":
        fit, why = chosen_fit(config, setup, amount, card), "the quickest that fits, by the plan"
        if fit is None:
            effective = written.micro_batch * written.accumulation
            fit = replace(written, micro_batch=1, accumulation=effective)
            why = "the plan does not expect even this to fit"
    if fit is None:
        fit, why = written, "as written"
    setup = cut_as(setup, fit, amount)
    plan = None if card is None else estimate(config, setup, amount, card, stored_bytes=2, here=True)
    memory = training_memory(setup)
    measurable = memory.total - memory.context + (LIBRARIES if card is None else 0)
    return Expected(fit, why, measurable, plan)


def _card(hardware: Hardware) -> Card:
    """The card that is here, with what others use of it at this moment; of a process that may not have all of it
    (`Hardware.memory` is less), what it may have."""
    import torch

    free, total = torch.cuda.mem_get_info()
    memory = min(total, hardware.memory)
    # What this process has taken so far (the context) is in the plan already.
    left = min(memory, free + CONTEXT)
    return replace(card_like(hardware.name, memory, torch.cuda.get_device_capability()), in_use=memory - left)
