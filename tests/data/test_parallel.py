"""Many rows, in processes of their own: the same as one by one, and what goes wrong there is told here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config.schema import Config
from finetune.data import parallel
from finetune.data.encode import Encoder
from finetune.data.prepare import PreparedData, prepare
from finetune.errors import DataError, WorldError

from .conftest import write_rows

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Nr. {n} é {'x' * (n % 50)}"},
            {"role": "assistant", "content": f"{n}ö"},
        ]
    }
    for n in range(5200)
]


def prepared(folder: Path, base: Path, rows: list[Any]) -> PreparedData:
    values = {"base": str(base), "data": [{"path": str(write_rows(folder / "rows.jsonl", rows))}]}
    return prepare(Config.model_validate({**values, "evaluation": {"split": 50}}), base)


@pytest.mark.parametrize("folder", ["tokenizers/qwen2", "tokenizers/phi-3"])
def test_processes_give_what_one_gives(
    assets: Path, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "available_cores", lambda: 3)
    many = prepared(tmp_path, assets / folder, ROWS)
    monkeypatch.setattr(parallel, "INLINE_CHUNKS", 100)
    one = prepared(tmp_path, assets / folder, ROWS)
    assert [row.place for row in many.held_out] == [row.place for row in one.held_out]
    assert many.accounting == one.accounting
    for mine, theirs in zip(many.train, one.train, strict=True):
        assert np.array_equal(mine.ids, theirs.ids)
        assert np.array_equal(mine.supervised, theirs.supervised)
        assert mine.place == theirs.place
    kept = [row.conversation for row in many.held_out]
    assert kept == [row.conversation for row in one.held_out]
    assert all(kept)


def test_a_wrong_row_in_another_process_is_named_here(byte_base: Path, tmp_path: Path) -> None:
    rows: list[Any] = list(ROWS)
    rows[2321] = {"messages": [{"role": "user", "content": "x"}]}
    values = {"base": str(byte_base), "chat_template": "chatml"}
    config = {**values, "data": [{"path": str(write_rows(tmp_path / "rows.jsonl", rows))}]}
    with pytest.raises(DataError, match=r"rows.jsonl:2322: the last turn is not the assistant's"):
        prepare(Config.model_validate(config), byte_base)


def test_a_process_that_is_killed_is_told(byte_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.getpid()

    def die(self: Encoder, task: object) -> None:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Encoder, "encode", die)
    monkeypatch.setattr(parallel, "available_cores", lambda: 2)
    values = {"base": str(byte_base), "chat_template": "chatml"}
    config = {**values, "data": [{"path": str(write_rows(tmp_path / "rows.jsonl", ROWS))}]}
    with pytest.raises(WorldError, match="a process that prepares data was killed"):
        prepare(Config.model_validate(config), byte_base)


def test_few_chunks_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no process is worth starting")

    class Fake:
        def encode(self, task: object) -> object:
            return task

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", refuse)

    def tasks() -> Iterator[Any]:
        yield from range(parallel.INLINE_CHUNKS)

    assert list(parallel.encoded(Fake(), tasks())) == [0, 1, 2]  # type: ignore[arg-type]


@pytest.mark.fault("kill -9 while tokenising", "data", "the processes that help end too, and hold no lock")
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_helping_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    code = f"""
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from finetune.data.parallel import _start
pool = ProcessPoolExecutor(2, mp_context=get_context("fork"), initializer=_start, initargs=(os.getpid(),))
assert list(pool.map(abs, [-1, -2])) == [1, 2]
open({str(tmp_path / "numbers")!r}, "w").write(" ".join(map(str, pool._processes)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    numbers = [int(number) for number in (tmp_path / "numbers").read_text().split()]
    assert numbers
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{number}").exists() for number in numbers):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.02)
