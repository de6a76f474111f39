"""Whole files or none, and what the operating system says in words a person can use."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.errors import ExportError, StorageError
from finetune.runs.files import (
    discard,
    partial_file,
    partial_folder,
    replace_folder,
    require_space,
    room,
    storage_errors,
    whole,
    write_json,
    write_text,
)


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

    free_space(monkeypatch, 0)
    monkeypatch.setattr(whole.os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        write_text(path, "new")
    (problem,) = caught.value.problems
    assert f"{problem} | {problem.hint}" == (
        f"{path}: cannot be written: No space left on device (0 B free) | free some disk space and run the "
        "same command again"
    )
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("a.txt", "old")]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EIO, errno.ENAMETOOLONG])
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


def free_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "free some disk space"), (errno.EDQUOT, "quota")])
@pytest.mark.parametrize(
    ("needed", "said"), [(None, "(3.0 MiB free)"), (2**30, "(3.0 MiB free; 1.0 GiB needed in all)")]
)
def test_a_full_disk_says_what_is_free_and_what_was_needed(
    monkeypatch: pytest.MonkeyPatch, number: int, words: str, needed: int | None, said: str
) -> None:
    free_space(monkeypatch, 3 * 2**20)
    with pytest.raises(StorageError) as caught, storage_errors(Path("a.txt"), needed=needed):
        raise OSError(number, "as the system says it")
    (problem,) = caught.value.problems
    assert str(problem) == f"a.txt: cannot be written: {os.strerror(number)} {said}"
    assert words in (problem.hint or "")


def test_a_disk_that_takes_no_more_files(monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, 2**30)
    monkeypatch.setattr(room.os, "statvfs", lambda _: SimpleNamespace(f_files=1000, f_favail=0))
    with pytest.raises(StorageError, match=r"1\.0 GiB free, and no more files fit"), storage_errors(Path("a.txt")):
        raise OSError(errno.ENOSPC, "")


def test_what_rust_says_about_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers and safetensors raise no OSError."""
    free_space(monkeypatch, 0)
    with pytest.raises(StorageError, match=r"a: .* No space left on device \(0 B free\)"), storage_errors(Path("a")):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux's")
def test_what_torch_says_about_a_full_disk() -> None:
    import torch

    with pytest.raises(StorageError, match=r"optimizer.pt: cannot be written: No space left on device"):
        _save(torch.zeros(10**6))


def _save(tensor: Any) -> None:
    import torch

    with storage_errors(Path("optimizer.pt")):
        torch.save(tensor, "/dev/full")


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(ValueError, match="mine"), storage_errors(Path("a")):
        raise ValueError("mine")
    with pytest.raises(StorageError, match=r"^b: inner$"), storage_errors(Path("a")):
        raise StorageError("inner", place="b")


@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX systems")
def test_a_limit_on_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    # Python ignores SIGXFSZ, so a write beyond the limit is an error and not the end of the process.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError) as caught:
            write_text(tmp_path / "a.txt", "x" * 5000)
        with pytest.raises(StorageError, match=r"a file of the model has 4\.9 KiB, and .* files of 4\.0 KiB at most"):
            require_space(tmp_path, 5000, "the model", largest=5000)
        require_space(tmp_path, 5000, "the model", largest=4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (problem,) = caught.value.problems
    assert problem.message == "cannot be written: File too large (files may have 4.0 KiB at most)"
    assert "ulimit -f" in (problem.hint or "")
    require_space(tmp_path, 5000, "the model", largest=5000)


def test_room_is_asked_for_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=100))
    wanted = tmp_path / "not" / "yet"
    require_space(wanted, 100, "this")
    with pytest.raises(StorageError) as caught:
        require_space(wanted, 2048, "the merged model")
    (problem,) = caught.value.problems
    assert str(problem) == f"{wanted}: there is not enough room for the merged model: 2.0 KiB needed, 100 B free"
    assert problem.hint == "free some disk space, or use a folder on another disk"
    assert asked == [tmp_path, tmp_path]


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    final, partial = tmp_path / "model", tmp_path / "model.partial"
    partial.mkdir()
    (partial / "of a killed attempt").touch()
    with partial_folder(final) as folder:
        assert (folder, list(folder.iterdir()), final.exists()) == (partial, [], False)
        (folder / "a").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "a"]
    with pytest.raises(ExportError, match="exists already"), partial_folder(final):
        raise AssertionError("never entered")


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "new" / "model.gguf"
    with partial_file(final) as path:
        path.write_text("1")
        assert not final.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "model.gguf"]
    with pytest.raises(ExportError, match="exists already"), partial_file(final):
        raise AssertionError("never entered")


@pytest.mark.parametrize("kind", [partial_folder, partial_file])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_what_fails_is_removed_after_the_disk_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, fault: BaseException
) -> None:
    """Free space counted after the removal would say that there had been enough."""
    written = tmp_path / "model.partial"
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=7 if written.exists() else 2**40))

    def fail() -> None:
        with kind(tmp_path / "model", needed=2**20) as path:
            (path / "a" if path.is_dir() else path).write_text("1")
            raise fault

    with pytest.raises((StorageError, KeyboardInterrupt)) as caught:
        fail()
    if isinstance(fault, OSError):
        assert "(7 B free; 1.0 MiB needed in all)" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    for content in ("1", "2"):
        (tmp_path / "a.partial" / "deep").mkdir(parents=True)
        (tmp_path / "a.partial" / "deep" / "x").write_text(content)
        replace_folder(tmp_path / "a.partial", tmp_path / "a")
        assert tree(tmp_path) == {"a/deep/x": content}


@pytest.mark.parametrize("event", range(9))
def test_whoever_is_stopped_while_replacing_has_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: int
) -> None:
    """Stopped at every call that changes the disk: a whole folder is always there, and the same again ends well."""
    final, partial = tmp_path / "a", tmp_path / "a.partial"

    def make(content: str) -> None:
        discard(partial)
        partial.mkdir()
        for name in ("x", "y"):
            (partial / name).write_text(content)

    make("old")
    replace_folder(partial, final)
    make("new")
    calls = 0

    def stopping(name: str, real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            if name in ("rename", "fsync", "unlink", "rmdir", "rmtree"):
                if calls == event:
                    raise KeyboardInterrupt
                calls += 1
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(whole.os, "fsync", stopping("fsync", os.fsync))
        patch.setattr(Path, "rename", stopping("rename", Path.rename))
        patch.setattr(Path, "unlink", stopping("unlink", Path.unlink))
        patch.setattr(whole.shutil, "rmtree", stopping("rmtree", whole.shutil.rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            replace_folder(partial, final)
    assert calls == min(event, 8), "not every call was stopped at"
    found = [tree(folder) for folder in tmp_path.iterdir()]
    assert {"x": "old", "y": "old"} in found or {"x": "new", "y": "new"} in found
    if final.exists():
        assert tree(final) in ({"x": "old", "y": "old"}, {"x": "new", "y": "new"})
    make("new")
    replace_folder(partial, final)
    assert tree(tmp_path) == {"a/x": "new", "a/y": "new"}
