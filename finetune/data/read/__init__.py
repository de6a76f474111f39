"""Files and Hub datasets → rows, each with the place it came from. Nothing is skipped: a bad row is an error.

    source_files   which files a path names
    read_chunks    cuts them into chunks, cheaply; a chunk's rows() parses them, in another process if need be
    read_rows      the same, row by row, for whoever needs only a few

`text`, `cells`, `columnar` and `hub` know one kind of source each; `packed` unpacks any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.config import files
from finetune.config.schema import DataSource, data_kind, is_local_data
from finetune.data.read.cells import read_csv, read_tsv
from finetune.data.read.chunks import Chunk, Notes, Row
from finetune.data.read.columnar import read_arrow, read_parquet
from finetune.data.read.hub import read_hub
from finetune.data.read.text import read_json, read_jsonl
from finetune.errors import DataError

__all__ = ["Chunk", "Notes", "Row", "no_rows", "read_chunks", "read_rows", "shown_path", "source_files"]

_READERS: dict[str, Callable[[Path, str, dict[str, str]], Iterator[Chunk]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}


def read_rows(source: DataSource) -> Iterator[Row]:
    """All rows of a source, renamed columns applied. Raises DataError at the first row that cannot be read."""
    empty = True
    for chunk in read_chunks(source):
        for row in chunk.rows():
            if isinstance(row, DataError):
                raise row
            empty = False
            yield row
    if empty:
        raise no_rows(source)


def read_chunks(source: DataSource) -> Iterator[Chunk]:
    """A source in pieces, in order. Raises DataError only for what makes a whole file unreadable."""
    if not is_local_data(source.path):
        yield from read_hub(source)
        return
    for path in source_files(source):
        kind, shown = data_kind(path.name), shown_path(path)
        if kind is None:
            raise DataError("is of no known kind", place=shown, hint=files.KNOWN_ENDINGS)
        yield from _READERS[kind](path, shown, source.columns)


def source_files(source: DataSource) -> list[Path]:
    """The files that a local source names, sorted; none for a Hub dataset. Raises DataError for an empty folder."""
    if not is_local_data(source.path):
        return []
    return files.source_files(source.path, shown_path(Path(source.path)))


def shown_path(path: Path) -> str:
    """A path as short as it can be shown: relative to here where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def no_rows(source: DataSource) -> DataError:
    """What there is to say about a source that can be read, but holds nothing."""
    shown = shown_path(Path(source.path)) if is_local_data(source.path) else source.path
    return DataError("there are no rows in it", place=shown, hint="a dataset needs at least two rows")
