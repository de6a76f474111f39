"""How long a training is, and what a step of it is made of."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData
from finetune.plan import amount
from finetune.plan.setup import Fit
from finetune.runs.folder import RunFolder


def steps_in_all(config: Config, data: PreparedData) -> int:
    """Optimizer steps of the whole run."""
    return amount.steps_in_all(data.sequences, config.train)


def smaller(fit: Fit, layers: int, *, offload: bool) -> Fit | None:
    """The same step, from the same sequences in the same order, in less memory; None where there is no such thing.

    First fewer sequences at a time, which costs little once a pass fills the GPU; then more recomputed layers, a
    quarter of them at a time; at last the offload, which waits for the bus. `offload` says whether there is anywhere
    to offload to: a GPU's memory is not the machine's.
    """
    micro = next((size for size in range(fit.micro_batch - 1, 0, -1) if fit.micro_batch % size == 0), None)
    if micro is not None:
        return replace(fit, micro_batch=micro, accumulation=fit.accumulation * (fit.micro_batch // micro))
    if fit.recomputed < layers:
        return replace(fit, recomputed=min(layers, fit.recomputed + math.ceil(layers / 4)))
    return replace(fit, offload=True) if offload and not fit.offload else None


def remembered(config: Config, run: RunFolder) -> Fit | None:
    """How the step was cut earlier in this run: a run that goes on must round as it did before.

    None for a new run, or where another cut has been configured since.
    """
    known = (run.read_manifest() if run.manifest.exists() else {}).get("fit")
    if not isinstance(known, dict) or known.get("configured") != _wishes(config):
        return None
    used = known.get("used")
    if not isinstance(used, dict):
        return None
    numbers: dict[str, Any] = {name: used.get(name) for name in ("micro_batch", "accumulation", "recomputed")}
    if not all(type(number) is int for number in numbers.values()):
        return None
    fit = Fit(**numbers, offload=used.get("offload") is True)
    same = fit.micro_batch * fit.accumulation == config.train.effective_batch
    return fit if same and fit.micro_batch > 0 and fit.recomputed >= 0 else None


def remember(config: Config, run: RunFolder, fit: Fit, why: str) -> None:
    """Keep in the manifest how the step is cut, and why; what is known of it already stays."""
    if remembered(config, run) != fit:
        run.update_manifest(fit={"configured": _wishes(config), "used": asdict(fit), "why": why})


def _wishes(config: Config) -> dict[str, Any]:
    names = ("fit", "micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "offload")
    return {name: getattr(config.train, name) for name in names}
