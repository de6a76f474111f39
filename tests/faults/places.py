"""`ft` in other places: on disks that are too small, read-only or somebody else's, in other languages and time zones.

    with Place(mounts=True) as place:
        place.mount(folder, mebibytes=64)
        place.run("merge", "runs/tiny", cwd=folder, neighbour=("merge", 0))

As a program: the process that is there, which has imported everything once and forks for each command.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import locale
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]

FILLER = "a neighbour's file"


def missing() -> str | None:
    """Why there can be no namespace with mounts here; None if there can."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "mounts of one's own are Linux's"
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no mounts of one's own here: {tried.stderr.strip()}"


class Place:
    """See above. Use as a context manager.

    mounts       in a mount namespace of its own
    environment  of the process, from its start on
    """

    def __init__(self, *, mounts: bool = False, environment: Mapping[str, str] | None = None) -> None:
        everywhere = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
        }
        command = [*(["unshare", "-rm"] if mounts else []), sys.executable, "-m", "tests.faults.places"]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **everywhere, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def mount(self, folder: Path, *, mebibytes: int) -> None:
        """A small disk on a folder. What is put there can be seen by commands alone: `shell` looks at it."""
        self.shell(f'mount -t tmpfs -o size={mebibytes}M none "$0"', folder)

    def shell(self, script: str, *arguments: str | Path) -> str:
        """Run a line of shell inside; its output."""
        done = self._ask({"shell": script, "arguments": [str(one) for one in arguments]})
        assert done["code"] == 0, done
        return str(done["stdout"])

    def run(
        self,
        *arguments: str | Path,
        cwd: Path,
        env: dict[str, str] | None = None,
        limit: int | None = None,
        powerless: bool = False,
        neighbour: tuple[str, int] | None = None,
        stop: int | None = None,
        language: str | None = None,
        umask: int = 0o022,
    ) -> subprocess.CompletedProcess[str]:
        """Run `ft`.

        limit      bytes of the largest file that it may write
        powerless  even root cannot write where the mode of a folder says so
        neighbour  when the stage of this name ("merge", "gguf", "train") has begun, somebody else writes the disk full
                   but for so many bytes
        stop       the step at whose checkpoint SIGTERM arrives
        language   what the C library's locale is set to: its numbers, its dates, its characters
        """
        request = {"arguments": [str(one) for one in arguments], "cwd": str(cwd), "env": env or {}, "limit": limit}
        request |= {"powerless": powerless, "neighbour": neighbour, "stop": stop, "language": language, "umask": umask}
        done = self._ask(request)
        return subprocess.CompletedProcess(request["arguments"], done["code"], done["stdout"], done["stderr"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that was there ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()


# -- inside -------------------------------------------------------------------------------------------------------


def main() -> None:
    import gc

    from tests.faults.server import _import_everything, _warm_up

    # What the libraries print must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_everything()
    _warm_up()
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            if "shell" in request:
                command = ["sh", "-ec", request["shell"], *request["arguments"]]
                code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr).returncode
            else:
                child = os.fork()
                if child == 0:
                    _run(request, stdout.fileno(), stderr.fileno())
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = {}
            for name, file in (("stdout", stdout), ("stderr", stderr)):
                file.seek(0)
                texts[name] = file.read().decode("utf-8", "backslashreplace")
        print(json.dumps({"code": code, **texts}), file=answers, flush=True)


def _run(request: dict[str, Any], stdout: int, stderr: int) -> NoReturn:
    from tests.faults.server import _become

    try:
        if request["neighbour"] is not None:
            stage, left = request["neighbour"]
            _invite(stage, Path(request["cwd"]), left)
        if request["stop"] is not None:
            _stop_at(request["stop"])
        if request["limit"] is not None:
            # The files that take what is printed are written by this process too: they are small.
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        if request["powerless"]:
            _give_up_capabilities()
        os.umask(request["umask"])
        os.environ.update(request["env"])
        time.tzset()
        if request["language"] is not None:
            locale.setlocale(locale.LC_ALL, request["language"])
        _become(request, stdout, stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)


def _stop_at(step: int) -> None:
    import finetune.train.checkpoints as checkpoints

    real = checkpoints.write

    def ask_first(folder: Path, number: int, fill: Callable[[Path], None]) -> Path:
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(folder, number, fill)

    checkpoints.write = ask_first


def _invite(stage: str, folder: Path, left: int) -> None:
    """Have the disk filled up once the room for a stage was counted and its first bytes are about to be written."""
    if stage == "merge":
        import finetune.export.merge as module

        _then(module, "_write_all", folder, left)
    elif stage == "gguf":
        _then(sys.modules["finetune.export.gguf.convert"], "_write_head", folder, left)
    elif stage == "train":
        # At the second checkpoint: the first is whole.
        import finetune.train.checkpoints as checkpoints

        _then(checkpoints, "write", folder, left, when=lambda arguments: arguments[1] > 1)
    else:
        raise AssertionError(stage)


def _then(
    module: Any, name: str, folder: Path, left: int, when: Callable[[tuple[Any, ...]], bool] = lambda arguments: True
) -> None:
    real = getattr(module, name)

    def fill_up_first(*arguments: Any, **named: Any) -> Any:
        if when(arguments):
            free = shutil.disk_usage(folder).free
            with contextlib.suppress(OSError), open(folder / FILLER, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, free - left)
        return real(*arguments, **named)

    setattr(module, name, fill_up_first)


def _give_up_capabilities() -> None:
    """capset(2): root without a capability may write only where the mode lets it."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(126 if os.uname().machine == "x86_64" else 91, header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    main()
