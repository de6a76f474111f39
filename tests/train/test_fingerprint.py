"""What has changed since a checkpoint was written: seen, named, and refused unless a person allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import Config
from finetune.errors import RunError
from finetune.train.fingerprint import changes, fingerprint, require_same
from finetune.train.length import steps_in_all
from tests.train.conftest import prepared, tiny_config

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n{% endfor %}"


def of(config: Config, base: str = "a") -> dict[str, Any]:
    data = prepared(config)
    return fingerprint(config, data, {"config.json": base}, steps_in_all(config, data))


def changed(tmp_path: Path, base: str = "a", **overrides: object) -> set[str]:
    before = of(tiny_config(tmp_path))
    return {change.key for change in changes(before, of(tiny_config(tmp_path, **overrides), base))}


@pytest.mark.fault("changed setting, data, template or base", "resume", "named, refused unless --allow-changed KEY")
@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ({"train": {"learning_rate": 2e-3}}, {"train.learning_rate"}),
        ({"train": {"optimizer": "adamw_8bit"}}, {"train.optimizer"}),
        ({"train": {"micro_batch_size": 4}}, {"train.micro_batch_size"}),
        ({"train": {"sequence_length": 128}}, {"train.sequence_length"}),
        ({"train": {"loss_on": "all"}}, {"train.loss_on"}),
        ({"train": {"packing": False}}, {"train.packing"}),
        ({"train": {"max_steps": 3}}, {"train.max_steps"}),
        ({"train": {"schedule": "linear", "warmup": 0.1}}, {"train.schedule", "train.warmup"}),
        ({"lora": {"alpha": 8}}, {"lora.alpha"}),
        ({"lora": {"rank": 8}}, {"lora.rank"}),
        ({"lora": {"targets": ["q_proj"]}}, {"lora.targets"}),
        ({"lora": {"dropout": 0.1}}, {"lora.dropout"}),
        ({"quantization": "none"}, {"quantization"}),
        ({"evaluation": {"split": 5, "samples": 1, "max_new_tokens": 8}}, {"evaluation.split"}),
        ({"rows": 20}, {"data"}),
        ({"base_files": "b"}, {"base"}),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else None,
)
def test_a_change_is_named(tmp_path: Path, overrides: dict[str, Any], keys: set[str]) -> None:
    assert changed(tmp_path, overrides.pop("base_files", "a"), **overrides) == keys


def test_a_changed_seed_is_named_once(tmp_path: Path) -> None:
    assert changed(tmp_path, train={"seed": 7}) == {"train.seed"}


def test_a_template_that_was_edited_is_named(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    before = of(tiny_config(tmp_path, chat_template=str(template)))
    template.write_text(TEMPLATE.replace(": ", " says "))
    now = of(tiny_config(tmp_path, chat_template=str(template)))
    assert {change.key for change in changes(before, now)} == {"chat_template"}


@pytest.mark.parametrize(
    "overrides",
    [
        {"train": {"max_steps": 8}},
        {"train": {"max_steps": None, "epochs": 9}},
        {"train": {"micro_batch_size": 1, "gradient_accumulation_steps": 4}},
        {"train": {"save_every": 1, "log_every": 3, "keep_checkpoints": 3}},
        {"train": {"gradient_checkpointing": True}},
        {"evaluation": {"split": 4, "every": 2, "samples": 2, "metric": "exact-match", "max_new_tokens": 8}},
        {"private_data": "ignore"},
    ],
    ids=str,
)
def test_what_the_weights_do_not_depend_on_is_no_change(tmp_path: Path, overrides: dict[str, Any]) -> None:
    assert changed(tmp_path, **overrides) == set()


def test_the_same_rows_in_another_place_are_no_change(tmp_path: Path) -> None:
    before = of(tiny_config(tmp_path))
    (tmp_path / "moved").mkdir()
    assert changes(before, of(tiny_config(tmp_path / "moved"))) == []


def test_only_what_is_allowed_is_let_through_and_what_no_checkpoint_can_take_never(tmp_path: Path) -> None:
    before = of(tiny_config(tmp_path))
    found = changes(before, of(tiny_config(tmp_path, lora={"rank": 8, "alpha": 8}, train={"learning_rate": 2e-3})))
    with pytest.raises(RunError) as caught:
        require_same(found, ["train.learning_rate", "lora.rank"], "runs/a", 3, "runs/a-2")
    said = {str(problem): problem.hint for problem in caught.value.problems}
    assert said == {
        "runs/a: lora.alpha was 32.0 and is 8.0 now (this run is at step 3)": (
            "undo it; or go on from step 3 with it: --allow-changed lora.alpha; or start runs/a-2 with --fresh"
        ),
        "runs/a: lora.rank was 16 and is 8 now (this run is at step 3)": (
            "a checkpoint cannot take that: undo it, or start runs/a-2 with --fresh"
        ),
    }
    require_same(found[:0], [], "runs/a", 3, "runs/a-2")
