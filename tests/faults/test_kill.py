"""Killed at any write, the same command again makes what it would have made: the same files, the same bytes.

A run that nobody disturbs says which writes there are and what comes out. Then, for each of them, everything is put
back, the command is killed there, and given again. Twelve such moments are always tried; `make test-faults` tries all.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import FaultServer, Outcome
from tests.faults.watch import WRITES, Event, Kill

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data" / "samples"

CONFIG = """
base: {base}
data: [{{path: {rows}}}]
evaluation: {{split: 4, samples: 1, max_new_tokens: 4}}
train:
  max_steps: 3
  save_every: 1
  log_every: 1
  micro_batch_size: 2
  gradient_accumulation_steps: 1
  sequence_length: 256
  learning_rate: 1.0e-2
lora: {{targets: [q_proj, down_proj]}}
"""
"""Three checkpoints, of which the first is rotated away. Few tensors: each is a write."""

COMMANDS = {
    "train": ("train", "../tiny.yaml"),
    "merge": ("merge", "runs/tiny"),
    "gguf": ("export", "runs/tiny", "--to", "gguf"),
    "gguf-lora": ("export", "runs/tiny", "--to", "gguf-lora"),
    # Nine tenths of these commands' time is the proof, which writes nothing but its outcome.
    "merge, unproven": ("merge", "runs/tiny", "--no-verify"),
    "gguf, unproven": ("export", "runs/tiny", "--to", "gguf", "--no-verify"),
    "gguf-lora, unproven": ("export", "runs/tiny", "--to", "gguf-lora", "--no-verify"),
}

TIMES = {
    "manifest.json": ("started", "day", "ended", "train_seconds", "peak_memory_bytes"),
    "verification.json": ("proven_at",),
    "metrics.jsonl": ("tokens_per_second", "memory_bytes"),
    # TRL counts the tokens of a process, not of a run. Nobody reads it.
    "trainer_state.json": ("num_tokens",),
    "whole.json": ("trainer_state.json",),
}
"""What differs between any two runs: times, memory, and hashes of these."""

DIFFERENT_ANYWAY = ("log.txt", ".lock")

NOT_LOOKED_AT = "runs/.data/hashes.json"
"""Hashes of files by their times: it is there once a second command has found the folder."""


@dataclass(frozen=True)
class Reference:
    """A command that nobody disturbed."""

    command: Sequence[str]
    before: Path | None
    """The folder as it was; None: it was empty."""
    after: dict[str, str]
    """The folder as it should be in the end: `content`."""
    events: Sequence[Event]


class Bench:
    """One folder, always at the same path (paths are in the results), and what each command makes of it."""

    def __init__(self, server: FaultServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        self.work = folder / "work"
        rows = (SAMPLES / "contract-clauses.jsonl").read_text("utf-8").splitlines()[:24]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
        config = CONFIG.format(base=SAMPLES / "quickstart-base", rows=folder / "rows.jsonl")
        (folder / "tiny.yaml").write_text(config, "utf-8")
        self._references: dict[str, Reference] = {}

    def reference(self, stage: str) -> Reference:
        if stage not in self._references:
            before = None if stage == "train" else self._trained()
            self.restore(before)
            outcome = self._run(stage)
            assert outcome.code == 0, outcome
            self._references[stage] = Reference(COMMANDS[stage], before, content(self.work), outcome.events)
        return self._references[stage]

    def _trained(self) -> Path:
        """A copy of the folder after training, less the checkpoints, which only make copying slower."""
        kept = self._folder / "trained"
        if not kept.exists():
            self.reference("train")
            shutil.rmtree(self.work / "runs" / "tiny" / "checkpoints")
            shutil.copytree(self.work, kept)
        return kept

    def restore(self, before: Path | None) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if before is None:
            self.work.mkdir()
        else:
            shutil.copytree(before, self.work)

    def _run(self, stage: str, fault: Kill | None = None) -> Outcome:
        return self._server.run(*COMMANDS[stage], cwd=self.work, fault=fault)

    def problems(self, stage: str, kill: Kill) -> list[str]:
        """Kill the command, give it again; what is wrong then."""
        reference = self.reference(stage)
        self.restore(reference.before)
        killed = self._run(stage, kill)
        if killed.signal != kill.signal:
            return [f"was not killed: {killed}"]
        again = self._run(stage)
        if again.code != 0:
            return [f"the same command again fails: {again.stderr.strip()}"]
        return differences(reference.after, content(self.work))


@pytest.fixture(scope="module")
def bench(server: FaultServer, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(server, tmp_path_factory.mktemp("kill"))


def content(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of what is in it but for the times."""
    found = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*"))}
    return {name: digest for name, digest in found.items() if name != NOT_LOOKED_AT}


