"""Measure everything that needs a GPU, in pieces, on a machine that reaches no registry.

    python -m benchmarks.gpu.run --out results                       as much as 8.5 minutes allow
    python -m benchmarks.gpu.run --out results                       … and on from there
    python -m benchmarks.gpu.run --out results --chunks speed        only the chunks that are named
    python -m benchmarks.gpu.run --out results --device cpu --tiny   does everything run? The numbers mean nothing.

What the machine lacks comes from the folder that `benchmarks/gpu/pack.py` filled:
`python -m pip install --no-index --no-deps --target site wheels/*.whl` and `PYTHONPATH=site`.

Chunks: correct, tests, speed, plan, cards, whole. Each leaves `CHUNK.json`, written anew after every case, so that
nothing is lost where a call is cut off; the next call (with those files in --out) does what is still missing. A case
that fails is recorded with its reason and not tried again, unless --retry says so. `table.md` has what there is so far.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import cards, correct, plan_error, product_tests, speed, whole
from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.models import Device
from benchmarks.measuring import ROOT, Failed, about, write

RESTART = 75
"""What a worker ends with when it had better begin again: memory is left behind, or the GPU answers no more."""

NO_GPU = 69
"""What it ends with where there is nothing to measure on."""

LEFT_BEHIND = 200 * 2**20
"""Bytes on the GPU after a case that make the next one's peak wrong."""


@dataclass(frozen=True)
class Chunk:
    cases: Callable[[bool], list[Case]]
    """Its cases; the argument says whether they are to be tiny."""
    table: Callable[[dict[str, dict[str, Any]]], str]
    """Its results as a page part."""
    fresh: bool = False
    """Whether every case has a process of its own: other trainers change the libraries they use for good."""


CHUNKS: dict[str, Chunk] = {
    "correct": Chunk(correct.cases, correct.table),
    "tests": Chunk(product_tests.cases, product_tests.table),
    "speed": Chunk(speed.cases, speed.table, fresh=True),
    "plan": Chunk(plan_error.cases, plan_error.table),
    "cards": Chunk(cards.cases, cards.table, fresh=True),
    "whole": Chunk(whole.cases, whole.table, fresh=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chunks", nargs="+", choices=CHUNKS, default=list(CHUNKS))
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--minutes", type=float, default=8.5, help="no longer than this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--worker", metavar="CHUNK", choices=CHUNKS, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    device = Device(chosen.device, chosen.tiny)
    if chosen.worker:
        raise SystemExit(work(chosen.worker, chosen.names, device, chosen.out, chosen.until))
    chosen.out.mkdir(parents=True, exist_ok=True)
    until = time.time() + 60 * chosen.minutes
    left = 0
    for name in chosen.chunks:
        left += run_chunk(name, chosen.only, device, chosen.out.absolute(), until, retry=chosen.retry)
        (chosen.out / "table.md").write_text(page(chosen.out), "utf-8")
    print(page(chosen.out))
    print(f"{left} cases are still to be measured" if left else "everything is measured")


# -- the process that waits ---------------------------------------------------------------------------------------


def run_chunk(name: str, only: str, device: Device, out: Path, until: float, *, retry: bool = False) -> int:
    """Have the cases of a chunk measured that are not yet. Says how many are left."""
    chunk = CHUNKS[name]
    path = out / f"{name}.json"
    if retry:
        result = read(path)
        result["cases"] = {case: found for case, found in result["cases"].items() if "failed" not in found}
        write(result, path)
    while True:
        known = read(path)["cases"]
        waiting = [case for case in chunk.cases(device.tiny) if only in case.name and case.name not in known]
        fitting = [case.name for case in waiting if time.time() + case.seconds < until]
        if not fitting:
            return len(waiting)
        _one_worker(name, fitting[:1] if chunk.fresh else fitting, device, out, until)


def _one_worker(chunk: str, names: Sequence[str], device: Device, out: Path, until: float) -> None:
    """One process for some cases. Whatever becomes of it, the result file has one case more afterwards."""
    path, running = out / f"{chunk}.json", out / f"{chunk}.running"
    before = set(read(path)["cases"])
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--worker", chunk, "--out", str(out), "--until", str(until)]
    command += ["--device", device.name, *(["--tiny"] if device.tiny else []), "--names", *names]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    why = ""
    with tempfile.TemporaryFile() as errors:
        try:
            # A little longer than the worker itself knows of, so that it ends by itself if it can.
            done = subprocess.run(
                command, env=environment, stderr=errors, timeout=until - time.time() + 10, check=False
            )
            why = f"its process ended with {done.returncode}"
            if done.returncode == NO_GPU:
                raise SystemExit("there is no CUDA GPU here; to see whether everything runs: --device cpu --tiny")
        except subprocess.TimeoutExpired:
            why = "it took longer than one call may"
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip()
    known = read(path)
    if set(known["cases"]) == before:
        name = running.read_text("utf-8") if running.exists() else names[0]
        known["cases"][name] = {"failed": f"{why}: {said[-1500:]}"}
        write(known, path)
        print(f"{chunk}: {name} failed: {why}", flush=True)
    running.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """A chunk's results so far."""
    if not path.exists():
        return {"cases": {}}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def page(out: Path) -> str:
    """Every chunk that has results, as Markdown."""
    parts = []
    for name, chunk in CHUNKS.items():
        cases = read(out / f"{name}.json")["cases"]
        if not cases:
            continue
        good = {case: found for case, found in cases.items() if "failed" not in found}
        lines = [f"## {name}\n", chunk.table(good) if good else "nothing could be measured\n"]
        lines += [
            f"- {case} failed: {found['failed'].strip().splitlines()[-1][:300]}"
            for case, found in cases.items()
            if "failed" in found
        ]
        parts.append("\n".join(lines))
    return "\n".join(parts)


# -- the process that measures ------------------------------------------------------------------------------------


def work(chunk: str, names: Sequence[str], device: Device, out: Path, until: float) -> int:
    """Measure the named cases, and write each down when it is done."""
    import torch

    if device.name == "cuda" and not torch.cuda.is_available():
        return NO_GPU
    path, running = out / f"{chunk}.json", out / f"{chunk}.running"
    cases = {case.name: case for case in CHUNKS[chunk].cases(device.tiny)}
    for name in names:
        if time.time() + cases[name].seconds > until:
            return 0
        running.write_text(name, "utf-8")
        known = read(path)
        began = time.monotonic()
        done = {case: found for case, found in known["cases"].items() if "failed" not in found}
        with tempfile.TemporaryDirectory() as folder:
            found = _measure(cases[name], Context(device, Path(folder), done))
        found["seconds"] = time.monotonic() - began
        known["cases"][name] = found
        known["about"] = about() | {"device": _device(device), "tiny": device.tiny}
        write(known, path)
        print(f"{chunk}: {name} {'failed' if 'failed' in found else 'done'} in {found['seconds']:.0f} s", flush=True)
        if _unclean(device):
            return RESTART
    return 0


def _measure(case: Case, context: Context) -> dict[str, Any]:
    try:
        return case.measure(context)
    except Failed as error:
        return {"failed": str(error)}
    except Exception:
        return {"failed": traceback.format_exc()[-3000:]}


def _unclean(device: Device) -> bool:
    """Whether the next case would find memory taken, or a GPU that reports an old error for ever."""
    import torch

    if device.name == "cpu":
        return False
    with contextlib.suppress(RuntimeError):
        device.clear()
        return bool(torch.cuda.memory_allocated() > LEFT_BEHIND)
    return True


def _device(device: Device) -> dict[str, Any]:
    import torch

    if device.name == "cpu":
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    main()
