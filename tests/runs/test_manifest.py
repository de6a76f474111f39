"""Provenance, and the resolved config that a run is made again from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from finetune.config.load import LoadedConfig, load
from finetune.runs.manifest import as_plain, changed_keys, provenance, resolved_yaml


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedConfig:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "held.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "c.yaml").write_text(
        "base: owner/name\nrevision: main\ndata: [{path: rows.jsonl}, {path: owner/rows}]\n"
        "evaluation: {path: held.jsonl}\n"
    )
    return load(Path("c.yaml"), ["lora.rank=4"])


def test_a_manifest_says_what_a_run_is_made_of(loaded: LoadedConfig, tmp_path: Path) -> None:
    found = json.loads(json.dumps(provenance(loaded)))
    assert (found["base"], found["revision"], found["seed"]) == ("owner/name", "main", 42)
    assert (found["config_path"], found["overrides"]) == ("c.yaml", ["lora.rank=4"])
    assert found["data"] == {
        str(tmp_path / "rows.jsonl"): hashlib.sha256(b'{"text": "a"}\n').hexdigest(),
        str(tmp_path / "held.jsonl"): hashlib.sha256(b'{"text": "b"}\n').hexdigest(),
    }
    assert {"finetune", "python", "torch", "trl", "peft"} <= found["versions"].keys()
    assert found["started"].endswith("Z")


def test_every_file_of_a_folder_or_a_pattern_is_in_the_manifest(loaded: LoadedConfig, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.csv").write_text("text\nb\n")
    (tmp_path / "more" / "notes.txt").write_text("no data")
    several = load(Path("c.yaml"), ["data.0.path=more", "evaluation.path=./*.jsonl"])
    names = [tmp_path / "more" / "b.csv", tmp_path / "held.jsonl", tmp_path / "rows.jsonl"]
    assert provenance(several)["data"] == {str(name): hashlib.sha256(name.read_bytes()).hexdigest() for name in names}


def test_changed_keys_are_named_by_their_dotted_key(loaded: LoadedConfig) -> None:
    before = as_plain(loaded.config)
    after = as_plain(load(Path("c.yaml"), ["lora.rank=8", "train.max_steps=5", "lora.targets=[a]"]).config)
    assert changed_keys(before, before) == []
    assert changed_keys(before, after) == ["lora.rank", "lora.targets", "train.epochs", "train.max_steps"]


def test_keys_without_effect_are_not_in_the_resolved_config(loaded: LoadedConfig) -> None:
    text = resolved_yaml(loaded)
    assert "evaluation:\n  path:" in text
    assert "split: 0.05" not in text, "there is no split where a file is named"
    assert text.count("split: train") == 1, "only the dataset on the Hub has splits"
    assert text.count("revision") == 1
