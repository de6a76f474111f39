"""The domain samples keep their layout and size, and what can be checked in them is right."""

from __future__ import annotations

import csv
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
ROWS = {
    "legal.jsonl": 200, "medical.jsonl": 200, "finance.csv": 200, "support.jsonl": 200, "code.jsonl": 150,
    "notes.jsonl": 100,
}  # fmt: skip
COLUMNS = {
    "legal.jsonl": {"question", "answer"}, "medical.jsonl": {"conversations"}, "support.jsonl": {"messages"},
    "finance.csv": {"instruction", "input", "output"}, "code.jsonl": {"prompt", "completion"}, "notes.jsonl": {"text"},
}  # fmt: skip


def rows(name: str) -> list[dict[str, Any]]:
    text = (SAMPLES / name).read_text(encoding="utf-8")
    return (
        list(csv.DictReader(text.splitlines())) if name.endswith(".csv") else list(map(json.loads, text.splitlines()))
    )


@pytest.mark.parametrize("name", ROWS)
def test_each_file_has_its_columns_its_size_and_no_row_twice(name: str) -> None:
    found = rows(name)
    assert len(found) == ROWS[name]
    assert {frozenset(row) for row in found} == {frozenset(COLUMNS[name])}
    assert len({json.dumps(row) for row in found}) == len(found)
    assert (SAMPLES / name).stat().st_size < 250_000


@pytest.mark.parametrize("name", ROWS)
def test_no_slot_of_a_template_stays_unfilled(name: str) -> None:
    if name != "code.jsonl":  # whose braces are Python's
        assert re.findall(r"\{\w*\}", (SAMPLES / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("row", [pytest.param(row, id=str(n)) for n, row in enumerate(rows("code.jsonl"))])
def test_every_function_does_what_its_docstring_shows(row: dict[str, str]) -> None:
    space: dict[str, Any] = {"__name__": "sample"}
    exec(row["completion"], space)
    (function,) = [value for value in space.values() if callable(value)]
    assert f"`{function.__name__}`" in row["prompt"]
    (example,) = [test for test in doctest.DocTestFinder(recurse=False).find(function, globs=space) if test.examples]
    assert doctest.DocTestRunner(verbose=False).run(example) == doctest.TestResults(failed=0, attempted=1)


def test_the_arithmetic_of_the_finance_answers_is_right() -> None:
    checked = 0
    for row in rows("finance.csv"):
        if " = " in row["output"]:
            left, right = row["output"].split(". The ")[0].split(" = ")
            assert eval(left.replace("x", "*")) == pytest.approx(float(right))
            checked += 1
        if change := re.search(r"(rose|fell) by (\d+) percent, from (\d+) to (\d+)", row["output"]):
            word, percent, before, after = change[1], int(change[2]), int(change[3]), int(change[4])
            assert before * (100 + (percent if word == "rose" else -percent)) == after * 100
            checked += 1
    assert checked >= 80


def test_conversations_alternate_and_end_with_an_answer() -> None:
    for row in rows("support.jsonl"):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2)
        assert len(roles) >= 5
    for row in rows("medical.jsonl"):
        speakers = [message["from"] for message in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)


def test_the_default_seed_makes_the_same_files_again(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SAMPLES / "make_domain_samples.py", "--output", tmp_path], check=True, cwd=tmp_path)
    for name in ROWS:
        assert (tmp_path / name).read_bytes() == (SAMPLES / name).read_bytes()
