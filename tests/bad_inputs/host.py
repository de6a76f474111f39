"""One light process that forks a child for every command, so that hundreds of real command lines take seconds.

It holds what `ft check` needs and none of the libraries that take seconds to load. The child is a command like any
other: its own streams, folder, environment and exit code; nothing that it changes outlives it. Orders and answers are
JSON, one a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MEMORY = 8 << 30
"""Bytes of address space that a command may take: what reads without end must not take the machine with it."""

HEAVY = ("torch", "transformers", "trl", "peft", "datasets")
"""Each takes a second or more to load, which nobody should wait for to read about a wrong key."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    """The exit code; minus the signal's number where one killed it."""
    stdout: str
    stderr: str
    heavy: list[str]
    """Those of HEAVY that it loaded."""
    seconds: float
    """CPU time of the command and its children. Wall-clock time would say what else the machine is doing."""
    peak: int
    """The most memory that it held, in bytes."""


class Host:
    """Use as a context manager."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve())]
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, encoding="utf-8"
        )

    def run(self, arguments: list[str], folder: Path, *, stdin: bytes = b"", limit: float = 60) -> Outcome:
        """Run `ft ARGUMENTS` in a folder. After `limit` seconds it is killed, and its code is -14 (SIGALRM)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": arguments, "folder": str(folder), "stdin": stdin.decode("latin-1"), "limit": limit}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# -- the other process --------------------------------------------------------------------------------------------


def _serve() -> None:
    import jinja2  # noqa: F401 - loaded once, for all children
    import numpy  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import tokenizers  # noqa: F401
    import typer.main

    import finetune.cli
    import finetune.delivery
    import finetune.export.merged
    import finetune.overview
    import finetune.serve.chat
    import finetune.serve.server

    # Making typer's commands out of ours is half of what a refusal costs, and comes out the same every time.
    made = typer.main.get_command(finetune.cli.app)
    typer.main.get_command = lambda app: made
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(order: dict[str, object]) -> dict[str, object]:
    import tempfile

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
        given.write(str(order["stdin"]).encode("latin-1"))
        given.seek(0)
        with tempfile.TemporaryFile() as told:
            child = os.fork()
            if child == 0:
                _command(order, given.fileno(), out.fileno(), err.fileno(), told.fileno())
            _, status, used = os.wait4(child, 0)
            told.seek(0)
            heavy = json.loads(told.read() or b"[]")
        out.seek(0)
        err.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "stdout": out.read().decode(),
            "stderr": err.read().decode(),
            "heavy": heavy,
            "seconds": used.ru_utime + used.ru_stime,
            "peak": used.ru_maxrss * 1024,
        }


def _command(order: dict[str, object], given: int, out: int, err: int, told: int) -> None:
    """The child: becomes the command, and never returns."""
    import resource
    import signal

    code = 99
    try:
        for descriptor, target in ((given, 0), (out, 1), (err, 2)):
            os.dup2(descriptor, target)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - ends with the process
        os.chdir(str(order["folder"]))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(int(float(str(order["limit"]))))
        arguments = order["arguments"]
        assert isinstance(arguments, list)
        sys.argv = ["ft", *arguments]
        from finetune.cli import main

        try:
            main()
            code = 0
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(told, json.dumps([name for name in HEAVY if name in sys.modules]).encode())
        os._exit(code)


if __name__ == "__main__":
    _serve()
