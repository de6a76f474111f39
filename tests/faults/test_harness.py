"""The harness itself: it sees every byte that is written, and its faults are what they say."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest

from tests.faults.harness import FaultServer, Outcome
from tests.faults.test_kill import SAMPLES, Bench, content
from tests.faults.watch import WRITES, Event, Fail, Full, Kill


def start(server: FaultServer, folder: Path, fault: Kill | Fail | Full | None = None) -> Outcome:
    """`ft init`, which writes one file."""
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")
    base = SAMPLES / "quickstart-base"
    return server.run("init", "new.yaml", "--data", "rows.jsonl", "--base", base, cwd=folder, fault=fault)


def written(outcome: Outcome) -> Event:
    """The event that writes the file's text."""
    (found,) = [event for event in outcome.events if event.kind in WRITES]
    return found


@pytest.fixture
def undisturbed(server: FaultServer, tmp_path: Path) -> Outcome:
    outcome = start(server, tmp_path)
    assert outcome.code == 0, outcome
    assert written(outcome).size == (tmp_path / "new.yaml").stat().st_size
    (tmp_path / "new.yaml").unlink()
    return outcome


def place(outcome: Outcome) -> int:
    return outcome.events.index(written(outcome))


def left(folder: Path) -> list[int]:
    """The sizes of what `ft init` left."""
    return [path.stat().st_size for path in folder.iterdir() if path.name != "rows.jsonl"]


def test_a_kill_comes_before_the_write(server: FaultServer, tmp_path: Path, undisturbed: Outcome) -> None:
    killed = start(server, tmp_path, Kill(place(undisturbed)))
    assert (killed.signal, killed.code, left(tmp_path)) == (signal.SIGKILL, None, [0])
    assert written(killed) == killed.events[-1]


def test_a_torn_write_leaves_half_of_the_bytes(server: FaultServer, tmp_path: Path, undisturbed: Outcome) -> None:
    assert start(server, tmp_path, Kill(place(undisturbed), torn=True)).signal == signal.SIGKILL
    assert left(tmp_path) == [written(undisturbed).size // 2]


def test_a_power_cut_takes_what_was_not_synced(server: FaultServer, tmp_path: Path, undisturbed: Outcome) -> None:
    after = place(undisturbed) + 1
    assert undisturbed.events[after].kind == "fsync"
    start(server, tmp_path, Kill(after))
    assert left(tmp_path) == [written(undisturbed).size]
    start(server, tmp_path, Kill(after, power=True))
    assert left(tmp_path) == [0]
    start(server, tmp_path, Kill(after + 1, power=True))
    assert left(tmp_path) == [written(undisturbed).size]


def test_another_signal_than_kill_arrives_too(server: FaultServer, tmp_path: Path, undisturbed: Outcome) -> None:
    asked = start(server, tmp_path, Kill(place(undisturbed), signal=signal.SIGINT))
    assert asked.signal is None
    assert asked.code != 0


def test_a_failing_write_fails(server: FaultServer, tmp_path: Path, undisturbed: Outcome) -> None:
    failed = start(server, tmp_path, Fail(place(undisturbed), errno.ENOSPC, stays=True))
    assert failed.code == 1
    assert "No space left on device" in failed.stderr
    assert left(tmp_path) == [0] or left(tmp_path) == []


def test_a_full_disk_takes_so_many_bytes_and_no_more(server: FaultServer, tmp_path: Path, undisturbed: Outcome) -> None:
    failed = start(server, tmp_path, Full(nbytes=100))
    assert failed.code == 1
    assert sum(left(tmp_path)) <= 100
    assert start(server, tmp_path, Full(nbytes=written(undisturbed).size)).code == 0


def test_every_byte_is_seen(server: FaultServer, tmp_path: Path) -> None:
    """Whatever library wrote it: a rename or a write that escapes would be a moment that is never tried."""
    bench = Bench(server, tmp_path)
    for stage in ("train", "merge, unproven", "gguf, unproven", "gguf-lora, unproven"):
        events = bench.reference(stage).events
        sizes: dict[str, int] = {}
        for event in events:
            sizes[event.path] = sizes.get(event.path, 0) + event.size
            if event.to is not None:
                for name in [name for name in sizes if name == event.path or name.startswith(event.path + "/")]:
                    sizes[event.to + name[len(event.path) :]] = sizes.pop(name)
        made = [name for name in content(bench.work) if (bench.work / name).is_file()]
        before = bench.reference(stage).before
        unchanged = [] if before is None else [name for name in made if (before / name).exists()]
        short = [
            name for name in made if name not in unchanged and sizes.get(name, 0) < (bench.work / name).stat().st_size
        ]
        assert short == [], stage
