"""Base folders that are damaged or hold what is not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.base_files import read_model_config, resolved_revision, small_files, weight_files
from finetune.config.schema import Config
from finetune.errors import BaseError


def config(base: Path | str) -> Config:
    return Config.model_validate({"base": str(base), "data": [{"path": "a/b"}]})


def message(error: pytest.ExceptionInfo[BaseError]) -> str:
    (problem,) = error.value.problems
    return f"{problem} | {problem.hint}"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_json_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BaseError) as caught:
        read_model_config(tmp_path)
    assert message(caught) == (
        f"{tmp_path}/config.json: config.json cannot be read | download the model again: this file is damaged"
    )


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": 3}', "null"])
def test_a_config_json_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseError, match=r"config\.json names no model_type"):
        read_model_config(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(BaseError) as none:
        weight_files(config(tmp_path))
    assert (
        message(none) == f"{tmp_path}: there are no weights here | use a revision of this model with .safetensors files"
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BaseError) as pickled:
        weight_files(config(tmp_path))
    assert "the weights are pickled (.bin), which can run code when read" in message(pickled)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weight_files(config(tmp_path)) == small_files(config(tmp_path)) == tmp_path


def test_the_revision_of_a_folder_in_the_cache() -> None:
    assert resolved_revision(Path("hub/models--a--b/snapshots/abc")) == "abc"
    assert resolved_revision(Path("models/abc")) is None
