"""llama.cpp's own C functions, called in this process.

The `xllamacpp` wheel is one shared object with all of llama.cpp and ggml in it, and its C symbols are visible. Nobody
promises that they stay: the versions whose symbols we have tried are listed here, and whoever calls one of them tests
first that it does what we think (see `quantize.py`). Only call what cannot abort on what it is given; models are run
in a process of their own (`process.py`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from pathlib import Path

from finetune.errors import MissingExtraError

KNOWN_VERSIONS = ("2026.10.11549",)
"""Versions of `xllamacpp` whose C symbols are known to be those that we call. The last one is recommended."""

_SUFFIXES = (".so", ".pyd")


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded shared object. Cached: loading takes 0.1 s. Calls through it run without Python's lock.

    The wheel's Python module is not imported. Raises MissingExtraError if the wheel is not installed, has another
    version than we know, or cannot be loaded.
    """
    install = 'pip install "finetune[gguf]"'
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise MissingExtraError("llama.cpp is not installed", hint=install)
    folder = Path(spec.origin).parent
    found = _version()
    if found not in KNOWN_VERSIONS:
        raise MissingExtraError(
            f"xllamacpp {found} is installed; the functions of {', '.join(KNOWN_VERSIONS)} are known",
            place=str(folder),
            hint=f'pip install "xllamacpp=={KNOWN_VERSIONS[-1]}"',
        )
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if not files:
        raise MissingExtraError("xllamacpp has no shared object", place=str(folder), hint=install)
    try:
        return ctypes.CDLL(str(files[0]))
    except OSError as error:
        raise MissingExtraError(f"llama.cpp cannot be loaded: {error}", place=str(files[0]), hint=install) from error


def _version() -> str:
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"
