"""`ft train` as a person runs it, on a base of a billion parameters in real files, beside TRL's own command."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from benchmarks import jobs, measuring
from benchmarks.gpu.case import Case, Context
from benchmarks.jobs import Job, Steps
from benchmarks.measuring import Failed, last_words, run

JOBS: dict[str, Job] = {
    "nf4": Job(steps=20, micro_batch=4, length=2048, packing=True, quantization="nf4", recompute="auto"),
    "16 bit": Job(steps=20, micro_batch=4, length=2048, packing=True, quantization="none", recompute="auto"),
}


def cases(tiny: bool) -> list[Case]:
    pairs: list[tuple[str, Literal["ft", "trl"]]] = [("nf4", "ft"), ("nf4", "trl"), ("16 bit", "ft"), ("16 bit", "trl")]
    return [
        Case(f"{way}, {name}", partial(measure, name, way), seconds=40 if tiny else 180)
        for name, way in (pairs[:1] if tiny else pairs)
    ]


def measure(name: str, way: Literal["ft", "trl"], context: Context) -> dict[str, Any]:
    """The whole process: seconds to the first step and to the end, memory of machine and GPU, the loss."""
    import dataclasses

    tiny = context.device.tiny
    job = dataclasses.replace(JOBS[name], device=context.device.name)
    if tiny:
        job = dataclasses.replace(job, steps=3, micro_batch=2, length=256)
    folder = context.folder
    jobs.write_base(folder / "base", "1m" if tiny else "1b")
    jobs.write_rows(folder)
    ended = run((jobs.ours if way == "ft" else jobs.trl)(job, folder, folder / "base"), folder)
    steps: Steps = (jobs.steps_of_ours if way == "ft" else jobs.steps_of_trl)(ended.lines)
    if ended.code or len(steps.times) < 2:
        raise Failed(
            f"exit code {ended.code}: {jobs.error_of_ours(ended.lines) if way == 'ft' else last_words(folder)}"
        )
    found: dict[str, Any] = {
        "wall_s": ended.wall,
        "first_step_s": steps.times[0],
        "step_s": steps.seconds,
        "peak_ram_mb": ended.peak_mb,
        "losses": steps.losses,
    }
    if way == "ft":
        found["data"] = {
            key: jobs.data_of_ours(ended.lines)[key] for key in ("tokens", "supervised_tokens", "sequences")
        }
        found["said"] = jobs.messages_of_ours(ended.lines)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, one["wall_s"], one["first_step_s"], one["step_s"], one["peak_ram_mb"], one["losses"][-1]]
        for name, one in found.items()
    ]
    return measuring.table(["", "whole process, s", "first step, s", "s a step", "RAM, MB", "last loss"], rows)
