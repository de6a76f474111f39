"""An exception that nobody expected: the traceback goes to a file, one line goes to the person."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback

from finetune.errors import FinetuneError
from finetune.redaction import redacted


def report(error: Exception) -> FinetuneError:
    """Write the traceback down, without the secrets that can be recognised, and say where. Never raises.

    The file is its owner's alone (mode 0600). What the data holds may be in it: nobody can tell that from other words.
    Where no file can be written, the one line is all that is left: a terminal is no place for the rest.
    """
    try:
        place = _written(redacted("".join(traceback.format_exception(error))))
        hint = f"the traceback is in {place}; please report it (look it over first, it may name your files)"
    except Exception as fault:
        reason = getattr(fault, "strerror", None) or type(fault).__name__
        hint = f"no file could be written for the traceback ({reason}); with room for one, the same command writes it"
    try:
        words = str(error).strip().split("\n")[0]
    except Exception:
        words = "it cannot say what"
    return FinetuneError(redacted(f"this is a bug in ft: {type(error).__name__}: {words}"), hint=hint)


def _written(text: str) -> str:
    """The name of a new file that holds a text. Nothing is left of one that cannot be written."""
    number, path = tempfile.mkstemp(prefix="ft-traceback-", suffix=".txt")
    try:
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return path
