"""How wrong the plan is: the peak that it foretells against the peak that is measured, over a grid."""

from __future__ import annotations

import dataclasses
import statistics
from functools import partial
from typing import Any

from benchmarks import measuring
from benchmarks.gpu import guess, ways
from benchmarks.gpu import rows as rows_
from benchmarks.gpu.case import Case, Context, Turn
from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.rows import ALL_OFF, Rows
from benchmarks.gpu.speed import ALL_ON

OTHERS = ("llama3-8b", "qwen2.5-7b", "mistral-7b", "llama3.2-3b", "qwen2.5-1.5b")


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

Point = tuple[str, int, int, Option]
"""Model, tokens of a sequence, tokens of a micro batch, option."""


def grid() -> tuple[list[Point], list[Point]]:
    """The points that the target is judged by: each option and each length on one model, and the other models. And more
    of them, for when there is time."""
    first = [("llama3.2-1b", 2048, 4096, option) for option in OPTIONS]
    first += [("llama3.2-1b", 512, 16384, OPTIONS[0]), ("llama3.2-1b", 8192, 16384, OPTIONS[0])]
    first += [("llama3-8b", 2048, 4096, option) for option in OPTIONS[:3]]
    first += [(model, 2048, 4096, OPTIONS[0]) for model in ("qwen2.5-7b", "mistral-7b", "llama3.2-3b", "qwen2.5-1.5b")]
    more = [("llama3.2-1b", length, 16384, option) for length in (512, 2048, 8192) for option in OPTIONS]
    more += [(model, 2048, 4096, option) for model in OTHERS for option in OPTIONS[:3]]
    more += [(model, 8192, 16384, OPTIONS[0]) for model in OTHERS]
    return first, [point for point in more if point not in first]


def cases(tiny: bool) -> list[Case]:
    first, more = ([("tiny", 64, 128, OPTIONS[0])], []) if tiny else grid()
    return [
        Case(
            f"{model}, {length} × {tokens // length}, {option}",
            partial(measure, model, length, tokens, option),
            seconds=guess.seconds(model, tokens, ways.SHORT, length=length, recomputed=option.recomputed),
            turn=Turn.PLAN if number < len(first) else Turn.REST,
        )
        for number, (model, length, tokens, option) in enumerate([*first, *more])
    ]


def measure(model: str, length: int, tokens: int, option: Option, context: Context) -> dict[str, Any]:
    """Peak memory and speed of a few steps, and what was foretold of either."""
    from benchmarks.gpu.planned import planned_tokens_per_s, setup_for
    from finetune.model.hardware import detect
    from finetune.plan.fit import cut_as
    from finetune.plan.memory import training_memory

    device = context.device
    rows = Rows("dense", length, tokens // length, 1, count=max(8, 4 * tokens // length))
    recomputed = round(option.recomputed * SHAPES[model]["num_hidden_layers"])
    config = rows_.config(
        rows,
        context.folder,
        steps=ways.SHORT,
        quantization=option.quantization,
        train={"gradient_checkpointing": recomputed, "offload": option.offload},
        speed=ALL_ON if option.fast else ALL_OFF,
    )
    data = rows_.prepare(rows, context.folder, model, config)
    found, fit = ways.ours(config, data, model, device, context.folder)
    plan = training_memory(cut_as(setup_for(config, data, model, detect()), fit))
    found |= {
        "planned_gb": plan.total / 1e9,
        "planned_tensors_gb": (plan.total - plan.context) / 1e9,
        "parts_gb": {name: size / 1e9 for name, size in plan.as_dict().items()},
        "planned_tokens_per_s": planned_tokens_per_s(config, data, model, detect(), fit),
        "reserved_gb": device.reserved() / 1e9,
        "outside_gb": device.outside() / 1e9,
    }
    return found | errors(found)


def errors(found: dict[str, Any]) -> dict[str, float | None]:
    """Relative errors of the plan; None where nothing was counted or timed, as on a CPU.

    error         of the tensors at their peak, which is what the plan computes
    total_error   of all that the process takes of the card: what torch's allocator holds (pieces that it keeps for
                  later included), context and libraries; against it stands the plan with its allowance for the context
    time_error    of the tokens a second
    """
    taken = found["reserved_gb"] + found["outside_gb"]
    foretold = found["planned_tokens_per_s"]
    return {
        "error": found["planned_tensors_gb"] / found["peak_gb"] - 1 if found["peak_gb"] else None,
        "total_error": found["planned_gb"] / taken - 1 if taken else None,
        "time_error": foretold / found["tokens_per_s"] - 1 if foretold is not None else None,
    }


KINDS = {"error": "tensors", "total_error": "all of the process", "time_error": "tokens a second"}
"""Key of an error → what it is of."""


def table(found: dict[str, dict[str, Any]]) -> str:
    header = ["case", "planned tensors GB", "tensors' peak GB", "error", "planned in all GB", "reserved + outside GB"]
    header += ["error", "planned tokens/s", "tokens/s", "error"]
    rows = [
        [
            name,
            *(one["planned_tensors_gb"], one["peak_gb"], percent(one["error"])),
            *(one["planned_gb"], one["reserved_gb"] + one["outside_gb"], percent(one["total_error"])),
            *(one["planned_tokens_per_s"], one["tokens_per_s"], percent(one["time_error"])),
        ]
        for name, one in found.items()
    ]
    return "\n".join([measuring.table(header, rows), *(_summary(found, key) for key in KINDS)])


def _summary(found: dict[str, dict[str, Any]], key: str) -> str:
    sizes = [one[key] for one in found.values() if one[key] is not None]
    if not sizes:
        return f"{KINDS[key]}: nothing to compare with\n"
    middle = statistics.median(map(abs, sizes))
    worst = f"most over {percent(max(sizes))}, most under {percent(min(sizes))}"
    return f"{KINDS[key]}: {len(sizes)} points, median error {middle:.1%}, {worst}\n"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:+.1%}"
