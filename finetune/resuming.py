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
from finetune.console import Console
from finetune.data.prepare import PreparedData
from finetune.errors import RunError
from finetune.runs.folder import RunFolder, next_run, runs_of
from finetune.runs.manifest import as_plain, changed_keys, day_of, today
from finetune.train.checkpoints import clear_leftovers, newest_whole, step_of
from finetune.train.fingerprint import FREE, changes, fingerprint, read, require_same


def choose_run(loaded: LoadedConfig, runs: Path, fresh: bool) -> RunFolder:
    """The newest run of this config, or a new one."""
    existing = runs_of(loaded.name, runs)
    if not existing or (fresh and existing[-1].state is not None):
        return next_run(loaded.name, runs)
    return existing[-1]


@contextlib.contextmanager
def reserved(run: RunFolder) -> Iterator[None]:
    """Hold the run's folder. It is there afterwards only if something was begun in it."""
    new = not run.path.exists()
    run.create()
    try:
        with run.lock():
            yield
    finally:
        if new and not run.manifest.exists():
            with contextlib.suppress(OSError):
                (run.path / ".lock").unlink()
                run.path.rmdir()


def nothing_to_do(run: RunFolder, loaded: LoadedConfig) -> bool:
    """Whether the run is finished, with this very config or one that gives the same weights."""
    if run.state != "finished":
        return False
    before = _config_before(run)
    return before is not None and all(key in FREE for key in changed_keys(before, as_plain(loaded.config)))


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
        for change in found:
            console.say(f"{change}, as allowed, from step {step:,} on")
        return replace(self, changes=(*self.changes, *({"step": step, **asdict(change)} for change in found)))


def resumption(run: RunFolder, loaded: LoadedConfig, runs: Path, allowed: tuple[str, ...]) -> Resumption:
    """What there is to go on from; leftovers of a killed process are removed.

    Raises RunError for a finished run whose checkpoints are gone, and which was made with other settings.
    """
    clear_leftovers(run.checkpoints)
    checkpoint, _ = newest_whole(run.checkpoints)
    if checkpoint is None and run.state == "finished":
        before = _config_before(run)
        keys = changed_keys(before, as_plain(loaded.config)) if before is not None else ["resolved.yaml is damaged"]
        raise RunError(
            f"this run was finished with other settings ({', '.join(keys)}), and no checkpoint is left to go on from",
            place=str(run.path),
            hint=f"--fresh starts {next_run(loaded.name, runs).path}",
        )
    known = run.read_manifest() if run.manifest.exists() else {}
    changed = known.get("changes")
    if checkpoint is not None:
        # What the config alone tells is said before the data is tokenised.
        before = read(checkpoint)
        found = changes(before, before | {"config": as_plain(loaded.config)})
        fresh = str(next_run(loaded.name, runs).path)
        require_same(found, allowed, str(run.path), step_of(checkpoint), fresh)
    return Resumption(
        run,
        checkpoint,
        allowed,
        day_of(known) if checkpoint else today(),
        tuple(changed) if checkpoint and changed else (),
    )


def _config_before(run: RunFolder) -> dict[str, Any] | None:
    """The resolved config of a run, or None where it cannot be read."""
    try:
        found = yaml.safe_load(run.resolved.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
