"""The project's own tests of what behaves otherwise on a GPU, run there, some of them only there."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from typing import Any

from benchmarks import measuring
from benchmarks.gpu.case import Case, Context, Turn
from benchmarks.measuring import ROOT, Failed

GPU_ONLY = ("tests/model/test_recompute.py", "tests/model/kernels/test_attention.py")
"""Files with tests that run nowhere else; all of these have `on_a_gpu` in their names."""

ANYWHERE = (
    "tests/model/test_recompute.py",
    "tests/model/kernels/test_attention.py",
    "tests/model/kernels/test_layout.py",
    "tests/model/kernels/test_head.py",
    "tests/model/kernels/test_fused.py",
    "tests/model/kernels/test_lora.py",
    "tests/train/test_batches.py",
)
"""Files whose tests say themselves what they compute on, so that they mean the same with a GPU beside them; they are
run here because versions of torch and transformers are others.

Left out are those that load a base wherever `detect()` says and then feed it ids that lie in the machine's memory
(tests/model/kernels/test_apply.py, tests/model/test_base.py, most of tests/train): on a GPU they fail for that reason
alone. What they look at is looked at here by the chunks correct, plan and whole."""


def cases(tiny: bool) -> list[Case]:
    if tiny:
        file = "tests/model/kernels/test_layout.py"
        return [Case(file, partial(measure, [file], ""), seconds=30)]
    only = Case("those that need a GPU", partial(measure, [*GPU_ONLY], "on_a_gpu"), seconds=45, turn=Turn.CORRECT)
    return [only, *(Case(file, partial(measure, [file], "not on_a_gpu"), seconds=60) for file in ANYWHERE)]


def measure(files: list[str], names: str, context: Context) -> dict[str, Any]:
    """How many tests passed, failed and were skipped. Another version's warnings are no failures here."""
    report = context.folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    command += ["-k", names] if names else []
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    if not report.exists():
        raise Failed(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failures": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [one for tag in ("failure", "error") for one in case.findall(tag)]
        if wrong:
            found["failures"][str(case.get("name"))] = (wrong[0].text or "")[-1500:]
        else:
            found["skipped" if case.find("skipped") is not None else "passed"] += 1
    return found


def wrong(one: dict[str, Any]) -> str:
    return f"failed: {', '.join(one['failures'])}" if one["failures"] else ""


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, one["passed"], one["skipped"], len(one["failures"]), ", ".join(one["failures"]) or "–"]
        for name, one in found.items()
    ]
    return measuring.table(["file", "passed", "skipped", "failed", "which"], rows)
