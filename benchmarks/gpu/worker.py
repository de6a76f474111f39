"""The process that measures: named cases of one chunk, each written down when it is done."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.chunks import CHUNKS
from benchmarks.gpu.models import Device
from benchmarks.measuring import Failed, about, write

RESTART = 75
"""What it ends with when it had better begin again: memory is left behind, or the GPU answers no more."""

NO_GPU = 69
"""What it ends with where there is nothing to measure on."""

LEFT_BEHIND = 128 * 2**20
"""Bytes on the GPU after a case that make the next one's peak wrong."""


def read(path: Path) -> dict[str, Any]:
    """A chunk's results so far."""
    if not path.exists():
        return {"cases": {}}
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def work(chunk: str, names: Sequence[str], device: Device, out: Path, until: float) -> int:
    """Measure the named cases, as far as there is time before `until`."""
    import torch

    if device.name == "cuda" and not torch.cuda.is_available():
        return NO_GPU
    path, running = out / f"{chunk}.json", out / f"{chunk}.running"
    cases = {case.name: case for case in CHUNKS[chunk].cases(device.tiny)}
    for number, name in enumerate(names):
        # The first was begun by the one that waits; what it has imported meanwhile is in its guess.
        if number and time.time() + cases[name].seconds > until:
            return 0
        if time.time() > until:
            return 0
        running.write_text(name, "utf-8")
        known = read(path)
        began = time.monotonic()
        done = {case: found for case, found in known["cases"].items() if "failed" not in found}
        with tempfile.TemporaryDirectory() as folder:
            found = _measure(cases[name], Context(device, Path(folder), done))
        found["seconds"] = time.monotonic() - began
        # Of this case: another call may have found other wheels.
        here = about()
        found["versions"] = here["versions"]
        known["cases"][name] = found
        known["about"] = here | {"device": _device(device), "tiny": device.tiny}
        write(known, path)
        running.unlink()
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
