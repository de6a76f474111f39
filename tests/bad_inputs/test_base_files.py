"""What the functions behind the commands say of base folders, and which folder is which revision."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.base_files import check_weights, read_model_config, resolved_revision, small_files, weight_files
from finetune.config.schema import Config
from finetune.errors import BaseError, StorageError

from .made import BASE, write_safetensors


def config(base: Path | str) -> Config:
    return Config.model_validate({"base": str(base), "data": [{"path": "a/b"}]})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_json_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BaseError) as caught:
        read_model_config(tmp_path)
    (problem,) = caught.value.problems
    assert f"{problem} | {problem.hint}" == (
        f"{tmp_path}/config.json: config.json cannot be read | download the model again: this file is damaged"
    )


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": 3}', "null"])
def test_a_config_json_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseError, match=r"config\.json names no model_type"):
        read_model_config(tmp_path)


def test_weights_are_looked_at_before_anybody_loads_them() -> None:
    assert weight_files(config(BASE)) == small_files(config(BASE)) == BASE


def test_a_pickle_beside_safetensors_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BaseError, match="pickle"):
        check_weights(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {})
    check_weights(tmp_path)


def test_a_shard_that_breaks_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    (tmp_path / "1.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}more")
    with pytest.raises(StorageError, match=r"1\.safetensors: its header speaks of 10 bytes and the file has 14"):
        check_weights(tmp_path)


def test_the_revision_of_a_folder_in_the_cache() -> None:
    assert resolved_revision(Path("hub/models--a--b/snapshots/abc")) == "abc"
    assert resolved_revision(Path("models/abc")) is None
