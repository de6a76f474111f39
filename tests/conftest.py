"""What all tests share: real inputs, and the real command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says more about the machine's other work than about the code.
hypothesis.settings.register_profile("ft", deadline=None)
hypothesis.settings.load_profile("ft")

ASSETS = Path(__file__).parents[2] / "shared" / "assets"


ALL_ITEMS = pytest.StashKey[list[pytest.Item]]()
"""Every test there is, those included that are not run by default."""


def pytest_configure(config: pytest.Config) -> None:
    """Signals as a terminal has them: `nohup make test &` starts its children with some that are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="FILE", help="Write the table of faults that tests prove survived.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[ALL_ITEMS] = list(items)
    if file := config.getoption("--reliability"):
        from tests.reliability import faults, page

        Path(file).write_text(page(faults(items)), "utf-8")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models, tokenizers, chat templates and data; tests that need them are skipped in a fresh clone."""
    if not ASSETS.is_dir():
        pytest.skip("the shared assets are not here")
    return ASSETS


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str


RunFt = Callable[..., Result]


@pytest.fixture(scope="session")
def run_ft() -> RunFt:
    """Runs `ft` as a person does: `run_ft("check", "a.yaml", cwd=tmp_path).code`. The Hub is out of reach."""

    def run(*args: str | Path, cwd: Path | None = None) -> Result:
        command = [sys.executable, "-m", "finetune.cli", *map(str, args)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=300)
        return Result(done.returncode, done.stdout, done.stderr)

    return run
