"""A GGUF file in llama.cpp: text to token ids, token ids to token ids, messages to text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.llamacpp.process import Process

Message = Mapping[str, str]


class LlamaCpp:
    """One model, loaded and ready. Use as a context manager, or call `close`.

    path        a GGUF file
    context     tokens of context to reserve memory for; 0 asks for as many as the model was trained with
    gpu_layers  how many layers go to the GPU; None lets llama.cpp choose, 0 keeps all on the CPU
    threads     CPU threads; None lets llama.cpp choose. They wait busily: threads that share a core are very slow
    exact       keep the attention cache in float32 rather than float16, to compare with another implementation
    log         a file that llama.cpp's own log is appended to; None drops it
    lora        adapters to apply, as GGUF files (`export.gguf.lora`)

    Raises MissingExtraError without `xllamacpp`, StorageError for a missing file or a log that cannot be opened,
    ExportError when llama.cpp refuses the file (its own words are in the message). Every method raises ExportError
    for what llama.cpp refuses, and if its process ends.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        gpu_layers: int | None = None,
        threads: int | None = None,
        exact: bool = False,
        log: Path | None = None,
        lora: Sequence[Path] = (),
    ) -> None:
        self.path = path
        adapters = [str(adapter) for adapter in lora]
        settings = {"context": context, "gpu_layers": gpu_layers, "threads": threads, "exact": exact, "lora": adapters}
        self._process = Process(path, settings, log)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The token ids of a text. `add_special` puts the model's BOS (and EOS) around it, `parse_special` reads
        `<|im_end|>` and its like as the tokens they name rather than as plain text."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._process.ask("/tokenize", body)["tokens"]]

    def generate_ids(self, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The most likely continuation (greedy: no sampling, no penalties), `max_tokens` ids at most.

        A token that ends an answer ends it, and is the last of the ids. Nothing is kept between calls.
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
        return [int(token) for token in self._process.ask("/completion", body)["tokens"]]

    def apply_template(self, messages: Sequence[Message]) -> str:
        """The prompt llama.cpp makes of a conversation with the template inside the file, ready for an answer.

        A file without a template gets llama.cpp's default, ChatML.
        """
        return str(self._process.ask("/apply-template", {"messages": _plain(messages)})["prompt"])

    def chat(
        self, messages: Sequence[Message], *, max_tokens: int, temperature: float, stream: bool = True
    ) -> Iterator[str]:
        """The answer to a conversation, piece by piece (all at once without `stream`).

        The template inside the file is used, and what the model writes comes back as written: thoughts are not cut
        out. Temperature 0 is greedy; above it llama.cpp's usual sampling applies. Closing the iterator stops the
        model.
        """
        body: dict[str, Any] = {
            "messages": _plain(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": stream,
            "reasoning_format": "none",
        }
        if temperature == 0.0:
            body |= {"top_k": 1, "samplers": ["top_k"]}
        if not stream:
            answer = self._process.ask("/v1/chat/completions", body)
            yield str(answer["choices"][0]["message"]["content"] or "")
            return
        for event in self._process.stream("/v1/chat/completions", body):
            for choice in event.get("choices", []):
                if piece := choice.get("delta", {}).get("content"):
                    yield str(piece)

    def close(self) -> None:
        """End the process and give its memory back. May be called twice."""
        self._process.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [dict(message) for message in messages]
