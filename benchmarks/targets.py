"""The targets of the work on speed, and what the results say of each.

Whatever the suite has for a target and did not measure, or could not, counts against it: a target is met only where all
of it was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.chunks import Found, apart, names_of
from benchmarks.gpu.speed import IN_HALF, IN_TRLS, SWITCHES
from benchmarks.gpu.speed_table import AGAIN, ratios, tuned


@dataclass(frozen=True)
class Results:
    """What there is to show."""

    first_step: dict[str, Any] | None
    train: dict[str, Any] | None
    gpus: dict[str, dict[str, dict[str, Any]]]
    """Machine → chunk → its file."""

    def cases(self, chunk: str) -> Iterator[tuple[Found, set[str]]]:
        """The cases of a chunk that were measured, and the names of those that failed, machine by machine."""
        for chunks in self.gpus.values():
            if chunk in chunks:
                good, failed = apart(chunks[chunk]["cases"])
                yield good, set(failed)


@dataclass(frozen=True)
class Finding:
    """What was measured of a target."""

    text: str
    met: bool | None
    """None where the target is only that it is measured."""


@dataclass(frozen=True)
class Target:
    text: str
    look: Callable[[Results], Finding | None]
    """None where there is no result to tell from, not even a failure."""
    command: str
    """What measures it."""


def _counted(text: str, failed: int, missing: int) -> str:
    """With what is not in the numbers."""
    more = [f"{failed} failed"] * bool(failed) + [f"{missing} not measured"] * bool(missing)
    return "; ".join(filter(None, [text, *more]))


def _complete(results: Results, chunk: str, wanted: Iterable[str]) -> tuple[Found, int, int] | None:
    """The wanted cases of all machines: those measured, how many failed, how many are missing. None where none was so
    much as tried. On a second machine all are wanted again."""
    wanted = list(wanted)
    found: Found = {}
    failures = missing = 0
    for number, (good, failed) in enumerate(results.cases(chunk)):
        found |= {f"{name} ({number})": good[name] for name in wanted if name in good}
        failures += sum(name in failed for name in wanted)
        missing += sum(name not in good and name not in failed for name in wanted)
    return (found, failures, missing) if found or failures else None


# -- on a GPU -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A model and a kind of rows on one machine: speed and memory of ft's ways over the reference's."""

    ways: dict[str, tuple[float, float | None]]
    tried: bool
    """Whether the reference was measured, or failed."""
    failed: int
    """Ways of ft that failed, and the reference if it did."""
    missing: int
    """Those that the suite has, and nobody has tried."""

    def met(self, speed: float, memory: float | None) -> bool:
        """One way alone has to do both, and what was asked for has to be there."""
        return not (self.failed or self.missing) and any(
            quick >= speed and (memory is None or (large is not None and large <= memory))
            for quick, large in self.ways.values()
        )


LABELS = {"ft auto": "with the whole card", IN_TRLS: "in TRL's memory", IN_HALF: "in half of it or the least"}


def _cells(results: Results, kind: str, ways: Iterable[str], reference: str) -> Iterator[Cell]:
    """Of all machines. `reference` is the beginning of a way's name: of several such ways the quickest."""
    ways, suite = list(ways), set(names_of("speed"))
    for good, failed in results.cases("speed"):
        known = {*suite, *good, *failed}
        groups = {name.partition(f", {reference}")[0] for name in known if f", {reference}" in name}
        for group in sorted(group for group in groups if group.split(", ")[1].startswith(kind)):
            other = (tuned(good, group) if reference == "trl tuned" else None) or f"{group}, {reference}"
            asked = [other, *(name for way in ways if (name := f"{group}, {way}") in known)]
            found = {way: good[f"{group}, {way}"] for way in ways if f"{group}, {way}" in good}
            yield Cell(
                ways={way: ratios(one, good[other]) for way, one in found.items()} if other in good else {},
                tried=other in good or other in failed,
                failed=sum(name in failed for name in asked),
                missing=sum(name not in good and name not in failed for name in asked),
            )


def _against(
    kind: str, ways: tuple[str, ...], reference: str, speed: float, memory: float | None
) -> Callable[[Results], Finding | None]:
    def look(results: Results) -> Finding | None:
        cells = list(_cells(results, kind, ways, reference))
        if not any(cell.tried for cell in cells):
            return None
        texts = []
        for way in ways:
            found = [cell.ways[way] for cell in cells if way in cell.ways]
            if found:
                sizes = [size for _, size in found if size is not None]
                size = f" at {max(sizes):.2f}× the memory" if sizes else ""
                label = f"{LABELS[way]}: " if len(ways) > 1 else ""
                texts.append(f"{label}{min(quick for quick, _ in found):.2f}×{size}, the worst of {len(found)}")
        failed, missing = sum(cell.failed for cell in cells), sum(cell.missing for cell in cells)
        return Finding(_counted("; ".join(texts), failed, missing), all(cell.met(speed, memory) for cell in cells))

    return look


