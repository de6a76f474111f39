"""llama.cpp in a process of its own, spoken to over HTTP on the loopback address.

Why not in this process (`xllamacpp` could):

- a file it cannot digest ends in an `abort()` inside the library, which must not take `ft` with it;
- it logs to the file descriptors 1 and 2 from its own threads, which only a process can be kept from doing;
- when the process ends, its memory is the machine's again.

The address is guarded by a key that is drawn for each process and handed over through a pipe, so that other users of
the machine cannot use it. The process ends when its standard input does: when we close it, or when we end.

`ft serve` opens the same process to others: an `Endpoint` says where, under which name and with which key.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from finetune.errors import ExportError, MissingExtraError, StorageError
from finetune.llamacpp import child
from finetune.runs.files import temporary_storage

_SOCKET_NAME_BYTES = 103
"""The longest name of a socket: 107 on Linux, 103 on macOS."""
_QUIET, _VERBOSE = 1, 3  # llama.cpp's levels: 1 errors, 2 warnings, 3 information


@dataclass(frozen=True)
class Endpoint:
    """Where others than ourselves may use a model."""

    host: str
    port: int
    """0: any that is free."""
    key: str
    """What they must show as `Authorization: Bearer KEY`: llama.cpp asks nobody which page sent them."""
    name: str
    """The model's name in /v1/models."""
    parallel: int
    """How many requests are answered at a time; they share the context. More wait."""


class Process:
    """A running llama.cpp with one model. `settings` are what `_load` reads."""

    def __init__(
        self, path: Path, settings: dict[str, Any], log: Path | None, endpoint: Endpoint | None = None
    ) -> None:
        child.require_runtime(path)
        self._place = str(path)
        self._key = secrets.token_hex(16)
        with contextlib.ExitStack() as made:
            self._folder = made.enter_context(_socket_folder()) if endpoint is None else None
            """Where its socket lies, if it serves this process alone: no port, and nobody else may enter."""
            self._log = made.enter_context(_open_log(log))
            self._log_start = self._log.seek(0, os.SEEK_END)
            order = settings | {"path": str(path), "verbosity": _VERBOSE if log else _QUIET} | self._listen(endpoint)
            self._child = child.start("process", "serve", self._log)
            made.callback(child.end, self._child)
            self._address = self._start(order)
            self._made = made.pop_all()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request and return the whole answer."""
        with self._request(path, body) as response:
            try:
                answer: dict[str, Any] = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                raise self._explain(error) from error
        return answer

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Post a request and yield the events of the answer as they come. Closing the iterator stops the model."""
        with self._request(path, body) as response:
            try:
                for line in response:
                    kind, _, payload = line.decode().strip().partition(": ")
                    if kind not in ("data", "error") or payload == "[DONE]":
                        continue
                    event: dict[str, Any] = json.loads(payload)
                    if kind == "error" or "error" in event:
                        raise self._refused(_words(event))
                    yield event
            except (OSError, http.client.HTTPException) as error:
                raise self._explain(error) from error

    def wait(self) -> NoReturn:
        """Wait until the process ends by itself, and raise ExportError. Signal handlers may raise something else."""
        while self._child.poll() is None:
            time.sleep(0.5)
        raise self._explain(OSError())

    def close(self) -> None:
        """End the process. May be called twice."""
        self._made.close()

    def _listen(self, endpoint: Endpoint | None) -> dict[str, Any]:
        """Where to listen, and which keys to take. Without an endpoint: for us alone."""
        if endpoint is None:
            host = "127.0.0.1" if self._folder is None else os.path.join(self._folder, "llama.sock")
            return {"host": host, "port": 0, "keys": [self._key], "name": None, "parallel": 1}
        return {
            "host": endpoint.host,
            "port": endpoint.port,
            "keys": [self._key, endpoint.key],
            "name": endpoint.name,
            "parallel": endpoint.parallel,
        }

    def _start(self, order: dict[str, Any]) -> str:
        """Send the order, wait for the model to be loaded, return where it listens."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(OSError):  # a process that died at once is told apart by its missing answer
            self._child.stdin.write(json.dumps(order).encode() + b"\n")
            self._child.stdin.flush()
        answer = self._child.stdout.readline()
        reply = json.loads(answer) if answer else {"error": "its process ended"}
        if "error" in reply:
            words = self._logged_error() or reply["error"]
            raise ExportError(f"llama.cpp cannot load this file: {words}", place=self._place)
        return str(reply["address"])

    @property
    def host(self) -> str:
        """Of an endpoint: the address that it listens on."""
        return self._address.removeprefix("http://").rpartition(":")[0]

    @property
    def port(self) -> int:
        """Of an endpoint: the port that it listens on."""
        return int(self._address.rpartition(":")[2])

    def _connection(self) -> http.client.HTTPConnection:
        if self._address.startswith("unix://"):
            return _SocketConnection(self._address.removeprefix("unix://"))
        return http.client.HTTPConnection(self.host, self.port)

    @contextlib.contextmanager
    def _request(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
            try:
                connection.request("POST", path, json.dumps(body), headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise self._explain(error) from error
            if response.status != 200:
                try:
                    words = _words(json.loads(response.read()))
                except ValueError:
                    words = f"status {response.status}"
                raise self._refused(words)
            yield response
        finally:
            connection.close()

    def _refused(self, words: str) -> ExportError:
        return ExportError(f"llama.cpp could not answer: {words}", place=self._place)

    def _explain(self, error: Exception) -> ExportError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1.0)
        status = self._child.poll()
        words = str(error) or type(error).__name__ if status is None else f"its process ended with status {status}"
        return ExportError(f"llama.cpp stopped working: {words}", place=self._place)

    def _logged_error(self) -> str | None:
        """The first error that this process has logged, without its time stamp."""
        self._log.seek(self._log_start)
        for line in self._log.read().decode(errors="replace").splitlines():
            if match := re.match(r"[\d.]+ E +(.+)", line):
                return match.group(1)
            if "GGML_ASSERT" in line or "Error:" in line:
                return line.strip()
        return None


@contextlib.contextmanager
def _socket_folder() -> Iterator[str | None]:
    """A new folder for a socket, or None where the system has no such sockets, or its name would be too long."""
    if not hasattr(socket, "AF_UNIX") or os.name != "posix":
        yield None
        return
    with temporary_storage():
        folder = tempfile.mkdtemp(prefix="ft-llama-")
    if len(os.fsencode(folder)) + len("/llama.sock") > _SOCKET_NAME_BYTES:
        os.rmdir(folder)
        yield None
        return
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _SocketConnection(http.client.HTTPConnection):
    """HTTP through a socket in the file system: it works without any network, and only its owner can open it."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def _words(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _open_log(log: Path | None) -> IO[bytes]:
    if log is None:
        with temporary_storage():
            return tempfile.TemporaryFile()
    try:
        return log.open("a+b")
    except OSError as error:
        raise StorageError(f"the log cannot be written: {error.strerror}", place=str(log)) from error


