"""A GGUF file in llama.cpp, asked for its numbers: the logits of every position, to compare with other programs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError, MissingExtraError
from finetune.llamacpp import child
from finetune.runs.files import temporary_storage

if TYPE_CHECKING:
    import numpy
    import numpy.typing

    Logits = numpy.typing.NDArray[numpy.float32]

_PIPE_BYTES = 2**18
"""On Linux, whose default is 64 KB. 300 MB of logits took 0.25 s instead of 0.5 s; a megabyte would be the limit."""


class Scorer:
    """One model, loaded and ready, on the CPU. Use as a context manager, or call `close`.

    path     a GGUF file
    context  the longest sequence, in tokens; 0 asks for as many as the model was trained with
    exact    float32 attention cache and no flash attention, as the comparison with another implementation needs
    threads  CPU threads. They wait busily: two on shared cores were 57 times slower than one
    lora     adapters as GGUF files, and how much each counts (1.0 is: as its file says)

    llama.cpp runs in a process of its own, which ends with this one; nothing of what it prints gets out.

    Raises MissingExtraError without `xllamacpp` or with a version that is not known, StorageError for a missing file,
    ExportError when llama.cpp refuses a file (its own words are in the message). Every method raises ExportError for
    what llama.cpp cannot do, and if its process ends.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        exact: bool = True,
        threads: int = 1,
        lora: Sequence[tuple[Path, float]] = (),
    ) -> None:
        child.require_runtime(path, *(adapter for adapter, _ in lora))
        self.path = path
        self._turn = 0
        adapters = [(str(adapter), scale) for adapter, scale in lora]
        order = {"path": str(path), "lora": adapters, "context": context, "exact": exact, "threads": threads}
        with contextlib.ExitStack() as made:
            with temporary_storage():
                self._said = made.enter_context(tempfile.TemporaryFile())
            self._child = child.start("scoring", "main", self._said, pipe_bytes=_PIPE_BYTES)
            made.callback(child.end, self._child)
            description = self._ask(order)
            self._made = made.pop_all()
        self.vocabulary: int = description["vocabulary"]
        """Rows of logits: the size of the vocabulary, padding included."""
        self.context: int = context or description["context"]
        """The longest sequence, in tokens."""
        self._piece: int = description["piece"]

    def logits(self, ids: Sequence[int]) -> Logits:
        """The logits after each token of a sequence, which begins afresh: (len(ids), vocabulary) float32.

        For large vocabularies take `logits_chunks`: 500 tokens of Qwen's 152,000 are 300 MB.
        """
        import numpy

        chunks = list(self.logits_chunks(ids))
        return numpy.concatenate(chunks) if chunks else numpy.empty((0, self.vocabulary), numpy.float32)

    def logits_chunks(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The same in groups of positions, of 32 MB mostly, computed as they are asked for.

        One iterator at a time: another call on this object ends it with a RuntimeError.
        """
        import numpy

        self._require_readable(ids, len(ids))
        self._turn += 1
        turn = self._turn
        for start in range(0, len(ids), self._piece):
            if turn != self._turn:
                raise RuntimeError("llama.cpp has begun another sequence")
            piece = [int(token) for token in ids[start : start + self._piece]]
            self._ask({"do": "read", "ids": piece, "fresh": start == 0})
            rows = numpy.empty((len(piece), self.vocabulary), numpy.float32)
            assert self._child.stdout is not None
            if self._child.stdout.readinto(rows.data.cast("B")) != rows.nbytes:  # type: ignore[attr-defined]
                raise self._ended()
            yield rows

    def greedy(self, ids: Sequence[int], max_tokens: int, stop_ids: Collection[int]) -> list[int]:
        """The most likely continuation, `max_tokens` ids at most; one of `stop_ids` ends it, and is the last of them.

        Nothing else ends it, not even a token that ends a text (`is_end`). Equal logits: the lower id.
        """
        if not ids:
            raise ExportError("there is no token to continue", place=str(self.path))
        self._require_readable(ids, len(ids) + max_tokens - 1)
        self._turn += 1
        plain = [int(token) for token in ids]
        stop = [int(token) for token in stop_ids]
        answer = self._ask({"do": "greedy", "ids": plain, "max_tokens": max_tokens, "stop_ids": stop})
        return [int(token) for token in answer["ids"]]

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The token ids of a text. `add_special` puts the model's BOS (and EOS) around it, `parse_special` reads
        `<|im_end|>` and its like as the tokens they name rather than as plain text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ExportError(f"this is no text: {error}", place=str(self.path)) from error
        request = {"do": "tokenize", "text": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._ask(request)["ids"]]

    def is_end(self, token: int) -> bool:
        """Whether llama.cpp, by itself, ends an answer at this token."""
        self._require_readable([token], 1)
        return bool(self._ask({"do": "is_end", "id": int(token)})["end"])

    def close(self) -> None:
        """End the process and give its memory back. May be called twice."""
        self._made.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_readable(self, ids: Sequence[int], length: int) -> None:
        if strange := [token for token in ids if not 0 <= token < self.vocabulary]:
            raise ExportError(f"{strange[0]} is not one of its {self.vocabulary} tokens", place=str(self.path))
        if length > self.context:
            raise ExportError(f"{length} tokens do not fit into a context of {self.context}", place=str(self.path))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(OSError):  # a process that has ended is told apart by its missing answer
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise self._ended()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = MissingExtraError if reply["kind"] == MissingExtraError.__name__ else ExportError
            raise kind(reply["error"], place=reply["place"] or str(self.path), hint=reply["hint"])
        return reply

    def _ended(self) -> ExportError:
        """An error with the status of the ended process, and the last thing it said."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(child.CLOSE_SECONDS)
        self._said.seek(0)
        said = [line.strip() for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        words = f": {said[-1]}" if said else ""
        status = self._child.poll()
        return ExportError(f"llama.cpp's process ended with status {status}{words}", place=str(self.path))
