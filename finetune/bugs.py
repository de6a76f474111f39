"""An exception that nobody expected: the traceback goes to a file, one line goes to the person."""

from __future__ import annotations

import tempfile
import traceback

from finetune.errors import FinetuneError


def report(error: Exception) -> FinetuneError:
    """Write the traceback down and say where."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="ft-traceback-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    return FinetuneError(
        f"this is a bug in ft: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}",
        hint=f"the traceback is in {file.name}; please report it (look it over first, it may name your files)",
    )