# -- the other process --------------------------------------------------------------------------------------------


def serve() -> None:
    """Load what standard input orders, say where it listens, and wait for standard input to close."""
    # The library writes to descriptor 1 as it likes; what is meant for the parent gets a descriptor of its own.
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent: it may only want the answer to stop
    order = json.loads(sys.stdin.readline())
    try:
        server = _load(order)
        if order["name"] is not None:
            _log_errors_alone()
        reply = {"address": server.listening_address}
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), file=parent, flush=True)
    sys.stdin.read()
    if os.path.isabs(order["host"]):  # the parent may have been killed, and leave its folder to us
        shutil.rmtree(os.path.dirname(order["host"]), ignore_errors=True)
    os._exit(0)


def _log_errors_alone() -> None:
    """Once a model is loaded, what llama.cpp says of each request (ten lines) would fill the disk in time.

    The name is that of a variable in common/log.cpp of llama.cpp; in a wheel that we do not know, nothing is changed.
    """
    from finetune.llamacpp.library import library

    with contextlib.suppress(MissingExtraError, ValueError):
        ctypes.c_int.in_dll(library(), "common_log_verbosity_thold").value = _QUIET


def _load(order: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = order["path"]
    params.hostnames = [order["host"]]
    params.port = order["port"]
    params.api_keys = order["keys"]
    # Pages of other sites that a person has open in a browser are not to read answers.
    params.cors_origins = "localhost"
    params.cors_credentials = False
    params.endpoint_slots = False  # it would tell one user what another asks
    if order["name"] is not None:
        params.model_alias = {order["name"]}
    params.verbosity = order["verbosity"]
    params.n_ctx = order["context"]
    params.n_parallel = order["parallel"]
    params.kv_unified = order["parallel"] > 1  # one request may use the whole context while the others are short
    # What is left open is chosen to fit into the GPU's memory; what is asked for stays.
    params.fit_params = order["gpu_layers"] is None or order["context"] == 0
    params.warmup = False
    params.ui = False
    params.cache_ram_mib = 0
    if order["gpu_layers"] is not None:
        params.n_gpu_layers = order["gpu_layers"]
    if order["threads"] is not None:
        params.cpuparams.n_threads = order["threads"]
        params.cpuparams_batch.n_threads = order["threads"]
    if order["exact"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in order.get("lora", ())]
    return xllamacpp.Server(params)
