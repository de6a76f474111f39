"""Whole files or none, and what the operating system says in words a person can use."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import StorageError
from finetune.runs import files
from finetune.runs.files import storage_errors, write_json, write_text


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "é\nb\n")
    assert path.read_bytes() == "é\nb\n".encode()
    write_text(path, "c")
    assert path.read_text() == "c"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_fault_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        write_text(path, "new")
    (problem,) = caught.value.problems
    assert f"{problem} | {problem.hint}" == (
        f"{path}: cannot be written: No space left on device | free some disk space and run the same command again"
    )
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG]
)
def test_every_fault_has_a_hint(number: int) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(Path("a.txt")):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == 1
    (problem,) = caught.value.problems
    assert str(problem) == f"a.txt: cannot be written: {os.strerror(number)}"
    assert problem.hint


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        write_text(tmp_path / "nowhere" / "a.txt", "x")


@pytest.mark.parametrize(
    ("value", "back"),
    [
        ({"a": [1, 2.5, None, "é"]}, {"a": [1, 2.5, None, "é"]}),
        ({"loss": float("nan"), "perplexity": [float("inf")]}, {"loss": None, "perplexity": [None]}),
        # A file name in another encoding than UTF-8, as Python hands it over.
        ({"path": "caf\udce9"}, {"path": "caf\udce9"}),
    ],
)
def test_json_reads_back(tmp_path: Path, value: Any, back: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == back
