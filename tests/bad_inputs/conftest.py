"""The real command on wrong input, in a folder where everything else is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .host import Host
from .made import finished_run, workplace

Refused = Callable[..., str]

SECONDS = 2.0
"""CPU time in which a person reads what is wrong, where no model is needed to find it out."""


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    with Host() as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good config, c.yaml, its rows, and its base."""
    return workplace(tmp_path)


@pytest.fixture
def run(folder: Path) -> Path:
    """A finished run, runs/good, of that config."""
    return finished_run(folder)


@pytest.fixture
def stories(folder: Path, assets: Path) -> Path:
    """The same folder, with a base that has no chat template and no tokens of one."""
    (folder / "base").rename(folder / "other-base")
    (folder / "base").symlink_to(assets / "models" / "stories260K")
    return folder


@pytest.fixture
def refused(tmp_path: Path, host: Host) -> Refused:
    """`refused("check", "c.yaml")` runs `ft` here and gives back what it says: `MESSAGE | HINT`, one a line.

    Every problem has a hint, there are ten at most and a count of the others, no traceback, nothing on stdout, and no
    library that takes seconds to load was loaded.
    """

    def run(*arguments: str | Path, code: int = 2, stdin: bytes = b"") -> str:
        outcome = host.run([str(argument) for argument in arguments], tmp_path, stdin=stdin)
        said = said_by(outcome.stderr.replace(f"{tmp_path}/", ""))
        assert outcome.code == code, outcome
        assert outcome.stdout == ""
        assert not outcome.heavy, f"it loaded {outcome.heavy}"
        assert outcome.seconds < SECONDS
        return said

    return run


def said_by(stderr: str) -> str:
    """The errors of an output, each with its hint."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    kinds = [line.partition(":")[0] for line in lines]
    assert kinds == ["error", "hint"] * (len(kinds) // 2), stderr
    assert 0 < len(kinds) <= 22, stderr
    texts = [line.partition(": ")[2] for line in lines]
    return "\n".join(f"{message} | {hint}" for message, hint in zip(texts[::2], texts[1::2], strict=True))
