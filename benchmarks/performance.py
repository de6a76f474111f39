"""docs/performance.md: what was measured, from benchmarks/results; and which targets nobody has measured yet.

    .venv/bin/python -m benchmarks.performance

Every table is made from a result file with a date, a machine and versions; there is no number on the page that is not
in a file. Results of the GPU suite lie in benchmarks/results/gpu/MACHINE/CHUNK.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import train as train_
from benchmarks.gpu.run import CHUNKS
from benchmarks.measuring import RESULTS, ROOT, table

PAGE = ROOT / "docs" / "performance.md"

HEAD = """\
# Performance

Made by `python -m benchmarks.performance` from the files in `benchmarks/results`, and from nothing else. Ratios are of
runs in turn on one machine; below 1 is less. What has no table here was not measured. How merging, quantising and data
preparation were measured is in `benchmarks/LOG.md`.
"""

Cases = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """What there is to show."""

    first_step: dict[str, Any] | None
    train: dict[str, Any] | None
    gpus: dict[str, dict[str, dict[str, Any]]]
    """Machine → chunk → its file."""

    def cases(self, chunk: str) -> Iterator[Cases]:
        """The cases of a chunk that were measured, machine by machine."""
        for chunks in self.gpus.values():
            if chunk in chunks:
                yield {name: one for name, one in chunks[chunk]["cases"].items() if "failed" not in one}


def read(folder: Path) -> Results:
    """All results with a date, a machine and versions. Others, and tiny trials, are none."""
    gpus: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted((folder / "gpu").glob("*/*.json")):
        found = json.loads(path.read_text("utf-8"))
        device = found.get("about", {}).get("device", {})
        if path.stem in CHUNKS and device.get("name") not in (None, "cpu") and not found["about"]["tiny"]:
            gpus.setdefault(path.parent.name, {})[path.stem] = found
    return Results(_dated(folder / "first_step.json"), _dated(folder / "train.json"), gpus)


def _dated(path: Path) -> dict[str, Any] | None:
    found = json.loads(path.read_text("utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) and {"date", "hardware", "versions"} <= set(found) else None


# -- targets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What was measured of a target."""

    text: str
    met: bool


@dataclass(frozen=True)
class Target:
    text: str
    look: Callable[[Results], Finding | None]
    """None where there is no result to tell from."""
    command: str
    """What measures it."""


def _pairs(results: Results, kind: str, way: str, reference: str) -> list[tuple[float, float]]:
    """Speed and peak memory of one way over another's, for each model, and each kind of data that begins so."""
    found = []
    for cases in results.cases("speed"):
        for name, one in cases.items():
            model, data, case = name.split(", ", 2)
            other = cases.get(f"{model}, {data}, {reference}")
            if case == way and data.startswith(kind) and other is not None:
                found.append((one["loss_tokens_per_s"] / other["loss_tokens_per_s"], one["peak_gb"] / other["peak_gb"]))
    return found


def _against(
    kind: str, way: str, reference: str, speed: float, memory: float | None
) -> Callable[[Results], Finding | None]:
    def look(results: Results) -> Finding | None:
        found = _pairs(results, kind, way, reference)
        if not found:
            return None
        slowest, largest = min(one for one, _ in found), max(one for _, one in found)
        text = f"{slowest:.2f}× at {largest:.2f}× the memory, the worst of {len(found)}"
        return Finding(text, slowest >= speed and (memory is None or largest <= memory))

    return look


def _ceiling(results: Results) -> Finding | None:
    shares = [
        one["of_ceiling"] for cases in results.cases("speed") for name, one in cases.items() if "ft all, recomp" in name
    ]
    return Finding(f"{min(shares):.0%}, the worst of {len(shares)}", min(shares) >= 0.75) if shares else None


