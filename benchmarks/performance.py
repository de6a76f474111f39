"""docs/performance.md: what was measured, from benchmarks/results; and which targets nobody has measured yet.

    .venv/bin/python -m benchmarks.performance

Every table is made from a result file with a date, a machine and versions; there is no number on the page that is not
in a file. Results of the GPU suite lie in benchmarks/results/gpu/MACHINE/CHUNK.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import train as train_
from benchmarks.gpu.chunks import CHUNKS, apart
from benchmarks.measuring import RESULTS, ROOT, cell, table
from benchmarks.targets import TARGETS, Results

PAGE = ROOT / "docs" / "performance.md"

HEAD = """\
# Performance

Made by `python -m benchmarks.performance` from the files in `benchmarks/results`, and from nothing else. Ratios are of
runs on one machine, ours over theirs. What has no table here was not measured. How merging, quantising and data
preparation were measured is in `benchmarks/LOG.md`.
"""

ONE_RUN = """\
A case is one run in one process; beside the median step stand the shortest and the longest. What was run again at
another time says how far two runs are apart.
"""


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


# -- the page -----------------------------------------------------------------------------------------------------


def page(results: Results) -> str:
    found = [(target, target.look(results)) for target in TARGETS]
    parts = [HEAD]
    rows = [[target.text, one.text, _met(one.met)] for target, one in found if one is not None]
    if rows:
        parts.append("## Targets\n\n" + table(["target", "measured", "met"], rows))
    parts += _cpu_tables(results)
    for machine, chunks in results.gpus.items():
        parts.append(f"## {machine}\n\n{ONE_RUN}")
        for name, chunk in CHUNKS.items():
            if name in chunks:
                good, failed = apart(chunks[name]["cases"])
                text = chunk.table(good) if good else ""
                wrong = [f"- {case} failed: {cell(why)}" for case, why in failed.items()]
                more = f"\n{len(failed)} failed:\n\n" + "\n".join(wrong) + "\n" if failed else ""
                parts.append(f"### {name}\n\n{_about(chunks[name])}\n\n{text}{more}")
    missing = [f"- {target.text} ({target.command})" for target, one in found if one is None]
    if missing:
        parts.append("## Not measured\n\nNothing is known of these yet:\n\n" + "\n".join(missing) + "\n")
    return "\n".join(parts)


def _met(met: bool | None) -> str:
    return "–" if met is None else "yes" if met else "no"


def _cpu_tables(results: Results) -> Iterator[str]:
    if (first := results.first_step) is not None:
        rows = [
            [name, one["wall_s"], one.get("first_step_s"), one["cpu_s"], one["peak_mb"]]
            for name, one in first["ways"].items()
        ]
        failed = "".join(f"\n{name} failed: {cell(why)}\n" for name, why in first.get("failed", {}).items())
        yield (
            "## A newcomer's first run\n\n20 steps of LoRA on a tiny Llama, 2,000 chat rows, CPU, whole processes in "
            f"turn, medians. `bare` only imports and loads. {_about({'about': first})}\n\n"
            + table(["", "whole process, s", "first step, s", "CPU, s", "peak MB"], rows)
            + failed
        )
    if (train := results.train) is not None:
        yield (
            "## Training on a CPU\n\nA random Llama of 25 million parameters against TRL's own command line, the same "
            "work for both where the case does not say otherwise; whole processes in turn, medians of the rounds' "
            f"ratios. {_about({'about': train})}\n\n{train_.summary(train['cases'])}"
        )


def _about(file: Mapping[str, Any]) -> str:
    """Date, machine and versions of a file; of its cases, where they say their own, which may be several."""
    about = file["about"]
    hardware, device = about["hardware"], about.get("device", {})
    machine = f"{device['name']}, {device['memory_gb']:.0f} GB, CUDA {device['cuda']}; " if "cuda" in device else ""
    machine += f"{hardware['cores']} cores of {hardware['processor']}, load {hardware['load']}"
    versions: dict[str, list[str]] = {}
    for one in [one["versions"] for one in file.get("cases", {}).values() if "versions" in one] or [about["versions"]]:
        for name, version in one.items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    said = ", ".join(f"{name} {' or '.join(several)}" for name, several in versions.items())
    return f"{about['date']}, {machine}; {said}."


def main() -> None:
    PAGE.write_text(page(read(RESULTS)), "utf-8")


if __name__ == "__main__":
    main()
