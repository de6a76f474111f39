"""`ft serve`: a trained model as an OpenAI-compatible endpoint, on this machine alone unless it is told otherwise.

A GGUF file runs in the llama.cpp process that `ft chat` uses. An adapter or a merged folder runs in vLLM or
`transformers serve`, where they are installed and can do what is asked; they are commands of their own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from finetune.console import Console
from finetune.errors import ConfigError, ExportError, RunError, WorldError
from finetune.llamacpp.process import Endpoint, Process
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged
from finetune.serve.artifact import Artifact, artifacts, newest_artifact, to_gguf
from finetune.serve.others import OtherServer, other_server

PARALLEL = 4
"""Requests that llama.cpp answers at a time; more of them wait. They share one context."""

KEY_VARIABLE = "FT_API_KEY"
_END_SECONDS = 10.0


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
    """Serve a run until Ctrl-C or SIGTERM, which end it without an error.

    Raises ConfigError for an address that would be open to everybody, WorldError for a port that is in use, RunError
    for a run that nothing installed can serve, ExportError when the model does not load or its process ends.
    """
    if settings.key is not None and without_key(sys.argv) != sys.argv:
        _hide_key(settings.key)
    os.environ.pop(KEY_VARIABLE, None)  # the processes that are started here get it in other ways
    check_address(settings.host, settings.key)
    check_free(settings.host, settings.port)
    artifact = _artifact(run, settings.using)
    with _stoppable(), logged(run.log):
        console.say(f"loading {artifact.path}")
        if artifact.kind == "gguf":
            _serve_gguf(run, artifact, settings, console)
        else:
            _serve_other(run, artifact, settings, console)
    console.say("stopped")


def check_address(host: str, key: str | None) -> None:
    """Refuse a key that no header can carry, and an address beyond this machine without a key."""
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            "a key is one word of visible ASCII characters", place="--api-key", hint="`openssl rand -hex 16` makes one"
        )
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and key is None:
        raise ConfigError(
            "without a key, everybody who reaches this address could use the model",
            place=f"--host {host}",
            hint=f"put a key into the environment as {KEY_VARIABLE} (or give --api-key), or leave --host out",
        )


def check_free(host: str, port: int) -> None:
    """Raise WorldError unless this address can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # what ended a moment ago does not count; on Windows this would allow a second one
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WorldError(
            f"cannot listen here: {reason}",
            place=f"{host}:{port}",
            hint=f"choose another port (--port {port + 1}) or end the program that uses it",
        ) from error


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
    endpoint = Endpoint(settings.host, settings.port, settings.key, run.name, PARALLEL)
    process = Process(artifact.path, options, run.log, endpoint)
    try:
        _announce(settings.host, process.port, settings.key, run.name, console)
        process.wait()
    finally:
        _ignore_signals()
        process.close()


def _serve_other(run: RunFolder, artifact: Artifact, settings: Settings, console: Console) -> None:
    server = other_server(run, artifact, settings.host, settings.port, settings.key, settings.context)
    if server is None:
        raise RunError(
            f"nothing that is installed can serve the {artifact.kind} of this run",
            place=str(run.path),
            hint=f"{to_gguf(run)} makes a file that `ft serve` runs by itself",
        )
    environment = os.environ | server.environment
    with run.log.open("ab") as log:
        child = subprocess.Popen(server.command, env=environment, stdout=log, stderr=log)
        try:
            if _ready(child, server, settings, console):
                _announce(settings.host, settings.port, settings.key, server.model, console)
            raise _ended(child.wait(), server, run)
        finally:
            _ignore_signals()
            _end(child)


def _ready(child: subprocess.Popen[bytes], server: OtherServer, settings: Settings, console: Console) -> bool:
    """Wait until something listens. False if the process ended instead."""
    console.say(f"starting {server.name}, which can take minutes")
    while child.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(_reachable(settings), timeout=1):
            return True
        time.sleep(0.2)
    return False


def _reachable(settings: Settings) -> tuple[str, int]:
    """Where we reach the server ourselves: an address for all interfaces is no destination."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host), settings.port


def _ended(status: int, server: OtherServer, run: RunFolder) -> ExportError:
    return ExportError(
        f"{server.name} ended with status {status}", place=str(run.log), hint=f"the log says why; or {to_gguf(run)}"
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


# -- ending, and what the person reads ----------------------------------------------------------------------------


class _Stop(BaseException):
    """Raised by a signal: whatever is going on ends, and is cleaned up."""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what stands in here, and are no error."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in signals]
    try:
        with contextlib.suppress(_Stop):
            yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _ignore_signals() -> None:
    """A second Ctrl-C must not interrupt the end: it would leave a process behind."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _announce(host: str, port: int, key: str | None, model: str, console: Console) -> None:
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    header = f" -H 'Authorization: Bearer '\"${KEY_VARIABLE}\"" if key else ""
    console.say(f"serving {model} at {address}/v1")
    console.say("try:")
    console.say(f"  curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json' \\")
    console.say(f'    -d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'')
    console.say("stop it with Ctrl-C")
    console.event("serving", address=f"{address}/v1", model=model)
