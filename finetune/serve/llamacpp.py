"""A GGUF file in llama.cpp: text to token ids, token ids to token ids, messages to text.

llama.cpp (through `xllamacpp`) runs in a process of its own and is spoken to over HTTP on the loopback address:

- a file it cannot digest ends in an `abort()` inside the library, which must not take `ft` with it;
- it logs to the file descriptors 1 and 2 from its own threads, which only a process can be kept from doing;
- when the process ends, its memory is the machine's again.

The address is guarded by a key that is drawn for each process and handed over through a pipe, so that other users of
the machine cannot use it. The process ends when its standard input does: with `close()`, or with us.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from finetune.errors import ExportError, MissingExtraError, StorageError

Message = Mapping[str, str]

_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from finetune.serve.llamacpp import _serve; _serve()"
_CLOSE_SECONDS = 5.0
_QUIET, _VERBOSE = 1, 3  # llama.cpp's levels: 1 errors, 2 warnings, 3 information


class LlamaCpp:
    """One model, loaded and ready. Use as a context manager, or call `close`.

    path        a GGUF file
    context     tokens of context to reserve memory for; 0 asks for as many as the model was trained with
    gpu_layers  how many layers go to the GPU; None lets llama.cpp choose, 0 keeps all on the CPU
    threads     CPU threads; None lets llama.cpp choose
    log         a file that llama.cpp's own log is appended to; None drops it

    Raises MissingExtraError without `xllamacpp`, StorageError for a missing file or a log that cannot be opened,
    ExportError when llama.cpp refuses the file (its own words are in the message).
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        gpu_layers: int | None = None,
        threads: int | None = None,
        log: Path | None = None,
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise MissingExtraError("llama.cpp is not installed", hint='pip install "finetune[gguf]"')
        if not path.is_file():
            raise StorageError("there is no such file", place=str(path))
        self.path = path
        self._key = secrets.token_hex(16)
        self._log = _open_log(log)
        self._log_start = self._log.seek(0, os.SEEK_END)
        order = {
            "path": str(path),
            "context": context,
            "gpu_layers": gpu_layers,
            "threads": threads,
            "verbosity": _VERBOSE if log else _QUIET,
            "key": self._key,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self._host, self._port = self._start(order)
        except BaseException:
            self.close()
            raise

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The token ids of a text. `add_special` puts the model's BOS (and EOS) around it, `parse_special` reads
        `<|im_end|>` and its like as the tokens they name rather than as plain text."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._ask("/tokenize", body)["tokens"]]

    def generate_ids(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The most likely continuation (greedy: no sampling, no penalties), `max_tokens` ids at most.

        An end-of-turn token ends it and is not among the ids. Nothing is kept between calls.
        """
        body = {
            "prompt": [int(token) for token in prompt_ids],
            "n_predict": max_tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "temperature": 0.0,
            "return_tokens": True,
            "cache_prompt": False,
        }
        return [int(token) for token in self._ask("/completion", body)["tokens"]]

    def apply_template(self, messages: Sequence[Message]) -> str:
        """The prompt llama.cpp makes of a conversation with the template inside the file, ready for an answer."""
        return str(self._ask("/apply-template", {"messages": [dict(message) for message in messages]})["prompt"])

    def chat(
        self, messages: Sequence[Message], *, max_tokens: int, temperature: float, stream: bool = True
    ) -> Iterator[str]:
        """The answer to a conversation, piece by piece (all at once without `stream`).

        The template inside the file is used, and what the model writes comes back as written: thoughts are not cut
        out. Temperature 0 is greedy; above it llama.cpp's usual sampling applies. Closing the iterator stops the
        model.
        """
        body: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": stream,
            "reasoning_format": "none",
        }
        if temperature == 0.0:
            body |= {"top_k": 1, "samplers": ["top_k"]}
        if not stream:
            yield str(self._ask("/v1/chat/completions", body)["choices"][0]["message"]["content"] or "")
            return
        with self._request("/v1/chat/completions", body) as response:
            for line in _lines(response, self._explain):
                kind, _, payload = line.partition(": ")
                if kind == "error":
                    raise ExportError(f"llama.cpp could not answer: {payload}", place=str(self.path))
                if kind != "data" or payload == "[DONE]":
                    continue
                event = json.loads(payload)
                if "error" in event:
                    raise ExportError(f"llama.cpp could not answer: {_reason(event)}", place=str(self.path))
                for choice in event.get("choices", []):
                    if piece := choice.get("delta", {}).get("content"):
                        yield str(piece)

    def close(self) -> None:
        """End the process and give its memory back. May be called twice."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- speaking with the process --------------------------------------------------------------------------------

    def _start(self, order: dict[str, Any]) -> tuple[str, int]:
        """Send the order, wait for the model to be loaded, return where it listens."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # a process that died at once is told apart by its missing answer
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        reply = json.loads(answer) if answer else {"error": "the process ended"}
        if "error" in reply:
            raise ExportError(
                f"llama.cpp cannot load this file: {self._logged_error() or reply['error']}", place=str(self.path)
            )
        host, _, port = str(reply["address"]).removeprefix("http://").rpartition(":")
        return host, int(port)

    @contextlib.contextmanager
    def _request(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, self._port)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
            try:
                connection.request("POST", path, json.dumps(body), headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise self._explain(error) from error
            if response.status != 200:
                try:
                    words = _reason(json.loads(response.read()))
                except ValueError:
                    words = f"status {response.status}"
                raise ExportError(f"llama.cpp could not answer: {words}", place=str(self.path))
            yield response
        finally:
            connection.close()

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._request(path, body) as response:
            try:
                answer: dict[str, Any] = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                raise self._explain(error) from error
        return answer

    def _explain(self, error: Exception) -> ExportError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        status = self._process.poll()
        words = str(error) or type(error).__name__ if status is None else f"its process ended with status {status}"
        return ExportError(f"llama.cpp stopped working: {words}", place=str(self.path))

    def _logged_error(self) -> str | None:
        """The first error that this process has logged, without its time stamp."""
        with contextlib.suppress(OSError, ValueError):
            self._log.seek(self._log_start)
            for line in self._log.read().decode(errors="replace").splitlines():
                if match := re.match(r"[\d.]+ E +(.+)", line):
                    return match.group(1)
                if "GGML_ASSERT" in line or "Error:" in line:
                    return line.strip()
        return None


def _lines(response: http.client.HTTPResponse, explain: Callable[[Exception], ExportError]) -> Iterator[str]:
    try:
        for line in response:
            if text := line.decode().strip():
                yield text
    except (OSError, http.client.HTTPException) as error:
        raise explain(error) from error


def _reason(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _open_log(log: Path | None) -> IO[bytes]:
    if log is None:
        return tempfile.TemporaryFile()
    try:
        return log.open("a+b")
    except OSError as error:
        raise StorageError(f"the log cannot be written: {error.strerror}", place=str(log)) from error


def _serve() -> None:
    """The life of the other process: load what standard input orders, say where, and wait for it to close."""
    # The library writes to descriptor 1 as it likes; what is meant for the parent gets a descriptor of its own.
    parent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent: it may only want the answer to stop
    order = json.loads(sys.stdin.readline())
    try:
        server = _load(order)
        reply = {"address": server.listening_address}
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), file=parent, flush=True)
    sys.stdin.read()
    os._exit(0)


def _load(order: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = order["path"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # any free one
    params.api_keys = [order["key"]]
    params.verbosity = order["verbosity"]
    params.n_ctx = order["context"]
    params.n_parallel = 1
    params.fit_params = False  # the context asked for, not one that was shrunk to fit
    params.warmup = False
    params.ui = False
    params.cache_ram_mib = 0
    if order["gpu_layers"] is not None:
        params.n_gpu_layers = order["gpu_layers"]
    if order["threads"] is not None:
        params.cpuparams.n_threads = order["threads"]
        params.cpuparams_batch.n_threads = order["threads"]
    return xllamacpp.Server(params)
