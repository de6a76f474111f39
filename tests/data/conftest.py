"""Small rows, and a base whose tokenizer has one token per byte, so that tokens can be counted by hand."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tokenizers

from finetune.config.schema import Config, DataSource
from finetune.data.prepare import PreparedData, prepare
from finetune.data.read import read_rows
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import DataError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def byte_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a byte-level tokenizer: `chatml` makes a token of each marker and of each byte."""
    folder = tmp_path_factory.mktemp("byte-base")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *sorted(alphabet)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_load_once() -> Iterator[None]:
    """A vocabulary of 150,000 entries takes a second to load, and nothing that uses a tokenizer changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.data.prepare.load_tokenizer", cached_tokenizer)
        yield


cached_tokenizer = functools.cache(load_tokenizer)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def packed(content: bytes, suffix: str) -> bytes:
    """As a file of that ending holds it."""
    if suffix == ".gz":
        return gzip.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def question(number: int, answer: str = "") -> dict[str, str]:
    return {"question": f"Q{number}", "answer": answer or f"A{number}"}


def read(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(DataSource(path=str(path), **settings))]


def fault(path: Path, **settings: Any) -> str:
    """The `error: … | hint: …` that reading a file ends with."""
    with pytest.raises(DataError) as caught:
        read(path, **settings)
    (problem,) = caught.value.problems
    return f"{problem} | {problem.hint}"


Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepared(here: Path, byte_base: Path) -> Prepare:
    """`prepared(rows, train={…}, …)` writes rows.jsonl and prepares it for the byte base with ChatML."""

    def run(rows: list[Any] | None, data: dict[str, Any] | None = None, **settings: Any) -> PreparedData:
        if rows is not None:
            write_rows(here / "rows.jsonl", rows)
        values = {
            "base": str(byte_base),
            "chat_template": "chatml",
            "data": [{"path": str(here / "rows.jsonl"), **(data or {})}],
            "evaluation": {"split": 0},
            **settings,
        }
        return prepare(Config.model_validate(values), byte_base)

    return run
