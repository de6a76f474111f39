"""A run that is cut off and goes on gives the very adapter of a run that was not, bit for bit, on a CPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.config.schema import Config
from finetune.console import Console
from finetune.model.base import load_base
from finetune.model.hardware import detect
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged
from finetune.stopping import Stopped, Stopper
from finetune.train.sft import train
from tests.train.conftest import fit_of, prepared, tiny_config


class Killed(Exception):
    """Stands for the end of the process: nothing after it is done."""


class Killer(Stopper):
    """Ends the run after a number of steps, as kill -9 would."""

    def __init__(self, after: int) -> None:
        self._left = after
        super().__init__()

    @property
    def asked(self) -> str | None:  # type: ignore[override]
        # Asked once after each step, and once when the training is over.
        self._left -= 1
        if self._left == 0:
            raise Killed
        return None

    @asked.setter
    def asked(self, value: str | None) -> None: ...


class Terminator(Killer):
    """Asks the run to stop during a step, as SIGTERM does."""

    @property
    def asked(self) -> str | None:  # type: ignore[override]
        self._left -= 1
        return "SIGTERM" if self._left <= 0 else None

    @asked.setter
    def asked(self, value: str | None) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """The library collects garbage at the start of each training; what all tests have loaded is none."""
    gc.freeze()
    yield
    gc.unfreeze()


def run_training(config: Config, run: RunFolder, stopper: Stopper | None = None) -> None:
    run.create()
    with logged(run.log):
        loaded = load_base(config, Path(config.base), detect())
        train(config, prepared(config), loaded, run, Console(), stopper or Stopper(), {}, fit_of(config, run))


def adapter_of(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


PLAIN: dict[str, Any] = {"quantization": "none", "lora": {"rank": 4}}
NF4: dict[str, Any] = {"quantization": "nf4", "lora": {"rank": 4}}
DROPOUT: dict[str, Any] = {"lora": {"rank": 4, "dropout": 0.2}}
UNPACKED = {"packing": False}
EPOCHS: dict[str, Any] = {"max_steps": None, "epochs": 2}
# 24 rows, of which 4 are held out: 20 rows, of which 4 make a step unless it says otherwise: five steps an epoch.

CASES: dict[str, tuple[dict[str, Any], list[Stopper]]] = {}


def case(name: str, settings: dict[str, Any], *cuts: Stopper, **train: Any) -> None:
    CASES[name] = (settings | {"train": {"max_steps": 5, "save_every": 2} | train}, list(cuts))


case("plain", PLAIN, Killer(3), **UNPACKED)
case("killed right after a checkpoint", PLAIN, Killer(2), **UNPACKED)
case("killed before any checkpoint", PLAIN, Killer(1), **UNPACKED)
case("killed after the last step", PLAIN, Killer(6), **UNPACKED)
case("dropout", PLAIN | DROPOUT, Killer(3), **UNPACKED)
case("packed", PLAIN, Killer(3))
case("packed, dropout", PLAIN | DROPOUT, Killer(3))
case("across an epoch", PLAIN | DROPOUT, Killer(7), **UNPACKED, **EPOCHS)
case("at the end of an epoch", PLAIN | DROPOUT, Killer(6), **UNPACKED, **EPOCHS | {"save_every": 5})
case("accumulation with a remainder", PLAIN, Killer(5), **UNPACKED, **EPOCHS, gradient_accumulation_steps=3)
case("part of an epoch", PLAIN, Killer(7), **UNPACKED, **EPOCHS | {"epochs": 1.5})
case("max_steps within an epoch, all taken", PLAIN, Killer(5), **UNPACKED | {"max_steps": 4})
case("evaluated on the way", PLAIN | DROPOUT | {"evaluation": {"split": 4, "every": 1}}, Killer(3), **UNPACKED)
case("loss on the last answer", PLAIN, Killer(3), **UNPACKED, loss_on="last-assistant")
case("loss on everything", PLAIN, Killer(3), loss_on="all")
case("recomputed activations", PLAIN | DROPOUT, Killer(3), **UNPACKED, gradient_checkpointing=True)
case("constant learning rate", PLAIN, Killer(3), **UNPACKED, schedule="constant")
case("8-bit AdamW", PLAIN, Killer(3), **UNPACKED, optimizer="adamw_8bit")
case("paged AdamW", PLAIN, Killer(3), **UNPACKED, optimizer="paged_adamw")
case("nf4", NF4, Killer(3), **UNPACKED)
case("nf4, packed, dropout", NF4 | DROPOUT, Killer(3))
case("nf4, paged 8-bit AdamW", NF4, Killer(3), **UNPACKED, optimizer="paged_adamw_8bit")
case("int8", PLAIN | {"quantization": "int8"}, Killer(3), **UNPACKED)
case("killed twice", PLAIN | DROPOUT, Killer(3), Killer(2), **UNPACKED)
case("SIGTERM, dropout", PLAIN | DROPOUT, Terminator(3), **UNPACKED)
case("SIGTERM, nf4, evaluated", NF4 | DROPOUT | {"evaluation": {"split": 4, "every": 1}}, Terminator(3))
case("SIGTERM in an evaluation", PLAIN | DROPOUT | {"evaluation": {"split": 4, "every": 1}}, Terminator(4))


@pytest.mark.fault("kill -9 or SIGTERM", stage="training", outcome="goes on to the same adapter, bit for bit")
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_cut_off_gives_the_adapter_of_one_that_was_not(
    tmp_path: Path, tiny_base: Path, name: str
) -> None:
    settings, cuts = CASES[name]
    config = tiny_config(tmp_path, **{"base": str(tiny_base), **settings})
    unbroken, broken = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "broken")
    run_training(config, unbroken)
    for cut in cuts:
        with pytest.raises((Killed, Stopped)):
            run_training(config, broken, cut)
        assert not broken.adapter.exists()
    run_training(config, broken)
    expected, found = adapter_of(unbroken), adapter_of(broken)
    assert expected.keys() == found.keys()
    assert any(bool(tensor.any()) for key, tensor in expected.items() if "lora_B" in key)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert _losses(broken) == _losses(unbroken)


def _losses(run: RunFolder) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
