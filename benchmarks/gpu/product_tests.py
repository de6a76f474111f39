"""The project's own tests of what behaves otherwise on a GPU, run there, some of them only there."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.gpu.case import Case, Context
from benchmarks.measuring import ROOT, Failed

PLACES = ("tests/model", "tests/train/test_batches.py")
"""Folders and files of tests, of which each file is a case."""


def cases(tiny: bool) -> list[Case]:
    files = [file for place in PLACES for file in sorted(_files(ROOT / place))]
    if tiny:
        files = files[:1]
    return [
        Case(str(file.relative_to(ROOT)), partial(measure, str(file.relative_to(ROOT))), seconds=30 if tiny else 120)
        for file in files
    ]


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else list(place.rglob("test_*.py"))


def measure(file: str, context: Context) -> dict[str, Any]:
    """How many tests passed, failed and were skipped. Another version's warnings are no failures here."""
    report = context.folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    done = subprocess.run([*command, file], cwd=ROOT, capture_output=True, text=True, check=False)
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


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, one["passed"], one["skipped"], len(one["failures"]), ", ".join(one["failures"]) or "–"]
        for name, one in found.items()
    ]
    return measuring.table(["file", "passed", "skipped", "failed", "which"], rows)
