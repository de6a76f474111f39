"""The same bytes wherever it runs: language, time zone, day, clock, the folder's name, who may read the files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.places import Place
from tests.test_pipeline import write_config
from tests.train.conftest import TINY

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

LANGUAGE = "de_DE.ISO-8859-1"
"""Its numbers have a comma, and it lacks most letters of the folder's name."""

FOLDER = "Müllers 模型 & Co"

DATED = "{{ 'Heute: ' + strftime_now('%d.%m.%Y') + '\\n' }}"
"""A chat template that begins so tells the date."""

DAY = 24 * 3600


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language that writes a comma in numbers."""
    folder = tmp_path_factory.mktemp("languages")
    if shutil.which("localedef") is None:
        pytest.skip("there is no localedef to make a language with")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / LANGUAGE)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode > 1:  # 1: with warnings
        pytest.skip(f"no language could be made: {made.stderr}")
    return folder


@pytest.fixture(scope="module")
def strange(languages: Path) -> Iterator[Place]:
    """Where there is no language but C's, as in many a container; the other one can be had."""
    with Place(environment={"LC_ALL": "C", "LOCPATH": str(languages)}) as running:
        yield running


def make(folder: Path) -> Path:
    folder.mkdir()
    path = write_config(folder, max_steps=4, save_every=1)
    (folder / "dated.jinja").write_text(DATED + (TINY / "chat_template.jinja").read_text("utf-8"), "utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write("chat_template: dated.jinja\n")
    return folder


def made(folder: Path) -> dict[str, bytes]:
    """Every artifact, byte for byte."""
    run = folder / "runs" / "tiny"
    paths = [path for part in ("adapter", "merged", "gguf") for path in (run / part).iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


MERGE = ("merge", "runs/tiny", "--no-verify")
GGUF = ("export", "runs/tiny", "--quant", "q8_0", "--system", "Be brief.")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Trained without a break, in the surroundings that most people have."""
    folder = make(tmp_path_factory.mktemp("usual") / "project")
    with Place(environment={"LC_ALL": "C.UTF-8", "TZ": "UTC"}) as place:
        for command in (("train", "tiny.yaml"), MERGE, GGUF):
            done = place.run(*command, cwd=folder)
            assert done.returncode == 0, done.stderr
    return made(folder)


@pytest.mark.fault("another language, time zone and day", stage="train, merge, export", outcome="the same bytes")
@pytest.mark.fault("the clock set back by a day", stage="train", outcome="goes on from the newest step; the same bytes")
@pytest.mark.fault("umask 077, a folder named in Chinese", stage="train, merge, export", outcome="the same bytes")
def test_everything_is_otherwise(strange: Place, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Begun at home, stopped, and gone on with on the other side of the date line."""
    folder = make(tmp_path / FOLDER)
    begun = strange.run("train", "tiny.yaml", cwd=folder, env={"TZ": "UTC"}, stop=2)
    assert begun.returncode == 75, begun.stderr
    older, newer = sorted((folder / "runs" / "tiny" / "checkpoints").iterdir())
    for checkpoint, date in ((older, time.time() + DAY), (newer, time.time() - DAY)):
        for path in (checkpoint, *checkpoint.iterdir()):
            os.utime(path, (date, date))
    # A day ahead of UTC, whatever the time is.
    elsewhere = {"TZ": "<+24>-24"}
    for command in (("train", "tiny.yaml"), MERGE, GGUF):
        done = strange.run(*command, cwd=folder, env=elsewhere, language=LANGUAGE, umask=0o077)
        assert done.returncode == 0, done.stderr
    found = made(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    weights = folder / "runs" / "tiny" / "adapter" / "adapter_model.safetensors"
    assert weights.stat().st_mode & 0o077 == 0


def test_the_language_is_as_strange_as_it_is_meant_to_be(strange: Place) -> None:
    """Or the test above would prove nothing."""
    code = f"import locale; locale.setlocale(locale.LC_ALL, {LANGUAGE!r}); print(locale.format_string('%.1f', 0.5))"
    assert strange.shell('"$0" -c "$1"', sys.executable, code) == "0,5\n"
