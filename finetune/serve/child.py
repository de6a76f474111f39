"""Another server, started so that it ends when we do, however we end.

Who is killed (`kill -9`, or for want of memory) cannot end its children, and a server that goes on keeps the GPU's
memory and the port. So a small process stands between: its standard input is a pipe that closes with us.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from finetune.serve.child import main; main()"
_END_SECONDS = 10.0


class Child:
    """A command that runs. What it prints is appended to `log`; `environment` is the whole of its environment."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> None:
        # -P: no module is taken from the folder that happens to be the current one.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, str(Path(__file__).parents[2]), *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )

    def runs(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Wait until it ends by itself. Returns its status, as shells tell it: 128 + n for the signal n."""
        return self._process.wait()

    def close(self) -> None:
        """End it: a polite signal, and after ten seconds another one."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(2 * _END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# -- the process between ------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command in the arguments until it ends or standard input does."""
    # Ctrl-C and the end of a terminal reach the server too. They are caught and not ignored, because what is ignored
    # stays so in a child; what is ignored already (`nohup`) is to stay so.
    for name in ("SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
    status = server.wait()
    sys.stderr.flush()
    os._exit(status if status >= 0 else 128 - status)


def _end_with_input(server: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    server.terminate()
    try:
        server.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
