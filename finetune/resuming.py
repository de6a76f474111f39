"""Which run `ft train` works on, that nobody else works on it, and whether it can go on from what is there."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetune.config.load import LoadedConfig
from finetune.config.schema import is_local_base
from finetune.console import Console
from finetune.data.prepare import PreparedData
from finetune.errors import FinetuneError, RunError
from finetune.export.base_identity import fingerprint as fingerprint_of_base
from finetune.runs.folder import RunFolder, check_adapter, next_run, runs_of
from finetune.runs.manifest import as_plain, changed_keys, data_hashes, day_of, today
from finetune.train.checkpoints import clear_leftovers, newest_whole, step_of
from finetune.train.fingerprint import FREE, changes, fingerprint, read, require_same


def choose_run(loaded: LoadedConfig, runs: Path, console: Console, *, fresh: bool) -> RunFolder:
    """The newest run of this config, or a new one."""
    existing = runs_of(loaded.name, runs)
    if not existing:
        new = next_run(loaded.name, runs)
        if new.name != loaded.name:
            console.say(f"{runs / loaded.name} was made from another config, and is left as it is")
        return new
    if fresh and (existing[-1].manifest.exists() or existing[-1].in_use):
        return next_run(loaded.name, runs)
    return existing[-1]


@contextlib.contextmanager
def reserved(run: RunFolder) -> Iterator[None]:
    """Hold the run's folder. It is there afterwards only if something was begun in it."""
    new = not run.path.exists()
    run.create()
    with run.lock():
        try:
            yield
        finally:
            if new and not run.manifest.exists():
                with contextlib.suppress(OSError):
                    (run.path / ".lock").unlink()
                    run.path.rmdir()


def nothing_to_do(run: RunFolder, loaded: LoadedConfig) -> bool:
    """Whether the run is finished and whole, with this very config, data and base, or what gives the same weights."""
    if run.state != "finished" or not _has_adapter(run):
        return False
    before = _config_before(run)
    same = before is not None and all(key in FREE for key in changed_keys(before, as_plain(loaded.config)))
    known = run.read_manifest()
    base = loaded.config.base
    if same and is_local_base(base) and known.get("base_files") is not None:
        same = known["base_files"] == fingerprint_of_base(Path(base))
    return same and known.get("data") == data_hashes(loaded.config)


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from."""

    run: RunFolder
    checkpoint: Path | None
    """None where nothing was trained yet: such a run takes whatever the config says now."""
    allowed: tuple[str, ...]
    """Keys that a person allows to differ from what the checkpoint was trained with."""
    day: datetime.datetime
    """What chat templates are told: the day on which the run began."""
    changes: tuple[Mapping[str, Any], ...] = ()
    """What was changed on the way, and at which step; kept in the manifest."""

    def compared(self, loaded: LoadedConfig, data: PreparedData, steps: int, console: Console) -> Resumption:
        """Raise RunError for what differs from what the checkpoint was trained with and is not allowed to.

        The base is compared later, by `compared_base`: its files may have to be fetched first.
        """
        if self.checkpoint is None:
            return self
        before = read(self.checkpoint)
        return self._with(before, fingerprint(loaded.config, data, before["base"], steps), loaded.name, console)

    def compared_base(self, loaded: LoadedConfig, base_files: Mapping[str, str], console: Console) -> Resumption:
        """The same for the base, of which only its files count: a folder may have been moved."""
        if self.checkpoint is None:
            return self
        before = read(self.checkpoint)
        return self._with(before, before | {"base": dict(base_files)}, loaded.name, console)

    def _with(self, before: Mapping[str, Any], now: Mapping[str, Any], name: str, console: Console) -> Resumption:
        assert self.checkpoint is not None
        step = step_of(self.checkpoint)
        found = changes(before, now)
        fresh = str(next_run(name, self.run.path.parent).path)
        require_same(found, self.allowed, str(self.run.path), step, fresh)
        if found and step >= now["steps"]:
            raise RunError(
                f"step {step:,} was the last: nothing is left to train with {', '.join(c.key for c in found)}",
                place=str(self.run.path),
                hint=f"give it more train.epochs or train.max_steps, or start {fresh} with --fresh",
            )
        if now["steps"] > before["steps"]:
            # Two fingerprints of one length differ in this only once: the second comparison is of the base alone.
            console.say(
                f"lengthened from {before['steps']:,} to {now['steps']:,} steps: from here on, the learning rate is "
                "that of a run which had been so long from the start"
            )
        for change in found:
            console.say(f"{change}, as allowed, from step {step:,} on")
        noted = [{"step": step, **asdict(change)} for change in found]
        return replace(self, changes=(*self.changes, *(note for note in noted if note not in self.changes)))


def resumption(
    run: RunFolder, loaded: LoadedConfig, runs: Path, allowed: tuple[str, ...], console: Console
) -> Resumption:
    """What there is to go on from; leftovers of a killed process are removed.

    Raises RunError for what the config alone tells: a changed setting that was not allowed; a finished run whose
    checkpoints are gone, and which was made with other settings.
    """
    clear_leftovers(run.checkpoints)
    checkpoint, faults = newest_whole(run.checkpoints)
    known = run.read_manifest() if run.manifest.exists() else {}
    fresh = str(next_run(loaded.name, runs).path)
    if checkpoint is None:
        for fault in faults:
            console.warn(fault)
        before = _config_before(run)
        keys = changed_keys(before, as_plain(loaded.config)) if before is not None else []
        if run.state == "finished" and _has_adapter(run):
            what = f"settings ({', '.join(keys)})" if keys else "data, or on another base"
            raise RunError(
                f"this run was finished with other {what}, and no checkpoint is left to go on from",
                place=str(run.path),
                hint=f"--fresh starts {fresh}",
            )
        if faults:
            console.warn(f"no checkpoint of {run.path} is whole: training begins again at step 0")
        return Resumption(run, None, allowed, today())
    # What the config alone tells is said before the data is tokenised.
    recorded = read(checkpoint)
    found = changes(recorded, recorded | {"config": as_plain(loaded.config)})
    require_same(found, allowed, str(run.path), step_of(checkpoint), fresh)
    return Resumption(run, checkpoint, allowed, day_of(known), tuple(known.get("changes") or ()))


def _has_adapter(run: RunFolder) -> bool:
    """Whether the trained adapter is there and whole, as far as heads tell."""
    try:
        check_adapter(run)
    except FinetuneError:
        return False
    return True


def _config_before(run: RunFolder) -> dict[str, Any] | None:
    """The resolved config of a run, or None where it cannot be read."""
    try:
        found = yaml.safe_load(run.resolved.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
