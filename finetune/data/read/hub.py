"""Datasets on the Hugging Face Hub, through `datasets`. No code of a dataset's author is ever run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from finetune.config.schema import DataSource
from finetune.data.read.chunks import CHUNK_ROWS, Chunk, ValueChunk
from finetune.errors import DataError

STREAM_ROWS = 100
"""Rows in a chunk when they come over the network one by one: with `take: 50`, little is fetched in vain."""

_CHOICES = re.compile(r"(?:available configs|Available|one of|Available splits):? (\[[^]]*\])")
"""Where `datasets` lists what could have been named."""


def read_hub(source: DataSource) -> Iterator[Chunk]:
    with _translated(source):
        from datasets import load_dataset

        dataset = load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
        rows: Iterator[Any] = iter(dataset)
        size, number = STREAM_ROWS if source.streaming else CHUNK_ROWS, 1
        while held := [dict(values) for values in islice(rows, size)]:
            yield ValueChunk(f"{source.path}: row ", held, range(number, number + len(held)), source.columns)
            number += len(held)


@contextlib.contextmanager
def _translated(source: DataSource) -> Iterator[None]:
    """Around loading and around reading: with `streaming`, the network can fail at any row."""
    import httpx
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        yield
    except DatasetNotFoundError as error:
        raise DataError(
            "there is no such dataset on the Hub, or it is private",
            place=source.path,
            hint="check the name (owner/name); for a private one, `hf auth login` first",
        ) from error
    except (DatasetsError, ValueError, OSError, RuntimeError, ImportError, httpx.HTTPError) as error:
        message, hint = _explained(str(error).strip() or type(error).__name__, source)
        raise DataError(message, place=source.path, hint=hint) from error


def _explained(reason: str, source: DataSource) -> tuple[str, str]:
    """What `datasets` said, as a message and a hint in terms of the config's keys."""
    found = _CHOICES.search(reason)
    choices = ", ".join(re.findall(r"'([^']*)'", found[1])) if found else ""
    if reason.startswith("Config name is missing"):
        return "has several configurations, and none is chosen", f"set `name:` to one of {choices}"
    if reason.startswith("BuilderConfig"):
        return f"has no configuration {source.name!r}", f"set `name:` to one of {choices}"
    if reason.startswith(("Unknown split", "Bad split")):
        return f"has no split {source.split!r}", f"set `split:` to one of {choices}"
    return f"cannot be loaded: {reason.splitlines()[0]}", "check the network and `split:`, or download the file"
