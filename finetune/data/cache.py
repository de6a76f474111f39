"""Prepared data, kept under a key made of everything that it depends on.

It lies beside the runs (`runs/.data`), readable by its owner only: what was tokenised is as private as the text.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.config.files import source_files
from finetune.config.schema import Config, DataSource, is_local_data
from finetune.runs.files import replace_folder, storage_errors, write_json

KEPT = 4
"""Prepared datasets that are kept; the one that was used longest ago goes first. Trying out a few settings in turn is
common, and each copy takes five bytes a token."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")

SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was hashed could change again within the clock's resolution, unseen."""


class Cache:
    """A folder of prepared data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def key(self, config: Config, base_folder: Path, today: datetime.datetime) -> str | None:
        """What the prepared data depends on, hashed. None where that cannot be known without asking the Hub."""
        paths = [source.path for source in config.data if is_local_data(source.path)]
        if config.evaluation.path is not None:
            paths.append(config.evaluation.path)
        remote = [source for source in config.data if not is_local_data(source.path)]
        if not all(is_local_data(path) for path in paths) or not all(_pinned(source) for source in remote):
            return None
        with self._hashes() as hashes:
            files = {path: [(str(f), _hash(f, hashes)) for f in source_files(path)] for path in paths}
            base = [_hash(base_folder / name, hashes) for name in TOKENIZER_FILES]
            template = config.chat_template
            if template is not None and template.endswith(".jinja"):
                template = _hash(Path(template), hashes)
        depends: dict[str, Any] = {
            "program": [
                __version__,
                _own_code(),
                version("tokenizers"),
                version("jinja2"),
                version("numpy"),
                version("trl"),
            ],
            "files": files,
            "base": base,
            "template": template,
            "data": [source.model_dump(mode="json") for source in config.data],
            "evaluation": config.evaluation.model_dump(
                mode="json", include={"split", "path", "format", "columns", "on_overlong", "allow_leakage", "max_rows"}
            ),
            "train": config.train.model_dump(include={"sequence_length", "packing", "loss_on", "seed"}),
            "private_data": config.private_data,
            # Some templates write the date into every conversation.
            "day": today.date().isoformat(),
            "here": os.getcwd(),  # places are shown relative to it
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]

    def find(self, key: str) -> Path | None:
        """The prepared data of a key, if it is there."""
        folder = self._folder / key
        if not (folder / "data.json").is_file():
            return None
        with contextlib.suppress(OSError):
            os.utime(folder)
        return folder

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A new folder to write into; gone again if it was not `keep`t."""
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in self._folder.glob("*.partial"):
                if not is_being_written(old):  # a killed process left it
                    shutil.rmtree(old, ignore_errors=True)
            partial = self._folder / f"{os.getpid()}-{time.monotonic_ns()}.partial"
            partial.mkdir(mode=0o700)
        try:
            with storage_errors(partial):
                yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def keep(self, partial: Path, key: str) -> Path:
        """Give a folder that is whole its name."""
        final = self._folder / key
        replace_folder(partial, final)
        self._evict()
        return final

    def drop(self, key: str) -> None:
        """Forget a key whose data turned out damaged."""
        shutil.rmtree(self._folder / key, ignore_errors=True)

    def _evict(self) -> None:
        with contextlib.suppress(OSError):
            whole = [entry for entry in self._folder.iterdir() if (entry / "data.json").is_file()]
            for old in sorted(whole, key=lambda entry: -entry.stat().st_mtime)[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)

    @contextlib.contextmanager
    def _hashes(self) -> Iterator[dict[str, Any]]:
        """Hashes of files by path, size and times: gigabytes are not read again to see that they are the same."""
        path = self._folder / "hashes.json"
        known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_text("utf-8"))
        before = json.dumps(known)
        yield known
        if json.dumps(known) != before and self._folder.is_dir():
            write_json(path, known)


def is_being_written(partial: Path) -> bool:
    """Whether the process that began this folder, and is in its name, still runs, or may do so."""
    number = partial.name.partition("-")[0]
    if os.name != "posix":  # elsewhere the question ends the process that is asked about
        return time.time() - partial.stat().st_mtime < 24 * 3600
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:
        pass  # somebody else's
    return True


def _pinned(source: DataSource) -> bool:
    """Whether a Hub dataset can only ever be this one: its revision is a commit, not a branch or a tag."""
    return source.revision is not None and re.fullmatch("[0-9a-f]{40}", source.revision) is not None


def _hash(path: Path, known: dict[str, Any]) -> str | None:
    """The SHA-256 of a file's content; None for one that does not exist."""
    try:
        stat = os.stat(path)
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = known.get(str(path))
        if isinstance(entry, list) and entry[:-1] == state:
            return str(entry[-1])
        now = time.time_ns()
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None  # whoever reads it says why
    if max(stat.st_mtime_ns, stat.st_ctime_ns) < now - SETTLED_NS:
        known[str(path)] = [*state, digest]
    return digest


def _own_code() -> str:
    """The code that prepares data, hashed: the version alone would not tell two states of a working copy apart."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
