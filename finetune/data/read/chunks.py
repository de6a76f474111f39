"""What reading gives: rows, in chunks small enough to hold and cheap enough to send to another process.

The parent only cuts a file into chunks. Parsing, which costs more than reading, happens in `Chunk.rows()`, wherever the
chunk has been sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from finetune.errors import DataError

CHUNK_ROWS = 500
CHUNK_BYTES = 4_000_000
"""A chunk ends at whichever comes first: enough rows to be worth sending, few enough bytes to hold many of them."""

BYTE_ORDER_MARK = "byte order mark"
CRLF = "CRLF line ends"
HUGE_ROW = "row over 10 MB"

Notes = dict[str, tuple[int, str]]
"""What is no fault, but worth a word: kind → how often, and the place of the first."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset as it was written."""

    values: dict[str, Any]
    place: str
    """`file:line` for lines of text, `file: row N` (counted from 1) for the others."""


class Chunk(Protocol):
    """Some consecutive rows of one file. Can be pickled."""

    @property
    def notes(self) -> Notes:
        """What was noted; complete once `rows()` is exhausted."""

    def rows(self) -> Iterator[Row | DataError]:
        """The rows, columns renamed. One that is wrong comes out as the error, and reading goes on with the next."""


@dataclass
class ValueChunk:
    """Rows whose values have been parsed already."""

    place: str
    """What stands before a row's number: `file:` or `file: row `."""
    values: list[Any]
    """What should be objects; an error stands where there is no value."""
    numbers: Sequence[int]
    columns: dict[str, str]
    escapes: bool = False
    """Whether the JSON that they come from spells out characters that may be none."""
    notes: Notes = field(default_factory=dict)

    def rows(self) -> Iterator[Row | DataError]:
        for value, number in zip(self.values, self.numbers, strict=True):
            if isinstance(value, DataError):
                yield value
            else:
                yield finished(value, f"{self.place}{number}", self.columns, escapes=self.escapes)


def finished(values: Any, place: str, columns: dict[str, str], *, escapes: bool = False) -> Row | DataError:
    """A row, if it is one, with its columns renamed; otherwise what is wrong with it."""
    if not isinstance(values, dict):
        kinds = {list: "a list", str: "text", type(None): "null", bool: "true or false"}
        kind = kinds.get(type(values), "a number")
        return DataError(
            f"expected an object with named fields, got {kind}", place=place, hint='a row looks like {"prompt": "…", …}'
        )
    if escapes:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return DataError(
                f"half a character: \\u{ord(error.object[error.start]):04x} without the other half of its pair",
                place=place,
                hint="the text was cut in the middle of a character: mend the row, or remove it",
            )
    return _renamed(values, place, columns) if columns else Row(values, place)


def _renamed(values: dict[str, Any], place: str, columns: dict[str, str]) -> Row | DataError:
    renamed = dict(values)
    for name, column in columns.items():
        if column not in values:
            known = ", ".join(map(str, values)) or "none"
            return DataError(
                f"has no column {column!r}, which `columns` maps to {name!r}",
                place=place,
                hint=f"its columns are: {known}",
            )
        renamed[name] = values[column]
    for column in set(columns.values()) - set(columns):
        renamed.pop(column, None)
    return Row(renamed, place)


def note(notes: Notes, kind: str, place: str, count: int = 1) -> None:
    """Count something that is worth a word; the first place stays."""
    before, first = notes.get(kind, (0, place))
    notes[kind] = (before + count, first)
