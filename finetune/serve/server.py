"""`ft serve`: a trained model as an OpenAI-compatible endpoint, on this machine alone unless it is told otherwise.

A GGUF file runs in the llama.cpp process that `ft chat` uses. An adapter or a merged folder runs in vLLM or
`transformers serve`, where they are installed and can do what is asked; they are commands of their own. With a key,
either listens at the address itself; without one, it stands behind `front.py`, which keeps web pages out.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from finetune.console import Console
from finetune.errors import ExportError, RunError
from finetune.llamacpp.process import Endpoint, Process
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged
from finetune.serve.address import KEY_VARIABLE, check_address, check_free, free_port, listeners
from finetune.serve.artifact import Artifact, artifacts, newest_artifact, to_gguf, warn_of_another
from finetune.serve.checks import check_artifact
from finetune.serve.child import Child
from finetune.serve.front import Front
from finetune.serve.others import OtherServer, other_server

PARALLEL = 4
"""Requests that llama.cpp answers at a time; more of them wait. They share one context."""

_BEHIND = "127.0.0.1"
"""Where a server without a key of the person's listens: behind `front.py`, on a port that nobody is told."""


@dataclass(frozen=True)
class Settings:
    using: str
    host: str
    port: int
    key: str | None
    context: int
    """Tokens that all requests together may hold; 0: as many as the model was trained with."""
    gpu_layers: int | None
    threads: int | None


def serve(run: RunFolder, settings: Settings, console: Console) -> None:
    """Serve a run until Ctrl-C, SIGTERM or the end of the terminal, which end it without an error.

    Raises ConfigError for an address that would be open to everybody, WorldError for a port that is in use, RunError
    for a run that nothing installed can serve, ExportError when the model does not load or its process ends.
    """
    if settings.key is not None and without_key(sys.argv) != sys.argv:
        _hide_key(settings.key)
    os.environ.pop(KEY_VARIABLE, None)  # the processes that are started here get it in other ways
    check_address(settings.host, settings.key)
    check_free(settings.host, settings.port)
    artifact = _artifact(run, settings.using)
    check_artifact(run, artifact)
    warn_of_another(run, artifact, console)
    with _stoppable(), logged(run.log):
        console.say(f"loading {artifact.path}")
        if artifact.kind == "gguf":
            _serve_gguf(run, artifact, settings, console)
        else:
            _serve_other(run, artifact, settings, console)
    with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal left
        console.say("stopped")


def without_key(arguments: Sequence[str]) -> list[str]:
    """A command line without `--api-key KEY` and `--api-key=KEY`."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--api-key" and not argument.startswith("--api-key="):
            kept.append(argument)
        skip = argument == "--api-key"
    return kept


def _hide_key(key: str) -> None:
    """Start this command once more, with the key in the environment and not in its arguments.

    Every user of a machine can read the arguments of every process (`ps`), and run logs hold the command line; an
    environment is read by its owner alone. Where a process cannot be replaced (Windows) only the log is spared.
    """
    sys.argv[:] = without_key(sys.argv)
    if os.name == "posix":
        again = without_key(sys.orig_argv)
        os.execve(sys.executable, [sys.executable, *again[1:]], os.environ | {KEY_VARIABLE: key})


def _artifact(run: RunFolder, using: str) -> Artifact:
    """`auto` is the newest GGUF file, where there is one: only llama.cpp is always at hand."""
    if using == "auto" and any(artifact.kind == "gguf" for artifact in artifacts(run)):
        using = "gguf"
    return newest_artifact(run, using, "serve")


# -- the two kinds of server --------------------------------------------------------------------------------------


def _serve_gguf(run: RunFolder, artifact: Artifact, settings: Settings, console: Console) -> None:
    options: dict[str, Any] = {
        "context": settings.context,
        "gpu_layers": settings.gpu_layers,
        "threads": settings.threads,
        "exact": False,
        "lora": [],
    }
    key = settings.key or secrets.token_hex(16)
    host, port = (_BEHIND, 0) if settings.key is None else (settings.host, settings.port)
    try:
        process = Process(artifact.path, options, run.log, Endpoint(host, port, key, run.name, PARALLEL))
    except ExportError:
        check_free(settings.host, settings.port)  # another program may have taken it while the model was loaded
        raise
    try:
        with _front(settings, process.port, key):
            _announce(settings, run.name, console)
            process.wait()
    finally:
        _ignore_signals()
        process.close()


def _serve_other(run: RunFolder, artifact: Artifact, settings: Settings, console: Console) -> None:
    key = settings.key or secrets.token_hex(16)
    host, port = (_BEHIND, free_port()) if settings.key is None else (settings.host, settings.port)
    server = other_server(run, artifact, (host, port), key, settings.context, needs_key=settings.key is not None)
    if server is None:
        raise RunError(
            f"nothing that is installed can serve the {artifact.kind} of this run",
            place=str(run.path),
            hint=f"{to_gguf(run)} makes a file that `ft serve` runs by itself",
        )
    with run.log.open("ab") as log:
        child = Child(server.command, os.environ | server.environment, log)
        try:
            console.say(f"starting {server.name}, which can take minutes")
            if _ready(child, host, port):
                with _front(settings, port, key):
                    _announce(settings, server.model, console)
                    child.wait()
            raise _ended(child.wait(), server, run, settings)
        finally:
            _ignore_signals()
            child.close()


def _front(settings: Settings, port: int, key: str) -> contextlib.AbstractContextManager[object]:
    """Without a key, the door before a server that listens on `port`; with one, that server is reached directly."""
    if settings.key is not None:
        return contextlib.nullcontext()
    return Front(listeners(settings.host, settings.port), (_BEHIND, port), key)


def _ready(child: Child, host: str, port: int) -> bool:
    """Wait until something listens. False if the process ended instead."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # "all interfaces" is no destination
    while child.runs():
        with contextlib.suppress(OSError), socket.create_connection((reachable, port), timeout=1):
            return True
        time.sleep(0.2)
    return False


def _ended(status: int, server: OtherServer, run: RunFolder, settings: Settings) -> ExportError:
    if settings.key is not None:
        check_free(settings.host, settings.port)  # another program may have taken it while the model was loaded
    return ExportError(
        f"{server.name} ended with status {status}", place=str(run.log), hint=f"the log says why; or {to_gguf(run)}"
    )


# -- ending, and what the person reads ----------------------------------------------------------------------------


class _Stop(BaseException):
    """Raised by a signal: whatever is going on ends, and is cleaned up."""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end what stands in here, and are no error."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop

    signals = _signals()
    before = [signal.signal(number, stop) for number in signals]
    try:
        with contextlib.suppress(_Stop):
            yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _signals() -> list[signal.Signals]:
    """What ends a server. SIGHUP, where there is one, is ignored under `nohup`, and stays so."""
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, hangup]


def _ignore_signals() -> None:
    """A second Ctrl-C must not interrupt the end: it would leave a process behind."""
    for number in _signals():
        signal.signal(number, signal.SIG_IGN)


def _announce(settings: Settings, model: str, console: Console) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{settings.port}"
    header = f" -H 'Authorization: Bearer '\"${KEY_VARIABLE}\"" if settings.key else ""
    console.say(f"serving {model} at {address}/v1")
    console.say("try:")
    console.say(f"  curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json' \\")
    console.say(f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'')
    console.say("stop it with Ctrl-C")
    console.event("serving", address=f"{address}/v1", model=model)
