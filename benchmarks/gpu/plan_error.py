"""How wrong the plan is: the peak that it foretells against the peak that is measured, over a grid."""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from typing import Any

from benchmarks import measuring
from benchmarks.gpu import rows as rows_
from benchmarks.gpu import ways
from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.rows import ALL_OFF, Rows
from benchmarks.gpu.speed import ALL_ON

LENGTHS = (512, 2048, 8192)
TOKENS = (4096, 16384)
"""Tokens of a micro batch."""


@dataclasses.dataclass(frozen=True)
class Option:
    """How a model is trained at a point of the grid."""

    recomputed: float
    """The share of its layers."""
    fast: bool
    """All of the faster kernels, or none."""
    quantization: str = "nf4"
    offload: bool = False

    def __str__(self) -> str:
        kernels = "fast" if self.fast else "plain"
        return f"{kernels}, {self.recomputed:.0%} recomputed{', offload' * self.offload}, {self.quantization}"


OPTIONS = (
    Option(1, True),
    Option(1, False),
    Option(0.5, True),
    Option(0, True),
    Option(1, True, offload=True),
    Option(1, True, quantization="none"),
)


def cases(tiny: bool) -> list[Case]:
    """One model through all of the grid first, then the others on its diagonal."""
    if tiny:
        points = [("tiny", 64, 128, option) for option in OPTIONS[:1]]
    else:
        full = [
            ("llama3.2-1b", length, tokens, option) for length in LENGTHS for tokens in TOKENS for option in OPTIONS
        ]
        others = ("llama3-8b", "qwen2.5-7b", "mistral-7b", "llama3.2-3b", "qwen2.5-1.5b")
        full += [(model, 2048, 4096, option) for model in others for option in OPTIONS[:3]]
        full += [(model, 8192, 16384, OPTIONS[0]) for model in others]
        points = [point for point in full if point[2] >= point[1]]
    return [
        Case(f"{model}, {length} × {tokens // length}, {option}", partial(measure, *point), seconds=8 if tiny else 60)
        for point in points
        for model, length, tokens, option in [point]
    ]


def measure(model: str, length: int, tokens: int, option: Option, context: Context) -> dict[str, Any]:
    """Peak memory of a few steps, and every part of what was foretold."""
    from benchmarks.gpu.planned import setup_for
    from finetune.model.hardware import detect
    from finetune.plan.fit import cut_as
    from finetune.plan.memory import training_memory

    device = context.device
    rows = Rows("dense", length, tokens // length, 1, count=max(8, 4 * tokens // length))
    recomputed = round(option.recomputed * SHAPES[model]["num_hidden_layers"])
    config = rows_.config(
        rows,
        context.folder,
        steps=4,
        quantization=option.quantization,
        train={"gradient_checkpointing": recomputed, "offload": option.offload},
        speed=ALL_ON if option.fast else ALL_OFF,
    )
    data = rows_.prepare(rows, context.folder, model, config)
    found, fit = ways.ours(config, data, model, device, context.folder)
    setup = cut_as(setup_for(config, data, model, detect()), fit)
    plan = training_memory(setup)
    measured = found["peak_gb"] * 1e9 + device.outside()
    parts = {name: size / 1e9 for name, size in plan.as_dict().items()}
    return {
        "planned_gb": plan.total / 1e9,
        "parts_gb": parts,
        "peak_gb": found["peak_gb"],
        "reserved_gb": device.reserved() / 1e9,
        "outside_gb": device.outside() / 1e9,
        # On a CPU nobody counts the tensors: there is nothing to compare with.
        "error": (plan.total - measured) / measured if device.name == "cuda" else None,
        "fit": found["fit"],
        "said": found["said"],
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, one["planned_gb"], one["peak_gb"], one["outside_gb"], one["reserved_gb"], percent(one["error"])]
        for name, one in found.items()
    ]
    errors = [one["error"] for one in found.values() if one["error"] is not None]
    text = measuring.table(["case", "planned GB", "tensors' peak GB", "outside torch GB", "reserved GB", "error"], rows)
    if errors:
        text += (
            f"\n{len(errors)} points. Median error {percent(statistics.median(map(abs, errors)))}, worst over "
            f"{percent(max(errors))}, worst under {percent(min(errors))}.\n"
        )
    return text


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:+.1%}"
