"""Measure everything that needs a GPU, in pieces, on a machine that reaches no registry.

    python -m benchmarks.gpu.run --list                              what would be measured, in which order, how long
    python -m benchmarks.gpu.run --out results                       as much as 8.5 minutes allow
    python -m benchmarks.gpu.run --out results                       … and on from there
    python -m benchmarks.gpu.run --out results --chunks speed        only the chunks that are named
    python -m benchmarks.gpu.run --out results --device cpu --tiny   does everything run? The numbers mean nothing.

What the machine lacks comes from the folder that `benchmarks/gpu/pack.py` filled:
`python -m pip install --no-index --no-deps --target site wheels/*.whl` and `PYTHONPATH=site`.

What matters most is measured first, whatever chunk it is of (`case.Turn`), so that what a short loan of a machine cuts
off is the least important. Chunks: correct, tests, speed, plan, cards, whole. Each leaves `CHUNK.json`, written anew
after every case; the next call (with those files in --out) does what is still missing. A case that fails is recorded
with its reason and not tried again, unless --retry says so; one that a call's end cut off is tried once more. What
needs a package that is not here is passed over, and measured by a later call that has it. `table.md` has what there is.

Ends with 1, and the list of them last, where a case failed or a way turned out not to compute the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu.case import Turn
from benchmarks.gpu.chunks import CHUNKS, Waiting, apart, batch, in_order, pace
from benchmarks.gpu.models import Device
from benchmarks.gpu.worker import NO_GPU, read, work
from benchmarks.measuring import ROOT, table, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--list", action="store_true", help="print the order and the guessed minutes; measure nothing")
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
    order = in_order(chosen.chunks, chosen.only, tiny=chosen.tiny)
    if chosen.list:
        print(listing(order))
        return
    if chosen.out is None:
        parser.error("--out FOLDER is where the results go")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.retry:
        forget_failures(chosen.out, chosen.chunks)
    left = measure(order, device, chosen.out.absolute(), time.time() + 60 * chosen.minutes)
    print(page(chosen.out))
    print(f"{len(left)} cases are still to be measured" if left else "everything is measured")
    if wrong := list(faults(chosen.out)):
        raise SystemExit("\n".join([f"{len(wrong)} cases failed or are not as they should be:", *wrong]))


def listing(order: Sequence[Waiting]) -> str:
    """The order, with the guessed minutes of each case and of all up to it."""
    rows: list[list[object]] = []
    minutes = 0.0
    for number, one in enumerate(order, 1):
        minutes += one.case.seconds / 60
        turn = Turn(one.case.turn).name.lower()
        rows.append([number, turn, one.chunk, one.case.name, f"{one.case.seconds / 60:.1f}", f"{minutes:.1f}"])
    return table(["", "turn", "chunk", "case", "minutes, guessed", "up to here"], rows)


# -- the process that waits ---------------------------------------------------------------------------------------


def forget_failures(out: Path, chunks: Collection[str]) -> None:
    for name in chunks:
        result = read(out / f"{name}.json")
        result["cases"] = {case: found for case, found in result["cases"].items() if "failed" not in found}
        result["cut_off"] = []
        write(result, out / f"{name}.json")


def measure(order: Sequence[Waiting], device: Device, out: Path, until: float) -> list[Waiting]:
    """Have what is not known yet measured, the most important first. Says what is left."""
    given_up: set[str] = set()  # not begun, or cut off, in this call
    while True:
        known = {name: read(out / f"{name}.json")["cases"] for name in CHUNKS}
        waiting = [one for one in order if one.case.name not in known[one.chunk]]
        factor = pace(known, order)
        ready = [one for one in waiting if _key(one) not in given_up]
        chosen = batch(ready, until - time.time(), factor)
        (out / "table.md").write_text(page(out), "utf-8")
        if not chosen:
            return waiting
        begun = _one_worker(chosen, device, out, until)
        if not begun:
            given_up.add(_key(chosen[0]))


def _key(one: Waiting) -> str:
    return f"{one.chunk}: {one.case.name}"


def _one_worker(chosen: Sequence[Waiting], device: Device, out: Path, until: float) -> bool:
    """One process for some cases of one chunk. Says whether the chunk's results grew by at least one case.

    A case that was begun and has no result has failed; one that was never begun has not. Where a process cannot even
    begin, the first of its cases bears that, so that it is not tried for ever.
    """
    chunk, names = chosen[0].chunk, [one.case.name for one in chosen]
    path, running = out / f"{chunk}.json", out / f"{chunk}.running"
    running.unlink(missing_ok=True)  # of a call that was killed itself
    before = len(read(path)["cases"])
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--worker", chunk, "--out", str(out), "--until", str(until)]
    command += ["--device", device.name, *(["--tiny"] if device.tiny else []), "--names", *names]
    code, said = _wait_for(command, until)
    if code == NO_GPU:
        raise SystemExit("there is no CUDA GPU here; to see whether everything runs: --device cpu --tiny")
    known = read(path)
    begun = running.read_text("utf-8") if running.exists() else None
    running.unlink(missing_ok=True)
    if begun is not None and begun not in known["cases"]:
        cut_off = known.setdefault("cut_off", [])
        if code is None and begun not in cut_off:
            cut_off.append(begun)
            print(f"{chunk}: {begun} was cut off by the end of this call", flush=True)
        else:
            why = "took longer than a call may, twice" if code is None else f"its process ended with {code}: {said}"
            known["cases"][begun] = {"failed": why}
            print(f"{chunk}: {begun} failed: {why[:200]}", flush=True)
        write(known, path)
    elif code and len(known["cases"]) == before:
        known["cases"][names[0]] = {"failed": f"its process ended with {code} before it began: {said}"}
        write(known, path)
        print(f"{chunk}: {names[0]} failed: its process ended with {code}", flush=True)
    return len(known["cases"]) > before


def _wait_for(command: Sequence[str], until: float) -> tuple[int | None, str]:
    """The exit code of a process (None if it had to be ended), and the end of what it wrote to stderr."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    with tempfile.TemporaryFile() as errors:
        # A group of its own: what it has started ends with it, and leaves the GPU to the next.
        child = subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True)
        code: int | None
        try:
            # A little longer than the worker itself knows of, so that it ends by itself if it can.
            code = child.wait(timeout=max(1.0, until - time.time() + 10))
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
        errors.seek(0)
        return code, errors.read().decode("utf-8", "replace").strip()[-1500:]


# -- what is said -------------------------------------------------------------------------------------------------


def page(out: Path) -> str:
    """Every chunk that has results, as Markdown."""
    parts = []
    for name, chunk in CHUNKS.items():
        good, failed = apart(read(out / f"{name}.json")["cases"])
        if good or failed:
            lines = [f"## {name}\n", chunk.table(good) if good else "nothing could be measured\n"]
            parts.append("\n".join([*lines, *(f"- {case} failed: {why}" for case, why in failed.items())]))
    return "\n".join(parts)


def faults(out: Path) -> Iterator[str]:
    """Every case that failed, and every one whose result is not as it should be."""
    for name, chunk in CHUNKS.items():
        good, failed = apart(read(out / f"{name}.json")["cases"])
        yield from (f"{name}: {case} failed: {why}" for case, why in failed.items())
        yield from (f"{name}: {case}: {why}" for case, found in good.items() if (why := chunk.wrong(found)))


if __name__ == "__main__":
    main()
