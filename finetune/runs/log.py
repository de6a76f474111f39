"""log.txt: everything the libraries say while a stage runs, so that the person's screen has only what concerns them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.config.schema import Config, is_local_base, is_local_data
from finetune.console import Console
from finetune.redaction import redacted, redacted_command, secrets_of
from finetune.runs.files import FULL, storage_errors

_QUIET = {
    # Bars and greetings of libraries; a progress bar of ours takes their place.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    # On a CPU: threads that wait must not spin, or two programs on one machine slow each other down tenfold and more.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Nothing is told to anybody. The Hub still works where a config names something on it. The last is what vLLM asks.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    # Compiled kernels are never fetched from the Hub: what runs is what was installed.
    "USE_HUB_KERNELS": "0",
}


def quiet_environment() -> None:
    """Set, before they are imported, what keeps the libraries quiet and offline-minded. A person's own settings win."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Every micro batch has another number of tokens. torch's allocator keeps blocks of each size that it has seen, and
    # runs out of memory that nobody uses; segments that grow do not. (Not under Windows' Linux, whose driver has none.)
    own = "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ
    if sys.platform == "linux" and "microsoft" not in platform.release().lower() and not own:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def without_compiler(config: Config) -> None:
    """Tell torch to leave its compiler alone, where nothing is to be compiled; a person's own setting wins.

    bitsandbytes compiles some functions when it is imported, which loads all of inductor: 540 modules, 15 % of the
    time that importing takes (10.6 → 9.0 CPU seconds on a slow machine).
    """
    if not config.speed.compile:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def stay_offline(config: Config) -> None:
    """Tell the Hub's libraries not to look anything up, where all that a config names is on this machine already.

    They read HF_HUB_OFFLINE when they are imported, so this comes first; a person's own setting wins. On this machine
    is also what the Hub's cache holds of a model whose `revision` is a commit: that can never become another one.
    """
    data = all(is_local_data(source.path) for source in config.data)
    if data and (is_local_base(config.base) or _is_cached(config)):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _is_cached(config: Config) -> bool:
    """Whether all of a Hub model is in the cache. Looked up by the cache's layout: importing the Hub's library would
    already be too late for `stay_offline`."""
    if config.revision is None or re.fullmatch("[0-9a-f]{40}", config.revision) is None:
        return False
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(os.environ.get("HF_HOME", home)) / "hub")).expanduser()
    folder = cache / f"models--{config.base.replace('/', '--')}" / "snapshots" / config.revision
    weights = {path.name for path in folder.glob("*.safetensors")}
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
        needed = set(index["weight_map"].values())
    except FileNotFoundError:
        needed = {"model.safetensors"}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False
    return needed <= weights and all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))


class _WithoutSecrets(io.TextIOWrapper):
    """A text file into which no token and no password of the environment is written."""

    def __init__(self, binary: io.BufferedWriter) -> None:
        super().__init__(binary, encoding="utf-8", errors="replace")
        self._secrets = secrets_of(os.environ)

    def write(self, text: str, /) -> int:
        super().write(redacted(text, self._secrets))
        return len(text)


class _Forgiving(io.FileIO):
    """A file that takes everything, though the disk may not."""

    fault: OSError | None = None
    """The first, if there was one."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.fault = self.fault or error
            return memoryview(data).nbytes

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # a network's disk is asked last
            self.fault = self.fault or error


def _open(path: Path) -> _Forgiving:
    """The log, to be appended to. Raises StorageError, but not for a full disk."""
    with storage_errors(path):
        try:
            return _Forgiving(path, "ab")
        except OSError as error:
            if error.errno not in FULL:
                raise
            nowhere = _Forgiving(os.devnull, "ab")
            nowhere.fault = error
            return nowhere


@contextlib.contextmanager
def _told_at_the_end(file: _Forgiving, path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if file.fault is not None:
            Console().warn(f"{path} does not have all that the libraries said: {file.fault.strerror}")


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Send Python's logging, warnings, and whatever is printed to stdout or stderr into a log file.

    The console keeps the terminal: it holds on to the streams that were there when it was made. What the disk does not
    take is lost, and said once at the end: a run is worth more than its log.
    """
    quiet_environment()
    raw = _open(path)
    with _told_at_the_end(raw, path), _WithoutSecrets(io.BufferedWriter(raw)) as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(redacted_command(sys.argv))}\n")
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        logging.captureWarnings(True)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)
