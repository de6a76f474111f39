"""The table of known bases against published counts, and against the configs and recipes of this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import BaseError
from finetune.plan.bases import known_base, shape_for
from finetune.plan.memory import parameters
from finetune.plan.shape import shape_of

ROOT = Path(__file__).parents[2]
TABLE: list[dict[str, Any]] = yaml.safe_load((ROOT / "finetune/plan/bases.yaml").read_text("utf-8"))
NAMED = sorted(
    {
        (path.name, str(base))
        for folder in ("configs", "recipes")
        for path in (ROOT / folder).glob("*.yaml")
        if (base := yaml.safe_load(path.read_text("utf-8")).get("base")) and not str(base).startswith(".")
    }
)


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry["ids"][0])
def test_every_base_has_its_published_number_of_parameters(entry: dict[str, Any]) -> None:
    assert parameters(shape_of(entry["config"], entry["source"])) == entry["parameters"]
    assert entry["source"].startswith("https://huggingface.co/")
    assert entry["source"].endswith("/config.json")


@pytest.mark.parametrize(
    ("hub_id", "count"),
    [
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
        ("EleutherAI/pythia-1.4b", 1_414_647_808),
    ],
)
def test_well_known_counts(hub_id: str, count: int) -> None:
    assert parameters(shape_for(hub_id)) == count


@pytest.mark.parametrize(("file", "base"), NAMED)
def test_bases_of_configs_and_recipes_are_known(file: str, base: str) -> None:
    assert known_base(base) is not None, f"{file} names a base that the table lacks"


def test_qwens_bases_were_made_for_more_than_its_chats() -> None:
    for size, context in (("0.5B", 32768), ("1.5B", 131072), ("3B", 32768), ("7B", 131072), ("72B", 131072)):
        assert shape_for(f"Qwen/Qwen2.5-{size}").context == context
        assert shape_for(f"Qwen/Qwen2.5-{size}-Instruct").context == 32768


def test_no_id_stands_there_twice() -> None:
    ids = [hub_id.lower() for entry in TABLE for hub_id in entry["ids"]]
    assert len(ids) == len(set(ids))
    assert len(NAMED) >= 15  # the parametrised test above has something to test


def test_a_folder_is_read_and_the_table_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 1024}))
    assert shape_for(tmp_path).hidden == 1024


def test_case_does_not_matter_and_an_unknown_base_is_an_error(tmp_path: Path) -> None:
    assert known_base("qwen/QWEN2.5-7b") == known_base("Qwen/Qwen2.5-7B")
    assert known_base("somebody/something") is None
    for unknown in ("somebody/something", str(tmp_path)):
        with pytest.raises(BaseError, match="not known"):
            shape_for(unknown)
