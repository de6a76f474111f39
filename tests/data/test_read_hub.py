"""Datasets on the Hub: what is asked of `datasets`, and what a person reads when it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.config.schema import DataSource
from finetune.data.read import read_chunks, read_rows, source_files
from finetune.errors import DataError

datasets = pytest.importorskip("datasets")

CARD = """---
configs:
- {config_name: main, data_files: [{split: train, path: a.jsonl}, {split: test, path: a.jsonl}]}
- {config_name: socratic, data_files: [{split: train, path: b.jsonl}]}
---
"""


@pytest.fixture
def rows(here: Path) -> str:
    """A dataset with two configurations. `datasets` takes a folder of that name for one on the Hub."""
    folder = here / "owner" / "rows"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "a.jsonl").write_text('{"q": "Why?", "a": "So."}\n' * 250)
    (folder / "b.jsonl").write_text('{"q": "How?", "a": "So."}\n')
    return "owner/rows"


def fault(**settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(DataSource(**settings)))
    (problem,) = caught.value.problems
    return f"{problem} | {problem.hint}"


def test_a_real_dataset_row_by_row(rows: str) -> None:
    source = DataSource(path=rows, name="main", streaming=True, columns={"question": "q"})
    found = list(read_rows(source))
    assert len(found) == 250
    assert found[249].values == {"question": "Why?", "a": "So."}
    assert found[249].place == "owner/rows: row 250"
    assert [len(list(chunk.rows())) for chunk in read_chunks(source)] == [100, 100, 50]
    assert source_files(source) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has several configurations, and none is chosen | set `name:` to one of main, socratic"),
        ({"name": "mian"}, "has no configuration 'mian' | set `name:` to one of main, socratic"),
        ({"name": "main", "split": "dev"}, "has no split 'dev' | set `split:` to one of train, test"),
    ],
)
def test_what_has_to_be_chosen(rows: str, settings: dict[str, str], message: str) -> None:
    assert fault(path=rows, streaming=True, **settings) == f"owner/rows: {message}"


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **named: Any) -> list[dict[str, int]]:
        asked.append((args, named))
        return [{"a": number} for number in range(2500)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = DataSource(path="owner/rows", name="main", split="test", revision="v1")
    assert [len(list(chunk.rows())) for chunk in read_chunks(source)] == [500] * 5
    assert asked == [(("owner/rows", "main"), {"split": "test", "revision": "v1", "streaming": False})]


def test_little_is_fetched_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []

    def stream(*_: Any, **__: Any) -> Iterator[dict[str, int]]:
        for number in range(1_000_000):
            fetched.append(number)
            yield {"a": number}

    monkeypatch.setattr(datasets, "load_dataset", stream)
    found = read_rows(DataSource(path="owner/rows", streaming=True))
    assert [next(found).values["a"] for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(fetched) == 100


def test_a_network_that_fails_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[dict[str, int]]:
        yield from ({"a": number} for number in range(150))
        raise httpx.ReadTimeout("The read operation timed out")

    monkeypatch.setattr(datasets, "load_dataset", stream)
    assert fault(path="owner/rows", streaming=True) == (
        "owner/rows: cannot be loaded: The read operation timed out | check the network and `split:`, or download the "
        "file"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "DatasetGenerationError",
            "cannot be loaded: first line | check the network and `split:`, or download the file",
        ),
        ("DefunctDatasetError", "cannot be loaded: first line | check the network and `split:`, or download the file"),
        (
            "DatasetNotFoundError",
            "there is no such dataset on the Hub, or it is private | check the name (owner/name); for a private one, "
            "`hf auth login` first",
        ),
    ],
)
def test_a_dataset_on_the_hub_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise getattr(datasets.exceptions, error)("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert fault(path="owner/rows") == f"owner/rows: {message}"


@pytest.mark.parametrize("error", [ValueError(), RuntimeError(""), ConnectionError(), ImportError("\n")])
def test_an_error_without_words(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert fault(path="owner/rows").startswith(f"owner/rows: cannot be loaded: {type(error).__name__} | ")


def test_nothing_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [])
    assert fault(path="owner/rows") == "owner/rows: there are no rows in it | a dataset needs at least two rows"
