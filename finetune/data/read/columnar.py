"""Tables stored by column: .parquet, and .arrow, which is either the IPC file or the IPC stream format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.read.chunks import Chunk, Notes, Row, ValueChunk, finished
from finetune.data.read.packed import unpacked
from finetune.errors import DataError

BATCH_ROWS = 1024

_FILE_MAGIC = b"ARROW1"
"""How the IPC file format begins; the stream format, which `datasets` writes, has no magic."""


@dataclass
class BatchChunk:
    """A record batch that has been checked. It becomes Python values where the chunk is read."""

    shown: str
    first: int
    """The number of the first row, from 1."""
    batch: Any
    columns: dict[str, str]
    notes: Notes = field(default_factory=dict)

    def rows(self) -> Iterator[Row | DataError]:
        try:
            found = self.batch.to_pylist()
        except (ValueError, OverflowError):
            found = [_one(self.batch, index, self.shown, self.first) for index in range(len(self.batch))]
        for number, values in enumerate(found, self.first):
            if isinstance(values, DataError):
                yield values
            else:
                yield finished(values, f"{self.shown}: row {number}", self.columns)

    def __getstate__(self) -> dict[str, Any]:
        """With the batch as IPC: pickled as it is, a slice takes the whole buffers along that it is a slice of."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.batch.schema) as stream:
            stream.write_batch(self.batch)
        return {**self.__dict__, "batch": sink.getvalue().to_pybytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import pyarrow as pa

        self.__dict__.update(state)
        with pa.ipc.open_stream(state["batch"]) as stream:
            self.batch = stream.read_next_batch()


def read_parquet(path: Path, shown: str, columns: dict[str, str]) -> Iterator[Chunk]:
    return _read(path, shown, columns, _parquet_batches, "not a readable Parquet file")


def read_arrow(path: Path, shown: str, columns: dict[str, str]) -> Iterator[Chunk]:
    return _read(path, shown, columns, _arrow_batches, "not a readable Arrow file")


def _read(
    path: Path, shown: str, columns: dict[str, str], batches: Callable[[Path], Iterator[Any]], fault: str
) -> Iterator[Chunk]:
    import pyarrow as pa

    number = 1
    with unpacked(path, shown) as whole:
        try:
            for batch in batches(whole):
                for begin in range(0, len(batch), BATCH_ROWS):
                    part = batch.slice(begin, BATCH_ROWS)
                    yield _chunk(part, shown, number, columns)
                    number += len(part)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(fault, place=shown, hint="write it again; its end may be missing") from error


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Memory-mapped: what is not looked at is not read, and what was looked at need not stay in memory."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        file.seek(0)
        if not is_file:
            with pa.ipc.open_stream(file) as stream:
                yield from stream
            return
        with pa.ipc.open_file(file) as table:
            for index in range(table.num_record_batches):
                yield table.get_batch(index)


def _chunk(batch: Any, shown: str, first: int, columns: dict[str, str]) -> Chunk:
    """A chunk of rows that are safe to touch: a damaged file may hold offsets that point outside of it."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except (pa.ArrowException, ValueError):
        values = [_one(batch, index, shown, first) for index in range(len(batch))]
        return ValueChunk(f"{shown}: row ", values, range(first, first + len(values)), columns)
    return BatchChunk(shown, first, batch, columns)


def _one(batch: Any, index: int, shown: str, first: int) -> Any:
    """The values of one row of a batch that holds something wrong, or what is wrong with this row."""
    import pyarrow as pa

    row = batch.slice(index, 1)
    try:
        row.validate(full=True)
        return row.to_pylist()[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        text = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
        return DataError(
            "holds text that is not UTF-8" if text else "holds a value that cannot be read",
            place=f"{shown}: row {first + index}",
            hint="write the file again from its source; a time may be out of range, or the file damaged",
        )
