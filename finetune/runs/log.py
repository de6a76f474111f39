"""log.txt: everything the libraries say while a stage runs, so that the person's screen has only what concerns them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from finetune.runs.files import storage_errors

_QUIET = {
    # Bars and greetings of libraries; a progress bar of ours takes their place.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    # On a CPU: threads that wait must not spin, or two programs on one machine slow each other down tenfold and more.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Nothing is told to anybody. The Hub still works where a config names something on it.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    # Compiled kernels are never fetched from the Hub: what runs is what was installed.
    "USE_HUB_KERNELS": "0",
}


def quiet_environment() -> None:
    """Set, before they are imported, what keeps the libraries quiet and offline-minded. A person's own settings win."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Send Python's logging, warnings, and whatever is printed to stdout or stderr into a log file.

    The console keeps the terminal: it holds on to the streams that were there when it was made.
    """
    quiet_environment()
    with storage_errors(path):
        file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    with file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(sys.argv)}\n")
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
