"""What the base cannot hold is found in the data stage, not in a kernel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.config.schema import Config
from finetune.data.prepare import prepare
from finetune.errors import BaseError, DataError

BASE = Path(__file__).parents[2] / "data" / "samples" / "quickstart-base"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "base"))


def config_for(base: Path, words: int, **settings: int) -> Config:
    content = json.loads((base / "config.json").read_text("utf-8")) | settings
    (base / "config.json").write_text(json.dumps(content), "utf-8")
    rows = [{"question": "Why?", "answer": "because " * count} for count in (3, words, 4)]
    path = base.parent / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return Config.model_validate({"base": str(base), "data": [{"path": str(path)}], "evaluation": {"split": 0}})


def test_a_row_longer_than_the_base_attends_to(base: Path) -> None:
    config = config_for(base, 200, max_position_embeddings=64)
    with pytest.raises(DataError) as caught:
        prepare(config, base)
    (problem,) = caught.value.problems
    assert problem.place is not None
    assert problem.place.endswith("rows.jsonl:2")
    assert "the base attends to 64 at most" in problem.message
    assert "set train.sequence_length to 64" in str(problem.hint)
    assert len(prepare(config_for(base, 5, max_position_embeddings=64), base).train) == 3


def test_a_tokenizer_with_more_tokens_than_the_base_has_embeddings(base: Path) -> None:
    config = config_for(base, 5, vocab_size=100)
    with pytest.raises(BaseError, match="but the model has only 100 embeddings"):
        prepare(config, base)
