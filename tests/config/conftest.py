"""A small folder to load configs in: a base that exists, data that exists, and the current folder is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.config.load import LoadedConfig, load
from finetune.errors import ConfigError

GOOD = "base: ./base\ndata:\n  - path: rows.jsonl\n"
"""The shortest config there is, three lines."""

Faults = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?", "answer": "Because."}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def loads(folder: Path) -> Callable[..., LoadedConfig]:
    """`loads(text, *overrides)` writes c.yaml and loads it."""

    def from_text(text: str | bytes, *overrides: str) -> LoadedConfig:
        (folder / "c.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return load(Path("c.yaml"), overrides)

    return from_text


@pytest.fixture
def faults(loads: Callable[..., LoadedConfig]) -> Faults:
    """`faults(text, *overrides)` are the `error: … hint: …` pairs that loading ends with."""

    def of_text(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            loads(text, *overrides)
        return [f"{problem} | {problem.hint}" for problem in caught.value.problems]

    return of_text
