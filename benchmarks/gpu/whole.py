"""`ft train` as a person runs it, on a base of a billion parameters in real files, beside TRL's own command."""

from __future__ import annotations

import statistics
import threading
from functools import partial
from typing import Any, Literal

from benchmarks import jobs, measuring
from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.models import Device
from benchmarks.jobs import Job, Steps
from benchmarks.measuring import Failed, last_words, run

JOBS: dict[str, Job] = {
    "nf4": Job(steps=20, micro_batch=4, length=2048, packing=True, quantization="nf4", recompute="auto"),
    "16 bit": Job(steps=20, micro_batch=4, length=2048, packing=True, quantization="none", recompute="auto"),
}


def cases(tiny: bool) -> list[Case]:
    pairs: list[tuple[str, Literal["ft", "trl"]]] = [("nf4", "ft"), ("nf4", "trl"), ("16 bit", "ft"), ("16 bit", "trl")]
    return [
        Case(f"{way}, {name}", partial(measure, name, way), seconds=40 if tiny else 90, process=f"{way}, {name}")
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
    with Watching(context.device) as gpu:
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
        "peak_gpu_gb": gpu.peak / 1e9,
        "losses": steps.losses,
        "mean_loss": statistics.fmean(steps.losses),
    }
    if way == "ft":
        found["data"] = jobs.amount_of_ours(ended.lines)
        found["said"] = jobs.messages_of_ours(ended.lines)
    # Packs differ, so that steps do: tokens are compared. Ours are counted over all the data, TRL's over its own steps.
    per_step = job.micro_batch * found["data"]["tokens"] / found["data"]["sequences"] if way == "ft" else steps.per_step
    found["tokens_per_s"] = per_step / steps.seconds if per_step is not None else None
    return found


class Watching:
    """How much of the GPU's memory is taken while something runs, beyond what was taken before: looked at ten times a
    second, with the context that the process has there, and whatever its allocator keeps."""

    def __init__(self, device: Device) -> None:
        self.peak = 0
        self._device = device
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._before = self._taken()

    def __enter__(self) -> Watching:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.peak = max(self.peak, self._taken() - self._before)

    def _taken(self) -> int:
        import torch

        if self._device.name == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            *(one["wall_s"], one["first_step_s"], one["tokens_per_s"]),
            *(one["peak_ram_mb"], one["peak_gpu_gb"], one["mean_loss"]),
        ]
        for name, one in found.items()
    ]
    header = ["", "whole process, s", "first step, s", "tokens a second", "RAM, MB", "GPU, GB", "mean loss"]
    return measuring.table(header, rows)
