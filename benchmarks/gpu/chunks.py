"""All chunks of the GPU suite, and the order in which their cases have their turn."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import cards, correct, guess, plan_error, product_tests, speed, whole
from benchmarks.gpu.case import Case, Turn

Found = dict[str, dict[str, Any]]
"""Name of a case → its result."""


def _nothing(_: dict[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class Chunk:
    cases: Callable[[bool], list[Case]]
    """Its cases; the argument says whether they are to be tiny."""
    table: Callable[[Found], str]
    """Its results as a page part."""
    wrong: Callable[[dict[str, Any]], str] = _nothing
    """What is wrong with a case that was measured; nothing, if it is as it should be."""


CHUNKS: dict[str, Chunk] = {
    "correct": Chunk(correct.cases, correct.table, correct.wrong),
    "tests": Chunk(product_tests.cases, product_tests.table, product_tests.wrong),
    "speed": Chunk(speed.cases, speed.table),
    "plan": Chunk(plan_error.cases, plan_error.table),
    "cards": Chunk(cards.cases, cards.table),
    "whole": Chunk(whole.cases, whole.table),
}


def apart(cases: Found) -> tuple[Found, dict[str, str]]:
    """What was measured, and of what failed the last line of why."""
    good = {case: found for case, found in cases.items() if "failed" not in found}
    failed = {
        case: (found["failed"].strip().splitlines() or ["?"])[-1][:300]
        for case, found in cases.items()
        if "failed" in found
    }
    return good, failed


@dataclass(frozen=True)
class Waiting:
    """A case and the chunk that it is of."""

    chunk: str
    case: Case


def in_order(names: Collection[str], only: str, *, tiny: bool) -> list[Waiting]:
    """All cases of the chunks, those left out that lack what they need here; what matters most comes first."""
    every = [
        Waiting(name, case)
        for name, chunk in CHUNKS.items()
        if name in names
        for case in chunk.cases(tiny)
        if only in case.name and (not case.needs or importlib.util.find_spec(case.needs) is not None)
    ]
    return sorted(every, key=lambda one: one.case.turn)  # stable: else as the chunks have them


def names_of(chunk: str) -> list[str]:
    """Cases of a chunk that targets wait for."""
    return [case.name for case in CHUNKS[chunk].cases(False) if case.turn != Turn.REST]


def pace(known: Mapping[str, Found], order: Collection[Waiting]) -> float:
    """How long cases take here, over what was guessed of them: the median of those that were measured."""
    ratios = [
        found["seconds"] / one.case.seconds
        for one in order
        if (found := known[one.chunk].get(one.case.name)) is not None and "failed" not in found
    ]
    return min(10.0, max(0.3, statistics.median(ratios))) if len(ratios) >= 3 else 1.0


def batch(order: Collection[Waiting], left: float, factor: float) -> list[Waiting]:
    """What the next process is to measure: the first case that fits into `left` seconds, and those right behind it that
    may share its process, as far as there is time. Nothing, where nothing fits."""
    chosen: list[Waiting] = []
    needed = guess.START
    for one in order:
        fits = needed + one.case.seconds * factor <= left
        if chosen and not (fits and _together(chosen[0], one)):
            break
        if fits:
            chosen.append(one)
            needed += one.case.seconds * factor
    return chosen


def _together(first: Waiting, other: Waiting) -> bool:
    """Whether two cases may share a process, and neither waits for a later turn by it."""
    same = first.chunk == other.chunk and first.case.process == other.case.process
    return same and first.case.turn == other.case.turn
