"""The run folder: the name of every artifact, the lock, and which run a command means.

runs/<config name>/            -2, -3 … for fresh ones
  config.yaml                  the config as it was written, recipes not laid in
  resolved.yaml                every value that was used, `ft train` can be given this file
  manifest.json                state, versions, hashes, revisions, hardware
  metrics.jsonl                one line per logged step
  evaluation.json              base against tuned
  verification.json            what was proven about each artifact below          (ft merge, ft export)
  log.txt                      everything the libraries said
  checkpoints/checkpoint-<n>/  to go on from after a fault
  adapter/                     the trained LoRA with the tokenizer and the chat template it was trained with
  merged/                      base + adapter in 16 bit            (ft merge, ft export --to hf)
  gguf/                        <name>-<quant>.gguf and Modelfile   (ft export --to gguf, gguf-lora)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import RunError, StorageError
from finetune.given_files import LFS_HINT, LFS_MESSAGE, is_lfs_pointer, not_a_file
from finetune.runs.files import storage_errors, write_json
from finetune.safetensors_heads import parse_header

State = Literal["running", "interrupted", "failed", "finished"]

DEFAULT_RUNS = Path("runs")

FORMAT = 1
"""What a manifest's `format` says: how a run folder is laid out. A higher one was made by a later ft."""


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. Holds no state: everything is read from, and written to, the folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def verification(self) -> Path:
        return self.path / "verification.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def gguf(self) -> Path:
        return self.path / "gguf"

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, or an error that says what is wrong with the folder."""
        if what := not_a_file(self.manifest):
            raise RunError(f"is {what}, not a file", place=str(self.manifest), hint="restore it, or train with --fresh")
        try:
            value = json.loads(self.manifest.read_text("utf-8"))
        except FileNotFoundError:
            raise RunError(
                "not a run folder: it has no manifest.json", place=str(self.path), hint="`ft runs` lists the runs"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                "manifest.json cannot be read", place=str(self.manifest), hint="restore it, or train with --fresh"
            ) from error
        if not isinstance(value, dict):
            raise RunError("manifest.json is not a mapping", place=str(self.manifest), hint="train with --fresh")
        format_ = value.get("format", FORMAT)
        if type(format_) is not int or not 1 <= format_ <= FORMAT:
            raise RunError(
                f"this run has the format {str(format_)[:20]}, and this ft knows up to {FORMAT}",
                place=str(self.manifest),
                hint="use the ft that made it, or a newer one",
            )
        return value

    def update_manifest(self, **fields: Any) -> None:
        """Set top-level fields of the manifest, or remove them (None); the file is replaced whole."""
        manifest = self.read_manifest() if self.manifest.exists() else {}
        write_json(self.manifest, {name: value for name, value in {**manifest, **fields}.items() if value is not None})

    @property
    def state(self) -> State | None:
        """The recorded state, or None for a folder that never became a run."""
        if not self.manifest.exists():
            return None
        state: State | None = self.read_manifest().get("state")
        return state

    def create(self) -> None:
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds answers and a log

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process. The operating system frees the lock however the process ends."""
        path = self.path / ".lock"
        with storage_errors(path):
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 - lives as long as the lock
        with file:
            try:
                _lock_file(file.fileno())
                if os.name == "posix" and not _is_at(file.fileno(), path):
                    raise OSError  # who had the lock has just removed it, with the folder
            except OSError as error:
                file.seek(0)
                holder = file.read(100).decode(errors="replace").strip() or "another process"
                raise StorageError(
                    f"in use by {holder}", place=str(self.path), hint="wait for it, or start a second run with --fresh"
                ) from error
            with contextlib.suppress(OSError):  # on a full disk the lock holds all the same: `ft clean` makes room
                file.truncate(0)
                file.write(f"process {os.getpid()}".encode())
            yield

    @property
    def in_use(self) -> bool:
        """Whether a process holds the folder."""
        if not (self.path / ".lock").is_file():
            return False
        try:
            with self.lock():
                return False
        except StorageError:
            return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a file that was opened still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _lock_file(descriptor: int) -> None:
    if os.name == "posix":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]


