"""What was exported, made to answer: a GGUF file in llama.cpp, a merged folder in transformers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.conversation import Message
from finetune.export.source import open_model
from finetune.export.verify.metrics import Logits
from finetune.export.verify.probes import LONGEST
from finetune.export.verify.streamed import StreamedModel, groups
from finetune.llamacpp import LlamaCpp
from finetune.llamacpp.logits import Scorer

CONTEXT = 2 * LONGEST


@dataclass(frozen=True)
class GgufArtifact:
    """A GGUF file, loaded in llama.cpp."""

    name: str
    precision: str
    scorer: Scorer
    chat: LlamaCpp

    def tokenize(self, text: str) -> list[int]:
        return self.scorer.tokenize(text, add_special=False, parse_special=True)

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        return [self.scorer.logits(ids) for ids in sequences]

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int] | None:
        """The continuation as llama.cpp's own server ends it."""
        return self.chat.generate_ids(ids, max_tokens)

    def ends(self, token: int) -> bool:
        return self.scorer.is_end(token)

    def prompt(self, messages: Sequence[Message]) -> str | None:
        return self.chat.apply_template([message.as_dict() for message in messages])


@contextlib.contextmanager
def open_gguf(path: Path, name: str, precision: str) -> Iterator[GgufArtifact]:
    """Load a GGUF file. Half of the cores: llama.cpp's threads wait busily, and the reference needs some too."""
    threads = max(1, (os.cpu_count() or 2) // 2)
    with (
        Scorer(path, context=CONTEXT, exact=True, threads=threads) as scorer,
        LlamaCpp(path, context=CONTEXT, gpu_layers=0, threads=threads, exact=True) as chat,
    ):
        yield GgufArtifact(name, precision, scorer, chat)


@dataclass(frozen=True)
class FolderArtifact:
    """A merged folder, as transformers loads it."""

    name: str
    precision: str
    model: StreamedModel
    tokenizer: Any
    stop_ids: Sequence[int]

    def tokenize(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[Logits]:
        found: dict[int, Logits] = {}
        for group in groups(sequences, self.model.vocabulary):
            found |= dict(zip(group, self.model.logits([sequences[index] for index in group]), strict=True))
        return [found[index] for index in range(len(sequences))]

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int] | None:
        """None: every token would read the whole model from disk, and the logits are compared directly."""
        return None

    def ends(self, token: int) -> bool:
        return token in self.stop_ids

    def prompt(self, messages: Sequence[Message]) -> str | None:
        if not self.tokenizer.chat_template:
            return None
        plain = [message.as_dict() for message in messages]
        return str(self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))


def open_folder(path: Path, name: str, device: str) -> FolderArtifact:
    """Open a merged folder. What ends an answer is what its generation_config.json (or its config) says."""
    from transformers import AutoTokenizer, GenerationConfig

    model = open_model(path)
    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    ends: Any = model.config.get("eos_token_id")
    if (path / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(str(path)).eos_token_id
    stop_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    precision = {"float32": "f32", "float16": "f16"}.get(str(model.config.get("dtype")), "bf16")
    return FolderArtifact(name, precision, StreamedModel(model, None, device=device), tokenizer, stop_ids)