def _equal(results: Results) -> Finding | None:
    if (found := _complete(results, "correct", names_of("correct"))) is None:
        return None
    good, failed, missing = found
    equal = sum(one["equal"] for one in good.values())
    text = _counted(f"{equal} of {len(good)} are", failed, missing)
    return Finding(text, equal == len(good) and not failed and not missing)


def _ceiling(results: Results) -> Finding | None:
    wanted = [name for name in names_of("speed") if name.endswith("ft all, recomputed")]
    if (found := _complete(results, "speed", wanted)) is None:
        return None
    good, failed, missing = found
    shares = [one["of_ceiling"] for one in good.values()]
    text = f"{min(shares):.0%}, the worst of {len(shares)}" if shares else ""
    met = bool(shares) and min(shares) >= 0.75 and not failed and not missing
    return Finding(_counted(text, failed, missing), met)


def _switches(results: Results) -> Finding | None:
    wanted = [f"llama3-8b, dense 2k, ft {name}" for name in SWITCHES]
    if (found := _complete(results, "speed", wanted)) is None:
        return None
    good, failed, missing = found
    texts = []
    for name, one in good.items():
        way, _, machine = name.rpartition(" (")
        plain = good.get(f"llama3-8b, dense 2k, ft plain ({machine}")
        if plain is not None and one is not plain:
            quick, size = ratios(one, plain)
            texts.append(f"{way.rpartition(', ft ')[2]} {quick:.2f}×" + ("" if size is None else f" at {size:.2f}×"))
    return Finding(_counted(", ".join(texts), failed, missing), None if not failed and not missing else False)


def _plan(results: Results) -> Finding | None:
    if (found := _complete(results, "plan", names_of("plan"))) is None:
        return None
    good, failed, missing = found
    errors = [one["error"] for one in good.values() if one["error"] is not None]
    if not errors:
        return Finding(_counted("", failed, missing), False)
    middle, worst, under = statistics.median(map(abs, errors)), max(map(abs, errors)), min(0.0, *errors)
    text = f"tensors: median {middle:.1%}, worst {worst:.1%}, under by {-under:.1%} at most, {len(errors)} points"
    met = middle <= 0.05 and worst <= 0.1 and under >= -0.05 and not failed and not missing
    whole = [one["total_error"] for one in good.values() if one["total_error"] is not None]
    text += f"; all of the process: median {statistics.median(map(abs, whole)):.1%}" if whole else ""
    return Finding(_counted(text, failed, missing), met)


def _plans_time(results: Results) -> Finding | None:
    if (found := _complete(results, "plan", names_of("plan"))) is None:
        return None
    good, failed, missing = found
    errors = [one["time_error"] for one in good.values() if one["time_error"] is not None]
    if not errors:
        return Finding(_counted("", failed, missing), False)
    middle = statistics.median(map(abs, errors))
    text = f"median {middle:.0%}, from {min(errors):+.0%} to {max(errors):+.0%}, {len(errors)} points"
    return Finding(_counted(text, failed, missing), None)


def _cards(results: Results) -> Finding | None:
    if (found := _complete(results, "cards", names_of("cards"))) is None:
        return None
    good, failed, missing = found
    tight = sum(bool(one["ran_out"]) or not one["within"] for one in good.values())
    text = f"{len(good)} trained, {tight} of them not at once or with more memory than that"
    return Finding(_counted(text, failed, missing), not tight and not failed and not missing)


CURVES = 0.02
"""How far mean losses may be apart: rows come in another order, and the adapter begins with other random numbers."""


def _curves(results: Results) -> Finding | None:
    off: list[float] = []
    for good, _ in results.cases("speed"):
        for name, one in good.items():
            group, _, way = name.removesuffix(AGAIN).rpartition(", ft ")
            other = good.get(f"{group}, trl defaults") if way else None
            if other is not None:
                off.append(abs(one["mean_loss"] / other["mean_loss"] - 1))
    for case in results.train["cases"] if results.train else []:
        losses = case["mean_loss"]
        if {"ours", "trl"} <= set(losses):
            off.append(abs(losses["ours"] / losses["trl"] - 1))
    return Finding(f"at most {max(off):.1%} apart, {len(off)} pairs", max(off) <= CURVES) if off else None


