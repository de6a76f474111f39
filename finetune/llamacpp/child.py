"""Starting and ending a process of our own that runs llama.cpp. It ends when its standard input does."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import IO

from finetune.errors import MissingExtraError, StorageError

CLOSE_SECONDS = 5.0
"""How long an ending process is waited for before it is killed."""


def require_runtime(*files: Path) -> None:
    """Raise MissingExtraError without `xllamacpp`, StorageError for a file that is not there."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingExtraError("llama.cpp is not installed", hint='pip install "finetune[gguf]"')
    for file in files:
        if not file.is_file():
            raise StorageError("there is no such file", place=str(file))


def start(module: str, function: str, log: IO[bytes], *, pipe_bytes: int = -1) -> subprocess.Popen[bytes]:
    """Run a function of `finetune.llamacpp` in a new process; what it and llama.cpp print goes to `log`.

    pipe_bytes  how much the pipes hold; -1 leaves that to the system
    """
    code = (
        f"import sys; sys.path.insert(0, sys.argv[1]); from finetune.llamacpp.{module} import {function}; {function}()"
    )
    # -P: no module is taken from the folder that happens to be the current one.
    command = [sys.executable, "-P", "-c", code, str(Path(__file__).parents[2])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, pipesize=pipe_bytes)


def end(child: subprocess.Popen[bytes]) -> None:
    """Close its input, wait for it, kill it if that takes too long. May be called twice."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(OSError):
        child.stdin.close()
    try:
        child.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()
