"""`ft`, run with a fault at a chosen moment: killed at its Nth write, a write torn, a disk full.

outcome = server.run("train", "c.yaml", cwd=tmp_path)
outcome.events                      # everything that was written below tmp_path, in order
server.run("train", "c.yaml", cwd=tmp_path, fault=Kill(at=17, torn=True))
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.watch import Event, Fault, Watch

ROOT = Path(__file__).parents[2]

LINGER_SECONDS = 10.0
"""How long processes that a command started may outlive it."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """None if a signal ended it."""
    signal: int | None
    stdout: str
    stderr: str
    events: Sequence[Event]
    """What it wrote below its folder, in order; the last one of a killed command is the one that it died at."""
    seconds: float

    def __str__(self) -> str:
        return f"code {self.code}, signal {self.signal}, {len(self.events)} events\n{self.stdout}{self.stderr}"


class FaultServer:
    """See `run`. Use as a context manager."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
        }
        command = [sys.executable, "-m", "tests.faults.server", str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self._lines = ours.makefile("rb")
        assert self._line() == {"ready": True}

    def run(
        self,
        *arguments: str | Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        fault: Fault | None = None,
        timeout: float = 120.0,
    ) -> Outcome:
        """Run `ft` in a folder, and watch what it writes below it.

        Processes that it starts are not watched, and must not outlive it for long. Raises TimeoutError.
        """
        request = {"arguments": [str(one) for one in arguments], "cwd": str(cwd), "env": dict(env or {})}
        began = time.monotonic()
        ours, theirs = socket.socketpair()
        with ours, theirs, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            files = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            process = int(self._line()["process"])
            theirs.close()
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
            assert descriptors, "the command could not be put under the filter"
            watch = Watch(descriptors[0], process, os.path.realpath(cwd), fault)
            try:
                status = self._supervise(watch, began + timeout)
            finally:
                os.close(descriptors[0])
            stdout.seek(0)
            stderr.seek(0)
            return Outcome(
                os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                stdout.read().decode(),
                stderr.read().decode(),
                watch.events,
                time.monotonic() - began,
            )

    def _supervise(self, watch: Watch, deadline: float) -> int:
        """Answer until the command has ended, and everything that it started too. The command's wait status."""
        poller = select.poll()
        poller.register(watch.listener, select.POLLIN)
        poller.register(self._socket, select.POLLIN)
        status: int | None = None
        while True:
            ready = dict(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(watch.process, signal.SIGKILL)
                raise TimeoutError("what it started goes on without it" if status is not None else "it hangs")
            if ready.get(watch.listener, 0) & select.POLLIN:
                watch.answer()
            elif ready.get(watch.listener, 0) & select.POLLHUP:
                poller.unregister(watch.listener)
                if status is None:
                    status = int(self._line()["status"])
                return status
            if self._socket.fileno() in ready and status is None:
                status = int(self._line()["status"])
                poller.unregister(self._socket)
                deadline = time.monotonic() + LINGER_SECONDS

    def _line(self) -> Any:
        line = self._lines.readline()
        assert line, "the fork server ended"
        return json.loads(line)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self._process.wait()

    def __enter__(self) -> FaultServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
