"""What a tracker is told: numbers, and where to put them; never more than a person asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.config.schema import Config
from finetune.runs.folder import RunFolder
from finetune.runs.tracking import prepare_tracking


def config(tracking: str) -> Config:
    return Config.model_validate({"base": "x", "data": [{"path": "y"}], "tracking": tracking})


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process' own, without wandb's variables; put back afterwards."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("WANDB")})


def wandb() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("WANDB")}


@pytest.mark.usefixtures("environment")
def test_without_a_tracker_nothing_is_set(tmp_path: Path) -> None:
    prepare_tracking(config("none"), RunFolder(tmp_path))
    assert wandb() == {}


@pytest.mark.usefixtures("environment")
def test_wandb_writes_into_the_run_and_takes_only_numbers(tmp_path: Path) -> None:
    prepare_tracking(config("wandb"), RunFolder(tmp_path))
    told = wandb()
    assert told["WANDB_DIR"] == str(tmp_path)
    assert (told["WANDB_CONSOLE"], told["WANDB_DISABLE_CODE"], told["WANDB__DISABLE_META"]) == ("off", "true", "true")


@pytest.mark.usefixtures("environment")
def test_a_persons_own_settings_win(tmp_path: Path) -> None:
    own = {"WANDB_DIR": "/elsewhere", "WANDB_PROJECT": "mine", "WANDB_CONSOLE": "wrap"}
    os.environ |= own
    prepare_tracking(config("wandb"), RunFolder(tmp_path))
    assert own.items() <= wandb().items()
