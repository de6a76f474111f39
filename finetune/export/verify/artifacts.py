"""What was exported, made to answer: a GGUF file in llama.cpp, a merged folder in transformers."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.conversation import Message
from finetune.data.limits import bounded
from finetune.errors import BaseError
from finetune.export.source import open_model
from finetune.export.verify.metrics import Logits
from finetune.export.verify.streamed import StreamedModel, groups
from finetune.llamacpp import LlamaCpp
from finetune.llamacpp.logits import Scorer


@dataclass(frozen=True)
class GgufArtifact:
    """A GGUF file, loaded in llama.cpp: its server for prompts and answers, its C interface for logits."""

    name: str
    precision: str
    template: str | None
    scorer: Scorer
    chat: LlamaCpp

    def tokenize(self, text: str) -> list[int]:
        return self.scorer.tokenize(text, add_special=False, parse_special=True)

    def tokenize_prompt(self, text: str) -> list[int] | None:
        return self.scorer.tokenize(text, add_special=True, parse_special=True)

    def prompt(self, messages: Sequence[Message]) -> list[int] | None:
        """As llama.cpp's server does: the template's text, with the special tokens that it adds by itself."""
        return self.tokenize_prompt(self.chat.apply_template([message.as_dict() for message in messages]))

    def ends(self, token: int) -> bool:
        return self.scorer.is_end(token)

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int] | None:
        """The continuation as llama.cpp's own server ends it."""
        return self.chat.generate_ids(ids, max_tokens)

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        return [self.scorer.logits(ids) for ids in sequences]

    def far_logits(self, ids: Sequence[int], positions: int) -> Logits:
        kept: collections.deque[Logits] = collections.deque()
        for chunk in self.scorer.logits_chunks(ids):
            kept.append(chunk)
            while sum(map(len, kept)) - len(kept[0]) >= positions:
                kept.popleft()
        return np.concatenate(list(kept))[-positions:]

    def finish_asking(self) -> None:
        self.chat.close()


@contextlib.contextmanager
def open_gguf(
    path: Path, name: str, precision: str, context: int, *, lora: Sequence[Path] = ()
) -> Iterator[GgufArtifact]:
    """Load a GGUF file, with adapters on it. Half of the cores: llama.cpp's threads wait busily, and the reference
    needs some too."""
    threads = max(1, (os.cpu_count() or 2) // 2)
    with (
        Scorer(path, context=context, exact=True, threads=threads, lora=[(one, 1.0) for one in lora]) as scorer,
        LlamaCpp(path, context=context, gpu_layers=0, threads=threads, exact=True, lora=lora) as chat,
    ):
        yield GgufArtifact(name, precision, _template_in(path), scorer, chat)


def _template_in(path: Path) -> str | None:
    """The chat template in a GGUF file."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.chat_template")
    return None if field is None else str(field.contents())


@dataclass(frozen=True)
class FolderArtifact:
    """A merged folder, as transformers loads it."""

    name: str
    precision: str
    model: StreamedModel
    tokenizer: Any
    stop_ids: Sequence[int]

    @property
    def template(self) -> str | None:
        template = self.tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def tokenize(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def tokenize_prompt(self, text: str) -> list[int] | None:
        """None: transformers' generation takes ids, and who makes them decides."""

    def prompt(self, messages: Sequence[Message]) -> list[int] | None:
        if not self.tokenizer.chat_template:
            return None
        plain = [message.as_dict() for message in messages]
        render = partial(self.tokenizer.apply_chat_template, plain, tokenize=False, add_generation_prompt=True)
        return self.tokenize(bounded("the chat template", render))

    def ends(self, token: int) -> bool:
        return token in self.stop_ids

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int] | None:
        """None: every token would read the whole model from disk, and the logits are compared directly."""
        return None

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        found: dict[int, Logits] = {}
        for group in groups(sequences, self.model.vocabulary):
            found |= dict(zip(group, self.model.logits([sequences[index] for index in group]), strict=True))
        return [found[index] for index in range(len(sequences))]

    def far_logits(self, ids: Sequence[int], positions: int) -> Logits:
        return self.model.logits([ids], last=positions)[0]

    def finish_asking(self) -> None:
        """Nothing of it is in memory anyway."""


def open_folder(path: Path, name: str, device: str) -> FolderArtifact:
    """Open a merged folder. What ends an answer is what its generation_config.json (or its config) says.

    Raises BaseError for a folder that transformers could not load.
    """
    from transformers import AutoTokenizer, GenerationConfig

    model = open_model(path)
    ends: Any = model.config.get("eos_token_id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if (path / "generation_config.json").is_file():
            ends = GenerationConfig.from_pretrained(str(path)).eos_token_id
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError and more
        raise BaseError(f"transformers cannot load what belongs to the model: {error}", place=str(path)) from error
    stop_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    precision = {"float32": "f32", "float16": "f16"}.get(str(model.config.get("dtype")), "bf16")
    return FolderArtifact(name, precision, StreamedModel(model, None, device=device), tokenizer, stop_ids)