# -- on a CPU -----------------------------------------------------------------------------------------------------


def _cpu(equal_work: bool) -> Callable[[Results], Finding | None]:
    def look(results: Results) -> Finding | None:
        cases = results.train["cases"] if results.train else []
        cases = [one for one in cases if ("bfloat16" in one["case"]) is not equal_work]
        if not cases:
            return None
        found = [one["ours / trl"]["wall_s"] for one in cases if one["ours / trl"]["wall_s"] is not None]
        failed = len(cases) - len(found)
        text = f"{max(found):.2f}× its time, the worst of {len(found)}" if found else ""
        met = bool(found) and max(found) <= 1 and not failed
        return Finding(_counted(text, failed, 0), met if equal_work else None)

    return look


def _first(results: Results) -> Finding | None:
    if (file := results.first_step) is None:
        return None
    ratio = file["first_step / bare"]
    return Finding("failed", False) if ratio is None else Finding(f"{ratio:.2f}×", ratio <= 1.1)


SECONDS = 16.0
"""What litgpt and torchtune took for the newcomer's job on the two cores of the one who set the target."""


def _newcomer(results: Results) -> Finding | None:
    if (file := results.first_step) is None:
        return None
    ways = file["ways"]
    if "ft" not in ways:
        return Finding("failed", False)
    others = [f"{name} {one['wall_s']:.1f} s" for name, one in ways.items() if name not in ("ft", "bare")]
    ours = ways["ft"]["wall_s"]
    text = f"{ours:.1f} s" + (f" (beside it {', '.join(others)})" if others else "")
    return Finding(f"{text}; the 16 s are of another machine", ours <= SECONDS)


# -- all ----------------------------------------------------------------------------------------------------------

SPEED, PLAN = "`benchmarks.gpu.run --chunks speed`", "`benchmarks.gpu.run --chunks plan`"
EVERY = ("ft auto", IN_TRLS, IN_HALF)

TARGETS = (
    Target("every faster way equals the plain path", _equal, "`benchmarks.gpu.run --chunks correct`"),
    Target("short chats: ≥ 2.5× TRL's defaults", _against("chats", EVERY[:1], "trl defaults", 2.5, None), SPEED),
    Target(
        "dense: ≥ 1.6× TRL's defaults at ≤ 0.5× the memory", _against("dense", EVERY, "trl defaults", 1.6, 0.5), SPEED
    ),
    Target("≥ 1.25× TRL tuned by hand at ≤ 0.75× the memory", _against("", EVERY, "trl tuned", 1.25, 0.75), SPEED),
    Target("≥ 1.05× unsloth at ≤ 1.0× the memory", _against("", EVERY, "unsloth", 1.05, 1.0), f"{SPEED} with unsloth"),
    Target("≥ 1.05× axolotl with its kernels at ≤ 1.0× the memory", lambda _: None, "no command yet"),
    Target("LLaMA-Factory: tokens with loss a second and memory beside ours", lambda _: None, "no command yet"),
    Target("loss curves equal TRL's: mean loss within 2 %", _curves, f"{SPEED}, `benchmarks.train`"),
    Target("each switch alone, over plain: speed and memory", _switches, SPEED),
    Target("≥ 75 % of the compute ceiling, everything recomputed", _ceiling, SPEED),
    Target("the plan: median error 5 %, worst 10 %, never under by more than 5 %", _plan, PLAN),
    Target("the plan's tokens a second: how far off", _plans_time, PLAN),
    Target(
        "`fit: auto` trains in 8, 12, 16 and 24 GB without running out", _cards, "`benchmarks.gpu.run --chunks cards`"
    ),
    Target("CPU: never slower than TRL's command line for the same work", _cpu(True), "`benchmarks.train`"),
    Target(
        "CPU in bfloat16: ft has none (it computes in float32 there), so no equal work; beside TRL in bfloat16",
        _cpu(False),
        "`benchmarks.train`",
    ),
    Target("CPU: first step at ≤ 1.1× of importing and loading alone", _first, "`benchmarks.first_step`"),
    Target(
        "CPU: the newcomer's job in ≤ 16 s, where litgpt and torchtune took 16 s and LLaMA-Factory 24 s",
        _newcomer,
        "`benchmarks.first_step`, with `--other …` for those that are installed",
    ),
)
"""In the order of the page."""