def runs_of(name: str, runs: Path) -> list[RunFolder]:
    """All runs of a config, oldest first: `name`, `name-2`, `name-3` …"""
    pattern = re.compile(re.escape(name) + r"(?:-([2-9]|[1-9][0-9]+))?")
    found: list[tuple[int, RunFolder]] = []
    if runs.is_dir():
        for entry in runs.iterdir():
            match = pattern.fullmatch(entry.name)
            if match and entry.is_dir() and _may_be_of(name, RunFolder(entry)):
                found.append((int(match[1] or 1), RunFolder(entry)))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def next_run(name: str, runs: Path) -> RunFolder:
    """A folder that does not exist yet for one more run of a config."""
    existing = runs_of(name, runs)
    last = existing[-1].name if existing else None
    number = 0 if last is None else 1 if last == name else int(last[len(name) + 1 :])
    while True:
        number += 1
        run = RunFolder(runs / (name if number == 1 else f"{name}-{number}"))
        if not run.path.exists():
            return run


def _may_be_of(name: str, run: RunFolder) -> bool:
    """Whether a run is of the config of this name: `legal-2` may be the second of `legal` or the first of `legal-2`."""
    try:
        config = run.read_manifest().get("config_path")
    except RunError:
        return True
    return not isinstance(config, str) or Path(config).stem == name


def open_run(path: Path, runs: Path = DEFAULT_RUNS) -> RunFolder:
    """The run that a person named: a folder, or just its name below `runs/`.

    A folder that is no run does not hide the run of its name. What has no name of its own (`.`, `..`) is a place and
    nothing else, and gets its full path: exports are named after the run, and prepared data lies beside it.
    """
    is_name = path.name != "" and ".." not in path.parts
    candidates = (path, runs / path) if is_name else (path,)
    if folders := [candidate for candidate in candidates if candidate.is_dir()]:
        named = [folder for folder in folders if os.path.lexists(folder / "manifest.json")]
        run = RunFolder((named or folders)[0])
        run.read_manifest()
        return run if run.name not in ("", "..") else RunFolder(run.path.resolve())
    for candidate in candidates:
        if candidate.is_file():
            raise _not_a_run(path, candidate)
    from difflib import get_close_matches

    names = sorted(entry.name for entry in runs.iterdir()) if runs.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    hint = f"did you mean {runs / close[0]}?" if close else "`ft runs` lists the runs; `ft train CONFIG` makes one"
    raise RunError("no such run", place=str(path), hint=hint)


def _not_a_run(path: Path, file: Path) -> RunError:
    if file.suffix in (".yaml", ".yml"):
        hint = f"name the run that `ft train {path}` made; `ft runs` lists them"
        return RunError("this is a config, not a run", place=str(path), hint=hint)
    return RunError("this is a file, not a run folder", place=str(path), hint="`ft runs` lists the runs")


def finished_run(path: Path, runs: Path = DEFAULT_RUNS) -> RunFolder:
    """Like `open_run`, but the run must have a trained adapter."""
    run = open_run(path, runs)
    if not (run.adapter / "adapter_config.json").is_file():
        config = run.read_manifest().get("config_path", "CONFIG")
        raise RunError(
            "this run has no trained adapter yet", place=str(run.path), hint=f"`ft train {config}` goes on with it"
        )
    return run


def check_adapter(run: RunFolder) -> None:
    """Raise RunError or StorageError unless a run's adapter is whole, as far as heads tell. Nothing is loaded.

    For whoever hands the adapter to PEFT, which would say so after the base is in memory, or ask the Hub for it.
    """
    path = run.adapter / "adapter_config.json"
    again = "restore it, or train again with --fresh"
    try:
        text = path.read_bytes()
        settings = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        pointer = isinstance(error, ValueError) and is_lfs_pointer(text)
        message = LFS_MESSAGE if pointer else "cannot be read"
        raise RunError(message, place=str(path), hint=LFS_HINT if pointer else again) from error
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise RunError("does not say what kind of adapter this is (peft_type)", place=str(path), hint=again)
    weights = run.adapter / "adapter_model.safetensors"
    if not weights.exists():
        raise RunError("there is no adapter_model.safetensors", place=str(run.adapter), hint=again)
    parse_header(weights)


def list_runs(runs: Path) -> list[RunFolder]:
    """Every run below a folder, by name. Raises RunError where a file is in the folder's place."""
    if runs.is_file():
        raise RunError("this is a file, not a folder of runs", place=str(runs), hint="`--runs FOLDER` names another")
    if not runs.is_dir():
        return []
    return [RunFolder(entry) for entry in sorted(runs.iterdir()) if (entry / "manifest.json").is_file()]
