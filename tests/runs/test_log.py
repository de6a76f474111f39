"""log.txt takes what libraries say; the console keeps the screen."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import pytest

from finetune.console import Console
from finetune.errors import StorageError
from finetune.runs.log import logged, quiet_environment


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


def test_a_persons_own_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    quiet_environment()
    assert (os.environ["HF_HUB_DISABLE_TELEMETRY"], os.environ["USE_HUB_KERNELS"]) == ("0", "0")