def _plan(results: Results) -> Finding | None:
    errors = sorted(
        one["error"] for cases in results.cases("plan") for one in cases.values() if one["error"] is not None
    )
    if not errors:
        return None
    sizes = sorted(map(abs, errors))
    middle, worst, under = sizes[len(sizes) // 2], sizes[-1], min(0.0, errors[0])
    text = f"median {middle:.1%}, worst {worst:.1%}, under by {-under:.1%} at most, {len(errors)} points"
    return Finding(text, middle <= 0.05 and worst <= 0.1 and under >= -0.05)


def _cards(results: Results) -> Finding | None:
    found = [(name, one) for cases in results.cases("cards") for name, one in cases.items()]
    if not found:
        return None
    failed = sum("failed" in one for chunks in results.gpus.values() for one in chunks["cards"]["cases"].values())
    tight = sum(bool(one["ran_out"]) or not one["within"] for _, one in found)
    text = f"{len(found)} trained, {tight} of them not at once or with more memory than that; {failed} did not"
    return Finding(text, not tight and not failed)


def _cpu(results: Results) -> Finding | None:
    cases = results.train["cases"] if results.train else []
    ratios = [one["ours / trl"]["wall_s"] for one in cases if one["ours / trl"]["wall_s"] is not None]
    return Finding(f"{max(ratios):.2f}× its time, the worst of {len(ratios)}", max(ratios) <= 1) if ratios else None


def _first(results: Results) -> Finding | None:
    ratio = results.first_step["first_step / bare"] if results.first_step else None
    return None if ratio is None else Finding(f"{ratio:.2f}×", ratio <= 1.1)


def _newcomer(results: Results) -> Finding | None:
    """Sixteen seconds are those of one machine: the comparison counts where the others ran too."""
    ways = results.first_step["ways"] if results.first_step else {}
    others = {name: one["wall_s"] for name, one in ways.items() if name not in ("ft", "bare", "trl")}
    if "ft" not in ways or not others:
        return None
    best = min(others, key=lambda name: others[name])
    ours = ways["ft"]["wall_s"]
    return Finding(f"{ours:.1f} s; the quickest other, {best}, {others[best]:.1f} s", ours <= others[best])


HALF = "ft auto in half of trl's memory"
SPEED = "`benchmarks.gpu.run --chunks speed`"

TARGETS = (
    Target("short chats: ≥ 2.5× TRL's defaults", _against("chats", "ft auto", "trl defaults", 2.5, None), SPEED),
    Target(
        "dense: ≥ 1.6× TRL's defaults at ≤ 0.5× the memory", _against("dense", HALF, "trl defaults", 1.6, 0.5), SPEED
    ),
    Target("≥ 1.25× TRL tuned by hand at ≤ 0.75× the memory", _against("", HALF, "trl tuned", 1.25, 0.75), SPEED),
    Target("≥ 1.05× unsloth at ≤ 1.0× the memory", _against("", HALF, "unsloth", 1.05, 1.0), SPEED),
    Target("≥ 1.05× axolotl with its kernels at ≤ 1.0× the memory", lambda _: None, "no command yet"),
    Target("≥ 75 % of the compute ceiling, everything recomputed", _ceiling, SPEED),
    Target(
        "the plan: median error 5 %, worst 10 %, never under by more than 5 %",
        _plan,
        "benchmarks.gpu.run --chunks plan",
    ),
    Target(
        "`fit: auto` trains in 8, 12, 16 and 24 GB without running out", _cards, "`benchmarks.gpu.run --chunks cards`"
    ),
    Target("CPU: never slower than TRL's command line", _cpu, "`benchmarks.train`"),
    Target("CPU: first step at ≤ 1.1× of importing and loading alone", _first, "`benchmarks.first_step`"),
    Target(
        "the newcomer's job: as quick as the quickest other trainer", _newcomer, "`benchmarks.first_step --other …`"
    ),
)
"""The targets of the work on speed."""


# -- the page -----------------------------------------------------------------------------------------------------


def page(results: Results) -> str:
    found = [(target, target.look(results)) for target in TARGETS]
    parts = [HEAD]
    rows = [[target.text, one.text, "yes" if one.met else "no"] for target, one in found if one is not None]
    if rows:
        parts.append("## Targets\n\n" + table(["target", "measured", "met"], rows))
    parts += _cpu_tables(results)
    for machine, chunks in results.gpus.items():
        parts.append(f"## {machine}\n")
        for name, chunk in CHUNKS.items():
            if name in chunks:
                good = {case: one for case, one in chunks[name]["cases"].items() if "failed" not in one}
                failed = len(chunks[name]["cases"]) - len(good)
                text = chunk.table(good) if good else ""
                more = f"\n{failed} cases failed: see the file.\n" if failed else ""
                parts.append(f"### {name}\n\n{_about(chunks[name]['about'])}\n\n{text}{more}")
    missing = [f"- {target.text} ({target.command})" for target, one in found if one is None]
    if missing:
        parts.append("## Not measured\n\nNothing is known of these yet:\n\n" + "\n".join(missing) + "\n")
    return "\n".join(parts)


def _cpu_tables(results: Results) -> Iterator[str]:
    if (first := results.first_step) is not None:
        rows = [
            [name, one["wall_s"], one.get("first_step_s"), one["cpu_s"], one["peak_mb"]]
            for name, one in first["ways"].items()
        ]
        yield (
            "## A newcomer's first run\n\n20 steps of LoRA on a tiny Llama, 2,000 chat rows, CPU, whole processes. "
            f"`bare` only imports and loads. {_about(first)}\n\n"
            + table(["", "whole process, s", "first step, s", "CPU, s", "peak MB"], rows)
        )
    if (train := results.train) is not None:
        yield (
            "## Training on a CPU\n\nA random Llama of 25 million parameters against TRL's own command line, the same "
            f"work for both. {_about(train)}\n\n{train_.summary(train['cases'])}"
        )


def _about(found: Mapping[str, Any]) -> str:
    hardware, versions = found["hardware"], found["versions"]
    device = found.get("device", {})
    machine = f"{device['name']}, {device['memory_gb']:.0f} GB, CUDA {device['cuda']}; " if "cuda" in device else ""
    machine += f"{hardware['cores']} cores of {hardware['processor']}, load {hardware['load']}"
    return f"{found['date']}, {machine}; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def main() -> None:
    PAGE.write_text(page(read(RESULTS)), "utf-8")


if __name__ == "__main__":
    main()
