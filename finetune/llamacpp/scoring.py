"""The process behind `logits.Scorer`: it holds one model and answers what standard input asks.

A request is a line of JSON, and so is its answer, on what standard output was at the start; logits follow their line
as raw float32. The first request says which model to load. The process ends as soon as standard input does, even in
the middle of a computation: whoever asked is gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from finetune.errors import ExportError, FinetuneError
from finetune.llamacpp.native import FLASH_ATTENTION_OFF, GGML_TYPE_F32, LOG_ERROR, Batch, LogCallback, native

_PIECE_BYTES = 2**25
_LEAST_PIECE, _MOST_PIECE = 16, 512


def main() -> None:
    """Answer requests until standard input ends."""
    # The library writes to descriptor 1 as it likes; what is meant for the parent gets a descriptor of its own.
    parent = os.fdopen(os.dup(1), "wb", buffering=2**20)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort would start a debugger, which takes seconds
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    model: _Model | None = None
    while True:
        request = requests.get()
        try:
            if model is None:
                model = _Model(request)
                reply, rows = model.description(), 0
            else:
                reply, rows = model.answer(request)
        except FinetuneError as error:
            problem = error.problems[0]
            kind = type(error).__name__
            reply, rows = {"error": problem.message, "place": problem.place, "hint": problem.hint, "kind": kind}, 0
        parent.write(json.dumps(reply).encode() + b"\n")
        if model is not None:
            model.write_logits(parent, rows)
        parent.flush()


def _listen(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)


class _Model:
    """A model with a context for one sequence."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._errors: list[str] = []
        self._llama = native()
        self._log = LogCallback(self._on_log)  # kept: llama.cpp goes on calling it
        self._llama.llama_log_set(self._log, None)
        self._llama.llama_backend_init()
        model = self._load_model(order["path"])
        self._vocab = self._llama.llama_model_get_vocab(model)
        self._rows = self._llama.llama_vocab_n_tokens(self._vocab)
        # Adapters must be there before the context, which reserves memory for what they compute.
        adapters = [(self._load_adapter(model, path), scale) for path, scale in order["lora"]]
        self._piece = max(_LEAST_PIECE, min(_MOST_PIECE, _PIECE_BYTES // (4 * self._rows)))
        self._context = self._make_context(model, order)
        if adapters:
            self._use(adapters)
        self._greedy = self._llama.llama_sampler_init_greedy()

    def description(self) -> dict[str, Any]:
        """What the parent wants to know: rows of the vocabulary, tokens of context, tokens of a piece."""
        return {"vocabulary": self._rows, "context": self._llama.llama_n_ctx(self._context), "piece": self._piece}

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The reply to a request, and how many rows of logits follow it."""
        match request["do"]:
            case "read":
                if request["fresh"]:
                    self._forget()
                self._read(request["ids"], all_logits=True)
                return {}, len(request["ids"])
            case "greedy":
                return {"ids": self._continue(request["ids"], request["max_tokens"], set(request["stop_ids"]))}, 0
            case "tokenize":
                return {"ids": self._tokenize(request)}, 0
            case _:
                return {"end": bool(self._llama.llama_vocab_is_eog(self._vocab, request["id"]))}, 0

    def write_logits(self, out: IO[bytes], rows: int) -> None:
        """The logits of the tokens that were read last, row by row as they lie in llama.cpp's memory."""
        for row in range(rows):
            address = self._llama.llama_get_logits_ith(self._context, row)
            out.write((ctypes.c_char * (4 * self._rows)).from_address(address))

    # -- loading ------------------------------------------------------------------------------------------------

    def _load_model(self, path: str) -> int:
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = 0
        model: int | None = self._llama.llama_model_load_from_file(os.fsencode(path), params)
        if model is None:
            raise ExportError(f"llama.cpp cannot load this file: {self._words()}", place=path)
        return model

    def _load_adapter(self, model: int, path: str) -> int:
        adapter: int | None = self._llama.llama_adapter_lora_init(model, os.fsencode(path))
        if adapter is None:
            raise ExportError(f"llama.cpp cannot load this adapter: {self._words()}", place=path)
        return adapter

    def _make_context(self, model: int, order: dict[str, Any]) -> int:
        params = self._llama.llama_context_default_params()
        params.n_ctx = order["context"] or self._llama.llama_model_n_ctx_train(model)
        params.n_batch = params.n_ubatch = self._piece = min(self._piece, params.n_ctx)
        params.n_outputs_max = params.n_outputs_max_per_seq = self._piece
        params.n_threads = params.n_threads_batch = order["threads"]
        params.offload_kqv = params.op_offload = False
        if order["exact"]:
            params.type_k = params.type_v = GGML_TYPE_F32
            params.flash_attn_type = FLASH_ATTENTION_OFF
        context: int | None = self._llama.llama_init_from_model(model, params)
        if context is None:
            raise ExportError(f"llama.cpp cannot run this file: {self._words()}", place=order["path"])
        return context

    def _use(self, adapters: Sequence[tuple[int, float]]) -> None:
        count = len(adapters)
        handles = (ctypes.c_void_p * count)(*(adapter for adapter, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        if self._llama.llama_set_adapters_lora(self._context, handles, count, scales):
            raise ExportError(f"llama.cpp cannot use these adapters: {self._words()}")

    # -- reading ------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _read(self, ids: Sequence[int], *, all_logits: bool) -> None:
        """Read at most a piece of tokens after those read before; logits of all of them, or of the last."""
        count = len(ids)
        tokens = (ctypes.c_int32 * count)(*ids)
        wanted = (ctypes.c_int8 * count)(*([all_logits] * (count - 1)), 1)
        if self._llama.llama_decode(self._context, Batch(n_tokens=count, token=tokens, logits=wanted)):
            raise ExportError(f"llama.cpp could not compute: {self._words()}")

    def _continue(self, ids: Sequence[int], max_tokens: int, stop_ids: set[int]) -> list[int]:
        self._forget()
        for start in range(0, len(ids), self._piece):
            self._read(ids[start : start + self._piece], all_logits=False)
        written: list[int] = []
        while len(written) < max_tokens:
            if written:
                self._read(written[-1:], all_logits=False)
            written.append(self._llama.llama_sampler_sample(self._greedy, self._context, -1))
            if written[-1] in stop_ids:
                break
        return written

    def _tokenize(self, request: dict[str, Any]) -> list[int]:
        text = request["text"].encode()
        room = len(text) + 8
        for _ in range(2):  # the second time with as much room as the first has asked for
            ids = (ctypes.c_int32 * room)()
            count = self._llama.llama_tokenize(
                self._vocab, text, len(text), ids, room, request["add_special"], request["parse_special"]
            )
            if count >= 0:
                return ids[:count]
            room = -count
        raise ExportError("llama.cpp cannot tokenize a text of this length")

    # -- what llama.cpp says ------------------------------------------------------------------------------------

    def _on_log(self, level: int, text: bytes, _: object) -> None:
        if level == LOG_ERROR:
            self._errors.append(text.decode(errors="replace").strip())

    def _words(self) -> str:
        """The first of the errors since the last time: those after it only say what failed because of it."""
        words = self._errors[0] if self._errors else "it does not say why"
        self._errors.clear()
        return words
