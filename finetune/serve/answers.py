"""An artifact → a function from a conversation to an answer: llama.cpp for a GGUF file, transformers for the others."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.conversation import Message
from finetune.runs.folder import RunFolder
from finetune.runs.resolved import config_of
from finetune.serve.artifact import Artifact

if TYPE_CHECKING:
    from finetune.model.base import LoadedModel

Answer = Callable[[list[Message]], Generator[str, None, None]]
"""A conversation that ends with the user's message → the answer, piece by piece. Closing it stops the model."""

CONTEXT = 8192
"""Tokens of conversation that llama.cpp reserves memory for; it lowers this to what the model was trained with. All
that a Llama 3.1 was trained with would be 131,072, whose keys and values alone are 16 GiB for the 8B model."""


@dataclass(frozen=True)
class Style:
    """How to answer."""

    max_tokens: int
    temperature: float
    """0: the most likely answer every time."""


def open_answers(run: RunFolder, artifact: Artifact, style: Style, stack: ExitStack) -> Answer:
    """Load an artifact. `stack` gives its memory back."""
    if artifact.kind != "gguf":
        return _transformers(run, artifact, style)
    from finetune.llamacpp import LlamaCpp

    runtime = LlamaCpp(artifact.path, context=CONTEXT, log=run.log)
    stack.callback(runtime.close)

    def answer(history: list[Message]) -> Generator[str, None, None]:
        messages = [message.as_dict() for message in history]
        yield from runtime.chat(messages, max_tokens=style.max_tokens, temperature=style.temperature)

    return answer


def _transformers(run: RunFolder, artifact: Artifact, style: Style) -> Answer:
    import datetime

    from finetune.data.template import choose_template, end_of_turn
    from finetune.data.tokenizer import load_tokenizer
    from finetune.model.generate import stream

    # The adapter's own folder holds the tokenizer and the template that it was trained with.
    tokenizer = load_tokenizer(run.adapter)
    template = choose_template(None, tokenizer, datetime.datetime.now())
    stop_ids, _ = end_of_turn(template, tokenizer)
    loaded = _load(run, artifact.path if artifact.kind == "merged" else None)

    def answer(history: list[Message]) -> Generator[str, None, None]:
        prompt = tokenizer.encode(template.render(history, add_generation_prompt=True), special=False)
        ids: list[int] = []
        shown = ""
        for token in stream(
            loaded.model,
            prompt,
            max_new_tokens=style.max_tokens,
            stop_ids=stop_ids,
            temperature=style.temperature,
        ):
            ids.append(token)
            text = tokenizer.decode(ids)
            # A character of several tokens is shown once it is complete.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text

    return answer


def _load(run: RunFolder, merged: Path | None) -> LoadedModel:
    """The merged folder, or the base with the run's adapter."""
    from finetune.base_files import weight_files
    from finetune.model.adapter import load_adapter
    from finetune.model.base import LoadedModel, load_base
    from finetune.model.hardware import detect

    config = config_of(run)
    if merged is not None:
        plain = config.model_copy(update={"base": str(merged), "quantization": "none"})
        return load_base(plain, merged, detect())
    loaded = load_base(config, weight_files(config), detect())
    return LoadedModel(load_adapter(loaded, run.adapter), loaded.hardware)