def _digest(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if path.name in DIFFERENT_ANYWAY:
        return "file"
    data = path.read_bytes()
    if path.name in TIMES:
        try:
            values = [json.loads(line) for line in data.splitlines()] if path.suffix == ".jsonl" else json.loads(data)
        except ValueError:
            return "torn"
        data = json.dumps(_without(values, TIMES[path.name]), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def _without(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner, names) for name, inner in value.items() if name not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in found]
    left_over = [f"{name} is left over" for name in found if name not in expected]
    other = [f"{name} is not the same" for name in expected if name in found and found[name] != expected[name]]
    return missing + left_over + other


def moments(events: Sequence[Event]) -> Iterator[Kill]:
    """Every moment at which a kill leaves something else on the disk: before each event, but in the middle of a write.

    Before a write is as after the one before it, and that differs from its middle in the number of bytes alone; a
    file's first write is also killed before it begins, which leaves the file empty. Where the event before altered
    nothing (a sync, say), this moment is as that one.
    """
    for number, event in enumerate(events):
        if event.kind in WRITES and event.size > 1:
            yield Kill(number, torn=True)
            if events[number - 1].kind == "open":
                yield Kill(number)
        elif number == 0 or events[number - 1].alters:
            yield Kill(number)


def power_cuts(events: Sequence[Event]) -> Iterator[Kill]:
    """After each rename: what carries a final name must have been synced before it got it."""
    for number, event in enumerate(events[:-1]):
        if event.kind == "rename":
            yield Kill(number + 1, power=True)


def common_beginning(one: Sequence[Event], other: Sequence[Event]) -> int:
    """How many of the first events are the same."""
    same = [(a.kind, a.path, a.to) == (b.kind, b.path, b.to) for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


@dataclass(frozen=True)
class Moment:
    """One to try always: at the event that lies so far through those whose description fits, or so many after it."""

    stage: str
    pattern: str
    fraction: float = 1.0
    after: int = 0
    torn: bool = False
    power: bool = False

    def kill(self, events: Sequence[Event]) -> Kill:
        numbers = [number for number, event in enumerate(events) if re.search(self.pattern, str(event))]
        assert numbers, f"nothing like {self.pattern} is written any more"
        return Kill(numbers[int(self.fraction * (len(numbers) - 1))] + self.after, torn=self.torn, power=self.power)


SAMPLE = {
    "tokenised data, torn": Moment("train", r"^write runs/\.data/", 0.5, torn=True),
    "a checkpoint's adapter, torn": Moment("train", r"^write\S* \S*checkpoint-2\S*(safetensors|tmp)", 0.5, torn=True),
    "a checkpoint gets its name": Moment("train", r"^rename \S*checkpoint-2"),
    "an old checkpoint is removed": Moment("train", r"^unlink \S*checkpoint-1\b", 0.5),
    "the trained adapter got its name": Moment("train", r"^rename .* → runs/tiny/adapter$", after=1, power=True),
    "the manifest says finished": Moment("train", r"^rename .* → runs/tiny/manifest.json$"),
    "merged weights, torn": Moment("merge, unproven", r"^pwrite .*model\.safetensors", 0.5, torn=True),
    "the merged folder got its name": Moment("merge, unproven", r"^rename .* → runs/tiny/merged$", after=1),
    "GGUF tensors, torn": Moment("gguf, unproven", r"^write .*\.gguf", 0.5, torn=True),
    "the GGUF file got its name": Moment("gguf, unproven", r"^rename .* → \S*q8_0\.gguf$", after=1),
    "a GGUF file is proven": Moment("gguf", r"^rename .* → runs/tiny/verification\.json$", after=1, power=True),
    "an adapter as GGUF, torn": Moment("gguf-lora, unproven", r"^write .*-lora\.gguf", 0.5, torn=True),
}
"""One moment of each sort, over all that is written."""


@pytest.mark.fault("kill -9", stage="training, merge, export", outcome="the same command finishes, same bytes")
@pytest.mark.parametrize("name", SAMPLE)
def test_the_same_command_again_finishes_with_the_same_bytes(bench: Bench, name: str) -> None:
    moment = SAMPLE[name]
    assert "\n".join(bench.problems(moment.stage, moment.kill(bench.reference(moment.stage).events))) == ""


@pytest.mark.every_event
@pytest.mark.parametrize("cut", [False, True], ids=["killed", "power-cut"])
@pytest.mark.parametrize("stage", COMMANDS)
def test_the_same_command_again_finishes_wherever_it_was_killed(bench: Bench, stage: str, cut: bool) -> None:
    """Commands that prove write the same up to the proof as those that do not, which are ten times as fast."""
    events = bench.reference(stage).events
    unproven = f"{stage}, unproven"
    begin = common_beginning(events, bench.reference(unproven).events) if unproven in COMMANDS else 0
    found = []
    for kill in power_cuts(events) if cut else moments(events):
        problems = bench.problems(stage, kill) if kill.at >= begin else []
        found += [f"{kill} of {len(events)}, {events[kill.at]}: {problem}" for problem in problems]
    assert not found, "\n".join(found)
