"""How long a newcomer waits: from typing `ft train` to the first step, and to the end, of a small job.

    .venv/bin/python -m benchmarks.first_step --rounds 5
    .venv/bin/python -m benchmarks.first_step --other litgpt="litgpt finetune_lora {base} --data JSON …"

The job: 20 steps of LoRA on the shipped tiny Llama, 2,000 chat rows of about 60 tokens, CPU. In turn with it:

    bare      a script that does only what no trainer can avoid: import torch, transformers, PEFT and TRL's trainer,
              load model and tokenizer, put the adapter on. The first step is measured against its whole process.
    trl       TRL's own command line on the same rows, with the same batch and adapter, as it starts by itself: with one
              thread, which is what accelerate's launcher gives it
    NAME      any other command, given with --other; {folder}, {base}, {rows} and {trl} are filled in (a fresh folder,
              the model, messages as JSON Lines, and a folder with prompts and completions)

Prints medians of whole processes and of their ratios round by round; writes benchmarks/results/first_step.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import jobs
from benchmarks.jobs import Job
from benchmarks.measuring import RESULTS, Ended, Failed, about, in_turn, last_words, medians, ratio, run, table, write

JOB = Job(steps=20, micro_batch=4, length=256)

BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
"""


def ft(folder: Path) -> dict[str, float]:
    ended = run(jobs.ours(JOB, folder, jobs.TINY), folder)
    steps = jobs.steps_of_ours(ended.lines)
    if ended.code or not steps.times:
        raise Failed(jobs.error_of_ours(ended.lines) or last_words(folder))
    return _costs(ended) | {"first_step_s": steps.times[0]}


def bare(folder: Path) -> dict[str, float]:
    return _costs(_must(run([sys.executable, "-c", BARE, str(jobs.TINY)], folder), folder))


def trl(folder: Path) -> dict[str, float]:
    ended = _must(run(jobs.trl(JOB, folder, jobs.TINY), folder), folder)
    steps = jobs.steps_of_trl(ended.lines)
    return _costs(ended) | ({"first_step_s": steps.times[0]} if steps.times else {})


def other(command: str, folder: Path) -> dict[str, float]:
    places = {"folder": folder, "base": jobs.TINY, "rows": folder / "rows.jsonl", "trl": folder / "trl"}
    for name, place in places.items():
        command = command.replace("{" + name + "}", str(place))
    return _costs(_must(run(shlex.split(command), folder), folder))


def _costs(ended: Ended) -> dict[str, float]:
    return {"wall_s": ended.wall, "cpu_s": ended.cpu, "peak_mb": ended.peak_mb}


def _must(ended: Ended, folder: Path) -> Ended:
    if ended.code:
        raise Failed(f"exit code {ended.code}: {last_words(folder)}")
    return ended


def in_fresh_folder(way: Callable[[Path], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """A way that finds nothing of what an earlier run of it left."""

    def once() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            jobs.write_rows(Path(folder))
            return way(Path(folder))

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--quick", action="store_true", help="one round, none before it; nothing is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_step.json")
    chosen = parser.parse_args()
    ways: dict[str, Callable[[Path], dict[str, float]]] = {"ft": ft, "bare": bare, "trl": trl}
    for text in chosen.other:
        name, _, command = text.partition("=")
        if not command:
            parser.error(f"--other {text}: write NAME=COMMAND")
        ways[name] = partial(other, command)
    fresh = {name: in_fresh_folder(way) for name, way in ways.items()}
    if not chosen.quick:
        in_turn(fresh, 1)
    rounds, failed = in_turn(fresh, 1 if chosen.quick else chosen.rounds)
    result: dict[str, Any] = {**about(), "job": dataclasses.asdict(JOB), "rounds": len(rounds), "failed": failed}
    result["ways"] = {name: medians(rounds, name) for name in ways if name not in failed}
    firsts = [one["ft"]["first_step_s"] / one["bare"]["wall_s"] for one in rounds if "ft" in one and "bare" in one]
    result["first_step / bare"] = statistics.median(firsts) if firsts else None
    result["wall of ft / others"] = {
        name: ratio(rounds, "ft", name, "wall_s") for name in ways if name not in ("ft", "bare")
    }
    header = ["", "whole process, s", "first step, s", "CPU, s", "peak MB"]
    print(
        table(
            header,
            [
                [name, one.get("wall_s"), one.get("first_step_s"), one.get("cpu_s"), one.get("peak_mb")]
                for name, one in result["ways"].items()
            ],
        )
    )
    print(f"first step / bare: {result['first_step / bare']}")
    for name, over in result["wall of ft / others"].items():
        print(f"whole process of ft / {name}: {over}")
    if not chosen.quick:
        write(result, chosen.out)
    if failed:
        raise SystemExit("\n".join(f"{name} failed: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    main()
