"""Training rows for the GPU's benchmarks, prepared by ft's own data stage, and as TRL takes them: tokens and labels."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.gpu.models import write_folder
from benchmarks.jobs import ALPHA, RANK, RATE, WORDS

if TYPE_CHECKING:
    from finetune.config.schema import Config
    from finetune.data.prepare import PreparedData

Kind = Literal["dense", "chats"]


@dataclass(frozen=True)
class Rows:
    """What is trained on."""

    kind: Kind
    """dense: texts of exactly `length` tokens, loss on all. chats: short questions and answers, loss on the answers."""
    length: int
    """Tokens of a sequence, or of a pack of chats."""
    micro_batch: int
    """Sequences of a micro batch where nothing is fitted."""
    accumulation: int
    count: int = 256
    """Rows in all."""


def write(rows: Rows, folder: Path) -> Path:
    """The rows as a file of texts or chats."""
    path = folder / "rows.jsonl"
    chance = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows.count):
            if rows.kind == "dense":
                # More than enough words: every word is a token at least, and what is too long is cut.
                row: dict[str, Any] = {"text": " ".join(chance.choices(WORDS, k=rows.length + 8))}
            else:
                question, answer = (
                    " ".join(chance.choices(WORDS, k=chance.randint(middle // 3, middle * 3))) for middle in (25, 50)
                )
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                row = {"messages": turns}
            file.write(json.dumps(row) + "\n")
    return path


def config(
    rows: Rows,
    folder: Path,
    *,
    steps: int,
    quantization: str,
    train: dict[str, Any] | None = None,
    speed: dict[str, Any] | None = None,
) -> Config:
    """A config of ft's for these rows; `train` and `speed` are what a case sets otherwise."""
    from finetune.config.schema import Config

    on_overlong = {"on_overlong": "truncate"} if rows.kind == "dense" else {}
    return Config.model_validate(
        {
            "base": str(folder / "base"),
            "data": [{"path": str(folder / "rows.jsonl"), **on_overlong}],
            "evaluation": {"split": 0},
            "quantization": quantization,
            "lora": {"rank": RANK, "alpha": ALPHA},
            "private_data": "ignore",
            "train": {
                "max_steps": steps,
                "learning_rate": RATE,
                "schedule": "constant",
                "warmup": 0.0,
                "micro_batch_size": rows.micro_batch,
                "gradient_accumulation_steps": rows.accumulation,
                "sequence_length": rows.length,
                "packing": rows.kind == "chats",
                "fit": "as-written",
                "log_every": 1,
                **(train or {}),
            },
            "speed": speed or {},
        }
    )


def prepare(rows: Rows, folder: Path, shape: str, chosen: Config) -> PreparedData:
    """Write base and rows, if they are not there, and prepare them."""
    from finetune.data.prepare import prepare as prepared

    write_folder(folder / "base", shape)
    if not (folder / "rows.jsonl").exists():
        write(rows, folder)
    return prepared(chosen, folder / "base")


def for_trl(data: PreparedData) -> Any:
    """The same rows with the same labels, as a dataset of `input_ids` and `labels`, one row a line."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [row.ids.tolist() for row in data.train],
            "labels": [row.labels().tolist() for row in data.train],
        }
    )


ALL_OFF: dict[str, Any] = {"attention": "sdpa", "fused": False, "lora": False, "head": False, "compile": False}
"""The plain path."""
