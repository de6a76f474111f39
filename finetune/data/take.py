"""`take`: some of a source's rows, the first ones or random ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from finetune.config.schema import DataSource
from finetune.data.read import Chunk, Notes, Row, read_chunks
from finetune.errors import DataError


@dataclass
class _Taken:
    """Rows that were picked out of a chunk."""

    held: list[Row | DataError]
    notes: Notes = field(default_factory=dict)

    def rows(self) -> Iterator[Row | DataError]:
        yield from self.held


def taken(source: DataSource, seed: int, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks with only the rows that `take` (and `shuffle`) leave."""
    if source.take is None:
        yield from chunks
        return
    wanted: set[int] | None = None
    if source.shuffle:
        # Counting costs a reading; holding all rows to draw from would cost their memory.
        count = sum(1 for chunk in read_chunks(source) for _ in chunk.rows())
        wanted = set(random.Random(seed).sample(range(count), min(source.take, count)))
    number = 0
    for chunk in chunks:
        held = []
        for row in chunk.rows():
            if number in wanted if wanted is not None else number < source.take:
                held.append(row)
            number += 1
        if held:
            yield _Taken(held, chunk.notes)
        if wanted is None and number >= source.take:
            return
