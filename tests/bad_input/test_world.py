"""What is wrong with the machine: exit code 1. Tests may run as root, for whom no permission is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .conftest import Refused


def test_a_file_where_the_runs_should_be(stories: Path, refused: Refused) -> None:
    (stories / "runs").write_text("x")
    assert refused("train", "c.yaml", code=1) == (
        "runs/.data: cannot be written: Not a directory | a file is where a folder should be: move it away"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_where_nothing_can_be_written(stories: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml", "--runs", "/proc/runs", code=1) == (
        "/proc/runs: cannot be written: No such file or directory | check the path and the disk, and run the same "
        "command again"
    )


def test_init_where_a_file_is_in_the_way(folder: Path, refused: Refused) -> None:
    assert refused("init", "rows.jsonl/new.yaml", code=1) == (
        "rows.jsonl: cannot be written: File exists | a file is where a folder should be: move it away"
    )
