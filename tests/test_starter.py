"""`ft init`: a config for data of every shape, which loads as it was written."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from finetune.config.files import source_files
from finetune.config.load import load
from finetune.starter import write_starter

ROW = b'{"question": "Why?", "answer": "So."}\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_bytes(ROW)
    (tmp_path / "rows" / "b.jsonl.gz").write_bytes(gzip.compress(ROW))
    return tmp_path


@pytest.mark.parametrize(
    ("data", "files"),
    [
        ("rows", ["rows/a.jsonl", "rows/b.jsonl.gz"]),
        ("rows/*.gz", ["rows/b.jsonl.gz"]),
        ("rows/b.jsonl.gz", ["rows/b.jsonl.gz"]),
        ("**/*.jsonl", ["rows/a.jsonl"]),
    ],
)
def test_the_config_names_the_data(here: Path, data: str, files: list[str]) -> None:
    write_starter(Path("configs/new.yaml"), Path(data), "owner/name")
    (source,) = load(Path("configs/new.yaml")).config.data
    assert source.format == "question-answer"
    assert [str(file.relative_to(here)) for file in source_files(source.path)] == files
