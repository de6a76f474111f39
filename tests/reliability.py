"""docs/reliability.md: which faults are survived, and the test that proves it; from the `fault` marks of all tests.

make docs writes it (`pytest --collect-only --reliability=docs/reliability.md`); tests/test_docs.py compares it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest

HEAD = """\
# Reliability

No fault costs more than the steps since the last checkpoint; going on gives the very model that an unbroken run
gives (on a CPU bit for bit, tested; a GPU adds sums in an order of its own); no wrong input gives a traceback;
nothing private leaves the machine. What that means in practice:

- **The same command again** is the answer to everything: `ft train`, `ft merge` and `ft export` find what is whole,
  remove what is not, and do the rest. Exit code 75 says that this is so after Ctrl-C, SIGTERM or SIGHUP; a second
  Ctrl-C leaves at once, which is as harmless as `kill -9`.
- **A checkpoint** has its name only once it is whole and on the disk; the size and hash of each of its files are in
  it. One that was damaged later is passed over for the one before, with a warning that names the file. The newest
  `train.keep_checkpoints` are kept, by step, and the best one.
- **What has changed** since the checkpoint (settings, data, template, base) is named and refused, unless you say
  `--allow-changed KEY`. More epochs are no change: a finished run goes on.
- **Memory** that runs out halves the micro batch and doubles the accumulation: the same rows make the same step.
  The longest batch is tried before step 1.
- **Numbers** that are none stop the run before the optimizer takes the step; the rows of the step are named. No
  tensor with such numbers is saved, merged or exported.
- **Room** on the disk is asked for before step 1, before a merge and before an export.

What is not promised: the steps of a GPU run after a resume are those of an unbroken one up to the order in which
the GPU adds numbers; real memory faults of a GPU were injected on a CPU, not provoked on a card; a disk that lies
about `fsync` can lose a checkpoint, and then the one before it is used.

The table is made from the tests: each line is a test that injects the fault. `make test` runs them; `make
test-faults` kills training, merging and exporting at every one of their writes.

| fault | stage | outcome | proven by | cases |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Fault:
    fault: str
    stage: str
    outcome: str
    test: str
    """File and function."""


def faults(items: Iterable[pytest.Item]) -> dict[Fault, int]:
    """Each fault that a test claims, and how many cases of the test claim it, in the order of the page."""
    found: dict[Fault, int] = {}
    for item in items:
        for mark in item.iter_markers("fault"):
            fault, stage, outcome = _said(*mark.args, **mark.kwargs)
            one = Fault(fault, stage, outcome, item.nodeid.partition("[")[0])
            found[one] = found.get(one, 0) + 1
    return {one: found[one] for one in sorted(found, key=lambda one: (one.stage, one.fault, one.test))}


def page(found: dict[Fault, int]) -> str:
    rows = []
    for one, cases in found.items():
        file, _, function = one.test.partition("::")
        cells = [one.fault, one.stage, one.outcome, f"[{function}](../{file})", str(cases)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return HEAD + "\n".join(rows) + "\n"


def _said(fault: str, stage: str, outcome: str) -> tuple[str, str, str]:
    return fault, stage, outcome
