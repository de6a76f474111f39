"""Prepared data is found again when nothing changed, and made anew when anything did."""

from __future__ import annotations

import datetime
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.config.schema import Config
from finetune.data.cache import KEPT, Cache
from finetune.data.prepare import PreparedData, prepare
from finetune.errors import DataError

from .conftest import question, write_rows

TODAY = datetime.datetime(2026, 1, 2)


class Setup:
    """A config over some rows, a base of its own, and a cache."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.cache = folder, folder / "base", folder / ".data"
        shutil.copytree(base, self.base)
        self.rows = write_rows(folder / "rows.jsonl", [question(number) for number in range(30)])
        self.values: dict[str, Any] = {
            "base": str(self.base),
            "chat_template": "chatml",
            "data": [{"path": str(self.rows)}],
            "evaluation": {"split": 3},
            "train": {},
        }

    def prepare(self, today: datetime.datetime = TODAY) -> PreparedData:
        return prepare(Config.model_validate(self.values), self.base, cache=self.cache, today=today)


@pytest.fixture
def setup(tmp_path: Path, byte_base: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.chdir(tmp_path)
    return Setup(tmp_path, byte_base)


def test_the_second_time_it_is_there(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    first = setup.prepare()
    # Neither the tokenizer nor a row is needed.
    monkeypatch.setattr("finetune.data.prepare.load_tokenizer", None)
    monkeypatch.setattr("finetune.data.prepare.read_chunks", None)
    second = setup.prepare()
    assert (first.cached, second.cached) == (False, True)
    assert first.accounting == second.accounting
    for mine, theirs in zip([*first.train, *first.held_out], [*second.train, *second.held_out], strict=True):
        assert np.array_equal(mine.ids, theirs.ids)
        assert np.array_equal(mine.supervised, theirs.supervised)
        assert (mine.place, mine.conversation) == (theirs.place, theirs.conversation)
    assert first.packs is not None
    assert second.packs is not None
    assert [pack.tolist() for pack in first.packs] == [pack.tolist() for pack in second.packs]


def change_rows(setup: Setup) -> None:
    setup.rows.write_text(setup.rows.read_text("utf-8").replace("Q7", "Q8"), "utf-8")


def change_rows_and_hide_it(setup: Setup) -> None:
    """The same size and time of change, as when a file is restored by a program that sets times."""
    before = os.stat(setup.rows)
    change_rows(setup)
    os.utime(setup.rows, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_template(setup: Setup) -> None:
    (setup.folder / "t.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    setup.values["chat_template"] = str(setup.folder / "t.jinja")


def change_tokenizer(setup: Setup) -> None:
    path = setup.base / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")


def set_key(section: str, key: str, value: Any) -> Callable[[Setup], None]:
    def change(setup: Setup) -> None:
        target = setup.values[section][0] if section == "data" else setup.values[section] if section else setup.values
        target[key] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        change_rows,
        change_rows_and_hide_it,
        change_template,
        change_tokenizer,
        set_key("train", "sequence_length", 4096),
        set_key("train", "loss_on", "all"),
        set_key("train", "packing", False),
        set_key("train", "seed", 7),
        set_key("evaluation", "split", 4),
        set_key("evaluation", "max_rows", 4),
        set_key("data", "take", 20),
        set_key("data", "weight", 2.0),
        set_key("data", "on_overlong", "drop"),
        set_key("", "private_data", "ignore"),
    ],
    ids=lambda change: getattr(change, "__name__", ""),
)
def test_whatever_matters_makes_it_anew(setup: Setup, change: Callable[[Setup], None]) -> None:
    setup.prepare()
    change(setup)
    assert not setup.prepare().cached
    assert setup.prepare().cached


@pytest.mark.parametrize(
    "change",
    [set_key("train", "learning_rate", 1e-5), set_key("train", "epochs", 9), set_key("evaluation", "samples", 1)],
    ids=["learning_rate", "epochs", "samples"],
)
def test_what_does_not_matter_does_not(setup: Setup, change: Callable[[Setup], None]) -> None:
    setup.prepare()
    change(setup)
    assert setup.prepare().cached


def test_a_changed_template_file_is_seen(setup: Setup) -> None:
    change_template(setup)
    first = setup.prepare()
    path = setup.folder / "t.jinja"
    path.write_text(path.read_text().replace("role }}:", "role }}>"))
    second = setup.prepare()
    assert not second.cached
    assert first.train[0].ids.tolist() != second.train[0].ids.tolist()


def test_another_day_is_another_text_for_templates_that_write_the_date(setup: Setup) -> None:
    setup.prepare()
    assert setup.prepare(TODAY + datetime.timedelta(hours=3)).cached
    assert not setup.prepare(TODAY + datetime.timedelta(days=1)).cached


@pytest.mark.parametrize("name", ["ids.bin", "supervised.bin", "places.txt", "rows.npz", "data.json"])
@pytest.mark.parametrize("damage", ["cut", "removed", "emptied"])
def test_damaged_data_is_made_anew(setup: Setup, name: str, damage: str) -> None:
    setup.prepare()
    (path,) = setup.cache.glob(f"*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    data = setup.prepare()
    assert not data.cached
    assert len(data.train) == 27


def test_a_pickle_in_the_arrays_is_not_run(setup: Setup, tmp_path: Path) -> None:
    setup.prepare()
    (path,) = setup.cache.glob("*/rows.npz")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "canary"), "w"))

    np.savez(path, begins=np.array([Evil()], dtype=object), allow_pickle=True)
    assert not setup.prepare().cached
    assert not (tmp_path / "canary").exists()


def test_nobody_else_can_read_it(setup: Setup) -> None:
    setup.prepare()
    modes = [stat.S_IMODE(os.stat(folder).st_mode) for folder in (setup.cache, *setup.cache.glob("*/"))]
    assert modes == [0o700, 0o700]


def test_what_failed_leaves_nothing(setup: Setup) -> None:
    write_rows(setup.rows, [question(0), {"question": 3, "answer": "x"}])
    with pytest.raises(DataError):
        setup.prepare()
    assert not list(setup.cache.glob("*"))


def test_the_ones_used_last_are_kept(setup: Setup) -> None:

    for seed in range(KEPT + 2):
        setup.values["train"] = {"seed": seed}
        setup.prepare()

        if seed == KEPT - 1:
            setup.values["train"] = {"seed": 0}
            assert setup.prepare().cached
        time.sleep(0.02)  # times on disk tell which was used last
    setup.values["train"] = {"seed": 0}
    assert setup.prepare().cached, "it was used after seed 1 and 2"
    setup.values["train"] = {"seed": 1}
    assert not setup.prepare().cached


@pytest.mark.skipif(os.name != "posix", reason="elsewhere it goes after a day")
def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(setup: Setup) -> None:
    setup.prepare()
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive = setup.cache / f"{ended.pid}-1.partial", setup.cache / f"{os.getppid()}-2.partial"
    for folder in (dead, alive):
        folder.mkdir()
    with Cache(setup.cache).writing():
        assert not dead.exists()
        assert alive.exists()


def test_files_are_not_hashed_again_while_they_are_the_same(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in [setup.rows, *setup.base.iterdir()]:
        os.utime(path, (time.time() - 100,) * 2)
    time.sleep(2.1)  # the time of the last change to the inode cannot be set back
    setup.prepare()
    setup.prepare()
    monkeypatch.setattr("hashlib.file_digest", None)
    assert setup.prepare().cached
