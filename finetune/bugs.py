"""An exception that nobody expected: the traceback goes to a file, one line goes to the person."""

from __future__ import annotations

import tempfile
import traceback

from finetune.errors import FinetuneError
from finetune.redaction import redacted


def report(error: Exception) -> FinetuneError:
    """Write the traceback down, without the secrets that can be recognised, and say where.

    The file is its owner's alone (mode 0600). What the data holds may be in it: nobody can tell that from other words.
    """
    with tempfile.NamedTemporaryFile(
        "w", prefix="ft-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(redacted("".join(traceback.format_exception(error))))
    return FinetuneError(
        redacted(f"this is a bug in ft: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}"),
        hint=f"the traceback is in {file.name}; please report it (look it over first, it may name your files)",
    )
