"""The text of the data: who can read it while it is there, and that nothing of it is left after `ft clean`."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np

from finetune.data.tokenizer import load_tokenizer
from finetune.runs.folder import RunFolder
from tests.privacy.conftest import SENTENCE, Journey
from tests.train.conftest import TINY


def needles() -> dict[str, bytes]:
    """The sentence as text, and as the ids in its middle (those at its ends depend on what stands beside it)."""
    ids = np.array(load_tokenizer(TINY).encode(SENTENCE, special=False)[2:-2])
    assert len(ids) >= 5
    kinds = {kind: ids.astype(kind).tobytes() for kind in ("<u2", "<i4", "<i8")}
    return {"text": SENTENCE.encode(), **kinds}


def found(folder: Path) -> dict[str, list[str]]:
    wanted = needles()
    return {
        str(path.relative_to(folder)): there
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (there := [kind for kind, needle in wanted.items() if needle in path.read_bytes()])
    }


def test_nothing_of_the_text_is_left_after_cleaning(journey: Journey) -> None:
    before = found(journey.folder / "before")
    assert {Path(name).name: kinds for name, kinds in before.items()} == {
        "data.json": ["text"],
        "ids.bin": ["<i4"],
        "evaluation.json": ["text"],
    }
    assert found(journey.folder / "runs") == {}
    run = RunFolder(journey.folder / "runs" / "tiny")
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert (run.merged / "model.safetensors").is_file()
    assert list(run.gguf.glob("*.gguf"))
    assert not run.checkpoints.exists()


def test_nothing_of_the_text_is_anywhere_else(journey: Journey) -> None:
    """Not in the temporary folder, not in the home folder, not with the tracker."""
    top = journey.folder.parent
    assert found(top / "tmp") == {}
    assert found(top / "home") == {}
    tracked = journey.folder / "tracked" / "tiny" / "wandb"
    if tracked.exists():
        assert found(tracked) == {}
    assert not [path for path in (top / "tmp").iterdir() if path.name.startswith("ft-")]


def test_prepared_data_is_its_owners_alone(journey: Journey) -> None:
    cache = journey.folder / "before" / ".data"
    entries = [cache, *(path for path in cache.iterdir() if path.is_dir())]
    assert len(entries) >= 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in entries} == {0o700}


def test_a_run_is_its_owners_alone_under_any_umask(tmp_path: Path) -> None:
    """It holds answers, the log and the samples of the evaluation. Others may be let in, but have to be."""
    before = os.umask(0)
    try:
        RunFolder(tmp_path / "runs" / "a").create()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "runs" / "a").stat().st_mode) == 0o700
