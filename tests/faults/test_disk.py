"""Disks that are full, read-only or closed: what is said, what is left, and that the same command goes on later.

The disks are real: a tmpfs of a few megabytes, a mount that is read-only, a limit on the size of files. Each command is
told before it begins if there is not enough room; a disk that somebody else fills up meanwhile is met on the way.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.places import FILLER, Place, missing
from tests.test_pipeline import write_config

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

MERGE = ("merge", "runs/tiny", "--no-verify")
GGUF = ("export", "runs/tiny", "--quant", "q8_0,f16", "--no-verify")
LORA = ("export", "runs/tiny", "--to", "gguf-lora", "--no-verify")
TRAIN = ("train", "tiny.yaml")

COMMANDS = {"merge": MERGE, "gguf": GGUF, "gguf-lora": LORA}


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if reason := missing():
        pytest.skip(reason)
    with Place(mounts=True) as running:
        yield running


@pytest.fixture(scope="module")
def trained(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, three steps and three checkpoints long, on a disk that has room."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder, max_steps=3, save_every=1)
    done = place.run(*TRAIN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def expected(place: Place, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What everything hashes to where there is room: `run/merged/model.safetensors` and so on."""
    folder = tmp_path_factory.mktemp("room") / "project"
    shutil.copytree(trained, folder)
    for command in COMMANDS.values():
        done = place.run(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    return hashes(place, folder)


@pytest.fixture
def small(place: Place, tmp_path: Path) -> Iterator[Path]:
    """A folder to mount a small disk on."""
    folder = tmp_path / "small"
    folder.mkdir()
    yield folder
    place.shell('umount "$0" || true', folder)


def hashes(place: Place, folder: Path) -> dict[str, str]:
    """Every artifact's SHA-256. The disk may be one that only those in the namespace see."""
    listed = place.shell('cd "$0" && find runs/tiny/adapter runs/tiny/merged runs/tiny/gguf -type f | sort', folder)
    there = [line for line in listed.splitlines() if not line.endswith(".partial")]
    found = place.shell('cd "$0" && sha256sum "$@"', folder, *there)
    return {line[66:]: line[:64] for line in found.splitlines()}


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, one error with a hint, and nothing that a programmer would have to read."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def project(place: Place, trained: Path, folder: Path) -> Path:
    """A copy of the finished run, for commands to work in."""
    place.shell('cp -r "$0"/. "$1"', trained, folder)
    return folder


def tree(place: Place, folder: Path) -> str:
    """Every name below, less what is written whatever happens."""
    return place.shell("""cd "$0" && find . ! -name .lock ! -name log.txt ! -path "./$1" | sort""", folder, FILLER)


# -- merge and export ---------------------------------------------------------------------------------------------

WHAT = {
    "merge": "the merged model",
    "gguf": "tiny-q8_0.gguf and tiny-f16.gguf",
    "gguf-lora": "tiny-lora.gguf and the base",
}


@pytest.mark.fault("a disk that is too small", stage="merge, export", outcome="said before anything is written")
def test_too_small_for_what_was_asked_for(place: Place, trained: Path, small: Path) -> None:
    place.mount(small, mebibytes=20)
    project(place, trained, small)
    before = tree(place, small)
    # The adapter alone fits, but not the base that it is proven on.
    for stage, command in {**COMMANDS, "gguf-lora": LORA[:-1]}.items():
        done = place.run(*command, cwd=small)
        refused(done, f"not enough room for {WHAT[stage]}", " MiB needed, ", " MiB free", "free some disk space")
        assert tree(place, small) == before


@pytest.mark.fault("a disk that fills up", stage="merge, export", outcome="nothing half-written; goes on when freed")
@pytest.mark.parametrize("stage", ["merge", "gguf"])
def test_somebody_else_fills_the_disk(
    place: Place, trained: Path, small: Path, expected: dict[str, str], stage: str
) -> None:
    place.mount(small, mebibytes=200)
    project(place, trained, small)
    before = tree(place, small)
    done = place.run(*COMMANDS[stage], cwd=small, neighbour=(stage, 2**20))
    refused(done, "cannot be written: No space left on device (", " free; ", " MiB needed in all)", "free some disk")
    assert tree(place, small).replace("./runs/tiny/gguf\n", "") == before, "something half-written is left"
    place.shell('rm "$0"', small / FILLER)
    done = place.run(*COMMANDS[stage], cwd=small)
    assert done.returncode == 0, done.stderr
    made = hashes(place, small)
    assert len(made) > sum("adapter" in name for name in made)
    assert made == {name: expected[name] for name in made}


@pytest.mark.fault("a disk that is full", stage="log", outcome="the command goes on; said once at its end")
def test_a_full_disk_takes_no_log(place: Place, trained: Path, small: Path, tmp_path: Path) -> None:
    """The run is on the full disk, what is written is on another."""
    place.mount(small, mebibytes=20)
    project(place, trained, small)
    other = tmp_path / "other"
    other.mkdir()
    script = 'mkdir "$0/runs/tiny/gguf"; mount --bind "$1" "$0/runs/tiny/gguf"; rm -f "$0/runs/tiny/log.txt"; '
    place.shell(script + 'dd if=/dev/zero of="$0/filler" bs=4k 2>&1 || true', small, other)
    done = place.run(*LORA, cwd=small)
    place.shell('umount "$0/runs/tiny/gguf"', small)
    # What was proven, or not, is noted beside the run: that is what a full disk ends.
    refused(done, "verification.json: cannot be written: No space left on device (0 B free)")
    assert done.stderr.count("log.txt does not have all that the libraries said: No space left on device") == 1


@pytest.mark.fault("a limit on the size of files", stage="merge, export", outcome="said before anything is written")
def test_a_limit_on_files(place: Place, trained: Path, tmp_path: Path) -> None:
    folder = project(place, trained, tmp_path)
    before = tree(place, folder)
    for stage, words in {
        "merge": "a file of the merged model has 3.0 MiB, and this process may write files of 1.0 MiB at most",
        "gguf": "has 1.6 MiB, and this process may write files of 1.0 MiB at most",
    }.items():
        refused(place.run(*COMMANDS[stage], cwd=folder, limit=2**20), words, "ulimit -f unlimited")
        assert tree(place, folder) == before


@pytest.mark.fault("a read-only disk", stage="train, merge, export", outcome="said at once; nothing is changed")
def test_a_read_only_disk(place: Place, trained: Path, small: Path) -> None:
    place.shell('mount --bind "$0" "$1"; mount -o remount,bind,ro "$1"', trained, small)
    for command in (*COMMANDS.values(), (*TRAIN, "--fresh")):
        refused(place.run(*command, cwd=small), "cannot be written: Read-only file system", "this disk is read-only")


@pytest.mark.fault("a folder that is somebody else's", stage="train, merge, export", outcome="said; nothing is changed")
def test_a_folder_that_cannot_be_written(place: Place, trained: Path, tmp_path: Path) -> None:
    folder = project(place, trained, tmp_path)
    place.shell('find "$0" -type d -exec chmod 0555 {} +', folder)
    before = tree(place, folder)
    for command in (*COMMANDS.values(), (*TRAIN, "--fresh")):
        done = place.run(*command, cwd=folder, powerless=True)
        refused(done, "cannot be written: Permission denied", "check who owns this folder")
        assert tree(place, folder) == before
    place.shell('chmod -R u+w "$0"', folder)


# -- training -----------------------------------------------------------------------------------------------------


def inputs(place: Place, trained: Path, folder: Path) -> None:
    place.shell('cp "$0/tiny.yaml" "$0/rows.jsonl" "$1"', trained, folder)


@pytest.mark.fault("a disk that is too small", stage="train", outcome="said before the first step")
def test_too_small_to_train(place: Place, trained: Path, small: Path) -> None:
    place.mount(small, mebibytes=2)
    inputs(place, trained, small)
    done = place.run(*TRAIN, cwd=small)
    refused(done, "not enough room for", " MiB needed, ", "free some disk space")
    assert place.shell('find "$0" -name "checkpoint-*"', small) == ""


@pytest.mark.fault("a disk that fills up", stage="train", outcome="the last checkpoint is whole; goes on when freed")
@pytest.mark.parametrize("fits", ["nothing", "the adapter"])
def test_somebody_else_fills_the_disk_while_it_trains(
    place: Place, trained: Path, small: Path, expected: dict[str, str], fits: str
) -> None:
    """What does not fit is the adapter, which safetensors writes, or the optimizer's state, which torch does."""
    weights = (trained / "runs" / "tiny" / "adapter" / "adapter_model.safetensors").stat().st_size
    place.mount(small, mebibytes=200)
    inputs(place, trained, small)
    done = place.run(*TRAIN, cwd=small, neighbour=("train", 2**14 if fits == "nothing" else weights + 2**16))
    refused(done, "cannot be written: ", "free some disk")
    assert place.shell('ls "$0/runs/tiny/checkpoints"', small).split() == ["checkpoint-1"]
    place.shell('rm "$0"', small / FILLER)
    done = place.run(*TRAIN, cwd=small)
    assert done.returncode == 0, done.stderr
    assert "step 1" in done.stderr, "it did not go on from the checkpoint"
    made = hashes(place, small)
    assert made == {name: digest for name, digest in expected.items() if "/adapter/" in name}


@pytest.mark.fault("a limit on the size of files", stage="train", outcome="said; nothing is taken for whole")
def test_a_limit_on_files_in_training(place: Place, trained: Path, tmp_path: Path) -> None:
    inputs(place, trained, tmp_path)
    done = place.run(*TRAIN, cwd=tmp_path, limit=2**16)
    refused(done, "64.0 KiB at most", "ulimit -f unlimited")
    assert place.shell('find "$0" -name "checkpoint-*"', tmp_path) == ""
