"""log.txt takes what libraries say; the console keeps the screen."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from finetune.config.schema import Config
from finetune.console import Console
from finetune.errors import StorageError
from finetune.runs import log
from finetune.runs.log import logged, quiet_environment, without_compiler


def test_libraries_are_heard_in_the_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with logged(tmp_path / "log.txt"):
        print("printed")
        print("printed to stderr", file=sys.stderr)
        logging.getLogger("library").warning("logged")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("warned", stacklevel=1)
        console.say("for the person")
    print("after")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("after\n", "for the person\n")
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert log.startswith("--- ")
    for said in ("printed\n", "printed to stderr\n", "WARNING library: logged", "warned"):
        assert said in log
    assert "for the person" not in log


def test_the_log_is_appended_to_and_let_go_of_after_a_fault(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), logged(tmp_path / "log.txt"):
            raise ZeroDivisionError
    assert (tmp_path / "log.txt").read_text("utf-8").count("--- ") == 2
    assert not [handler for handler in logging.getLogger().handlers if "log.txt" in str(handler)]


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"log\.txt: cannot be written"), logged(tmp_path / "nowhere" / "log.txt"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX systems")
@pytest.mark.fault("a limit on the size of files", stage="log", outcome="the run goes on; said once at its end")
def test_a_log_that_has_no_room_does_not_end_what_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import resource

    path = tmp_path / "log.txt"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with logged(path):
            for _ in range(100):
                print("x" * 100)
                logging.getLogger("library").warning("y" * 100)
                sys.stderr.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == 4096
    shown = capsys.readouterr()
    said = f"warning: {path} does not have all that the libraries said: File too large\n"
    assert (shown.out, shown.err) == ("", said)


def test_a_log_that_cannot_even_be_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes no more files; and what is logged fails for a reason of its own."""
    path, real = tmp_path / "log.txt", log._Forgiving.__init__

    def full(self: log._Forgiving, name: Path | str, mode: str) -> None:
        if name == path:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, mode)

    monkeypatch.setattr(log._Forgiving, "__init__", full)
    print_then_fail = contextlib.ExitStack()
    print_then_fail.callback(print, "lost")
    with pytest.raises(ZeroDivisionError), logged(path), print_then_fail:
        raise ZeroDivisionError
    assert "log.txt does not have all that the libraries said: No space left" in capsys.readouterr().err


def test_a_persons_own_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    quiet_environment()
    assert (os.environ["HF_HUB_DISABLE_TELEMETRY"], os.environ["USE_HUB_KERNELS"]) == ("0", "0")


def test_torchs_compiler_is_loaded_only_where_something_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    values = {"base": "a/b", "data": [{"path": "/x.jsonl"}]}
    without_compiler(Config.model_validate({**values, "speed": {"compile": True}}))
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    without_compiler(Config.model_validate(values))
    asked = "import sys, bitsandbytes; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    subprocess.run([sys.executable, "-c", asked], env=dict(os.environ), check=True)
