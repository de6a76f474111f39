"""What the benchmarks share: processes in turn, what they cost, what they ran on, and a result with a date.

The process that measures loads no library: a child's peak memory begins with what its parent holds.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "liger-kernel", "unsloth")
"""Whose versions are part of a result."""


@dataclass(frozen=True)
class Line:
    """A line that a process printed, and when: seconds after its start."""

    at: float
    text: str


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    wall: float
    """Seconds from before its start to after its end."""
    cpu: float
    """CPU seconds, its children's included."""
    peak_mb: float
    """The most memory that it, or one of its children, held (`ru_maxrss`), in MB of 2^20 bytes."""
    lines: list[Line]
    """What it wrote to stdout."""


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a process in a folder and wait for it. What it says on stderr is kept in `stderr.txt` there.

    Its output arrives line by line, so that the time of a line is that of what it says.
    """
    settings = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment = os.environ | settings | {"PYTHONPATH": _python_path()} | dict(environment or {})
    lines: list[Line] = []
    with open(folder / "stderr.txt", "wb") as errors:
        began = time.monotonic()
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdout is not None
        for text in child.stdout:
            lines.append(Line(time.monotonic() - began, text.rstrip("\n")))
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        child.stdout.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1024 if sys.platform == "darwin" else 1
    peak = usage.ru_maxrss / 1024 / unit
    return Ended(child.returncode, wall, usage.ru_utime + usage.ru_stime, peak, lines)


def last_words(folder: Path) -> str:
    """The end of what the last process in a folder wrote to stderr."""
    return (folder / "stderr.txt").read_text("utf-8", "replace").strip()[-2000:]


def in_turn(
    ways: Mapping[str, Callable[[], dict[str, float]]], rounds: int
) -> tuple[list[dict[str, dict[str, float]]], dict[str, str]]:
    """Run each way once a round, in alternating order, and say what each measured, and of which failed, why.

    A way that fails is left out of the rounds after it. `ratio` takes the rounds that have both of its ways.
    """
    measured: list[dict[str, dict[str, float]]] = []
    failed: dict[str, str] = {}
    for number in range(rounds):
        names = [name for name in ways if name not in failed]
        found = {}
        for name in names if number % 2 == 0 else names[::-1]:
            try:
                found[name] = ways[name]()
                print(name, {key: round(value, 3) for key, value in found[name].items()}, file=sys.stderr, flush=True)
            except Failed as error:
                failed[name] = str(error)
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
        measured.append(found)
    return measured, failed


class Failed(Exception):
    """A way that cannot be measured here; the message says why."""


def medians(rounds: Sequence[Mapping[str, Mapping[str, float]]], name: str) -> dict[str, float]:
    """The median of everything that one way measured."""
    own = [measured[name] for measured in rounds if name in measured]
    return {key: statistics.median(values[key] for values in own) for key in own[0]} if own else {}


def ratio(rounds: Sequence[Mapping[str, Mapping[str, float]]], one: str, other: str, key: str) -> float | None:
    """The median of one way's number over another's, round by round. None where they never ran in one round."""
    ratios = [measured[one][key] / measured[other][key] for measured in rounds if one in measured and other in measured]
    return statistics.median(ratios) if ratios else None


def about() -> dict[str, Any]:
    """Date, machine and versions. The GPU is added by whoever has loaded torch."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "load": round(os.getloadavg()[1], 1),
        },
        "versions": versions,
    }


def write(result: Mapping[str, Any], path: Path) -> None:
    """A result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(rounded(result), indent=2) + "\n", "utf-8")
    partial.replace(path)


def rounded(value: Any) -> Any:
    """Numbers to four digits: more would only be noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(one) for one in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    """A number as a person reads it; a dash for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")


def _python_path() -> str:
    """This project, and whatever the path has already: wheels that were unpacked into a folder, for instance."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
