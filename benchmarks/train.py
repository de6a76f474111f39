"""How fast training is on a CPU: `ft train` against TRL's own command line, on the same work.

    .venv/bin/python -m benchmarks.train --rounds 3
    .venv/bin/python -m benchmarks.train --quick          does everything run?

A random Llama of 25 million parameters, 2,000 chat rows, LoRA of rank 16 on all linear layers, in float32; base plain
and in nf4, padded and packed, with and without recomputation. Whole processes in alternating order; ratios are medians
of the rounds. Both print a line a step: seconds a step are those between the first line and the last.

What differs, and cannot be made the same from outside: the order of the rows and the adapter's first values, so that
losses are compared by their mean over all steps; TRL keeps an nf4 model's adapter in bfloat16, we in float32. Tokens
with loss are counted once, for both: those of the data as ft prepares it, a sequence on average. (TRL says what its own
steps had; that is kept, but it also counts the line feed after each answer, and hangs on which rows came first.)

ft has no bfloat16 on a CPU: it computes in float32 there (model/hardware.py). So the case in bfloat16 is no equal work:
it sets ft as it is beside TRL as its users might run it to save memory.
Writes benchmarks/results/train.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import jobs
from benchmarks.jobs import Job, Steps
from benchmarks.measuring import RESULTS, Ended, Failed, about, in_turn, last_words, medians, ratio, run, table, write

CASES: dict[str, Job] = {
    "float32, padded": Job(steps=20, micro_batch=8, length=256),
    "float32, packed": Job(steps=20, micro_batch=2, length=512, packing=True),
    "float32, padded, recomputed": Job(steps=20, micro_batch=8, length=256, recompute=True),
    "TRL in bfloat16, ft in float32, padded": Job(steps=20, micro_batch=8, length=256, trl_bfloat16=True),
    "nf4, padded": Job(steps=20, micro_batch=8, length=256, quantization="nf4"),
    "nf4, packed": Job(steps=20, micro_batch=2, length=512, packing=True, quantization="nf4"),
}

QUICK_STEPS = 3

THREADS = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
"""For both alike: TRL's command line goes through accelerate's launcher, which gives torch one thread where nothing is
said, and would lose by that alone."""


class Measured:
    """One case: both ways, and what their steps said."""

    def __init__(self, job: Job, folder: Path, base: Path) -> None:
        self._job, self._folder, self._base = job, folder, base
        self.losses: dict[str, list[float]] = {}
        self.tokens_per_step: dict[str, float | None] = {}
        """As each trainer counts them."""
        self._with_loss: float | None = None
        """Tokens with loss in an average step, for both."""

    def ours(self) -> dict[str, float]:
        ended = run(jobs.ours(self._job, self._folder, self._base), self._folder, THREADS)
        steps = self._steps("ours", jobs.steps_of_ours(ended.lines), ended.code, jobs.error_of_ours(ended.lines))
        data = jobs.amount_of_ours(ended.lines)
        self._with_loss = self._job.micro_batch * data["supervised_tokens"] / data["sequences"]
        self.tokens_per_step["ours"] = self._job.micro_batch * data["tokens"] / data["sequences"]
        return self._numbers(ended, steps)

    def trl(self) -> dict[str, float]:
        ended = run(jobs.trl(self._job, self._folder, self._base), self._folder, THREADS)
        steps = self._steps("trl", jobs.steps_of_trl(ended.lines), ended.code)
        self.tokens_per_step["trl"] = steps.per_step
        return self._numbers(ended, steps)

    def _steps(self, name: str, steps: Steps, code: int, why: str = "") -> Steps:
        if code or len(steps.losses) < 2:
            raise Failed(f"exit code {code}, {len(steps.losses)} steps: {why or last_words(self._folder)}")
        self.losses[name] = steps.losses
        return steps

    def _numbers(self, ended: Ended, steps: Steps) -> dict[str, float]:
        if self._with_loss is None:
            raise Failed("ft has not run, which counts the tokens for both")
        return {
            "wall_s": ended.wall,
            "cpu_s": ended.cpu,
            "peak_mb": ended.peak_mb,
            "first_step_s": steps.times[0],
            "step_s": steps.seconds,
            "loss_tokens_per_s": self._with_loss / steps.seconds,
        }


def measure(name: str, job: Job, rounds: int, shape: str) -> dict[str, Any]:
    """All rounds of one case."""
    print(f"-- {name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        jobs.write_base(folder / "base", shape)
        jobs.write_rows(folder)
        case = Measured(job, folder, folder / "base")
        measured, failed = in_turn({"ours": case.ours, "trl": case.trl}, rounds)
    result: dict[str, Any] = {"case": name, "shape": shape, "steps": job.steps, "rounds": rounds, "failed": failed}
    for way in ("ours", "trl"):
        result[way] = medians(measured, way)
    result["ours / trl"] = {
        key: ratio(measured, "ours", "trl", key) for key in ("wall_s", "step_s", "loss_tokens_per_s", "peak_mb")
    }
    result["tokens_per_step"] = case.tokens_per_step
    result["losses"] = case.losses
    result["mean_loss"] = {way: statistics.fmean(losses) for way, losses in case.losses.items()}
    return result


def summary(results: list[dict[str, Any]]) -> str:
    rows = []
    for one in results:
        ours, trl, over = one["ours"], one["trl"], one["ours / trl"]
        losses = (one["mean_loss"].get("ours"), one["mean_loss"].get("trl"))
        ratios = (over["wall_s"], over["loss_tokens_per_s"], over["peak_mb"])
        rows.append([one["case"], ours.get("step_s"), trl.get("step_s"), *ratios, *losses])
    header = ["case", "s a step", "TRL's", "wall / TRL's", "tokens with loss a second / TRL's", "peak memory / TRL's"]
    return table([*header, "mean loss", "TRL's"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="a tiny model, three steps, one round; nothing is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "train.json")
    chosen = parser.parse_args()
    results = []
    for name in chosen.cases:
        job, rounds, shape = CASES[name], chosen.rounds, "25m"
        if chosen.quick:
            job, rounds, shape = _shortened(job), 1, "1m"
        results.append(measure(name, job, rounds, shape))
        if not chosen.quick:
            write({**about(), "cases": results}, chosen.out)
    print(summary(results))
    if any(one["failed"] for one in results):
        raise SystemExit("some could not be measured: see above")


def _shortened(job: Job) -> Job:
    import dataclasses

    return dataclasses.replace(job, steps=QUICK_STEPS)


if __name__ == "__main__":
    main()
