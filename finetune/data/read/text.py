"""JSON: one object a line (.jsonl), or a file that is one list of them (.json)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.read.chunks import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    CHUNK_ROWS,
    CRLF,
    HUGE_ROW,
    Chunk,
    Notes,
    Row,
    ValueChunk,
    finished,
    note,
)
from finetune.data.read.packed import lines, opened
from finetune.errors import DataError

BOM = b"\xef\xbb\xbf"
"""What some editors put before a text in UTF-8. It is not data."""

HUGE_BYTES = 10_000_000
"""A row above this is rather two rows whose line end was lost, or a file within a file, than a text."""

MAX_JSON = 4_000_000_000
"""A .json file has to be held whole, as text and as values; one object a line has not."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON escapes half of a character beyond U+FFFF; one without its other half is no text."""


@dataclass
class LineChunk:
    """Lines as they stand in the file. 50,000 of 900 bytes take 0.44 s on one core, and json.loads 0.35 of them."""

    shown: str
    first: int
    """The number of the first line, from 1."""
    lines: list[bytes]
    columns: dict[str, str]
    notes: Notes = field(default_factory=dict)

    def rows(self) -> Iterator[Row | DataError]:
        self.notes.clear()
        loads, prefix, columns = json.loads, f"{self.shown}:", self.columns
        for number, line in enumerate(self.lines, self.first):
            if number == 1 and line.startswith(BOM):
                line = line.removeprefix(BOM)
                note(self.notes, BYTE_ORDER_MARK, f"{prefix}{number}")
            if line.endswith(b"\r\n"):
                note(self.notes, CRLF, f"{prefix}{number}")
            if len(line) > HUGE_BYTES:
                note(self.notes, HUGE_ROW, f"{prefix}{number}")
            try:
                # Without its end, so that a line that breaks off is wrong in its last column, not in the next line's
                # first.
                text = line.decode().rstrip()
                if not text:
                    continue
                values = loads(text)
            except UnicodeDecodeError as error:
                yield not_utf8(error, f"{prefix}{number}")
                continue
            except (ValueError, RecursionError) as error:
                yield DataError(
                    f"not valid JSON: {_reason(error)}", place=f"{prefix}{number}", hint=_line_hint(text, number)
                )
                continue
            if number == 1 and isinstance(values, list):
                hint = _line_hint(text, number)
                yield DataError("a list where one object is expected", place=f"{prefix}{number}", hint=hint)
                continue
            escapes = "\\u" in text and _SURROGATE.search(text) is not None
            if columns or escapes or type(values) is not dict:
                yield finished(values, f"{prefix}{number}", columns, escapes=escapes)
            else:
                yield Row(values, f"{prefix}{number}")


def read_jsonl(path: Path, shown: str, columns: dict[str, str]) -> Iterator[Chunk]:
    with opened(path, shown) as file:
        held: list[bytes] = []
        first, size = 1, 0
        for line in lines(file, shown):
            held.append(line)
            size += len(line)
            if len(held) == CHUNK_ROWS or size >= CHUNK_BYTES:
                yield LineChunk(shown, first, held, columns)
                first, size, held = first + len(held), 0, []
        if held:
            yield LineChunk(shown, first, held, columns)


def read_json(path: Path, shown: str, columns: dict[str, str]) -> Iterator[Chunk]:
    notes: Notes = {}
    content = _whole(path, shown, notes)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        hint = "a .json file is one list of objects; with one object a line it must be named .jsonl"
        place = f"{shown}:{line}" if line else shown
        raise DataError(f"not valid JSON: {_reason(error)}", place=place, hint=hint) from error
    escapes = _SURROGATE.search(content) is not None
    del content
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list)]
        values = lists[0] if len(lists) == 1 else values
    if not isinstance(values, list):
        raise DataError(
            "expected a list of objects", place=shown, hint="write [ {…}, {…} ], or one object a line (.jsonl)"
        )
    for begin in range(0, len(values), CHUNK_ROWS):
        held = values[begin : begin + CHUNK_ROWS]
        numbers = range(begin + 1, begin + 1 + len(held))
        yield ValueChunk(f"{shown}: row ", held, numbers, columns, escapes, notes)
        notes = {}


def _whole(path: Path, shown: str, notes: Notes) -> str:
    with opened(path, shown) as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise DataError(
            f"has more than {MAX_JSON:,} bytes, and a .json file has to be held whole",
            place=shown,
            hint="write one object a line and name it .jsonl",
        )
    if content.startswith(BOM):
        content = content.removeprefix(BOM)
        note(notes, BYTE_ORDER_MARK, f"{shown}:1")
    crlf = content.find(b"\r\n")
    if crlf >= 0:
        line = content.count(b"\n", 0, crlf) + 1
        note(notes, CRLF, f"{shown}:{line}", content.count(b"\r\n"))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        error.start -= content.rfind(b"\n", 0, error.start) + 1
        raise not_utf8(error, f"{shown}:{line}") from error


def not_utf8(error: UnicodeDecodeError, place: str) -> DataError:
    return DataError(
        f"not valid UTF-8 (byte {error.start + 1} of the line)", place=place, hint="save the file as UTF-8"
    )


def _line_hint(line: str, number: int) -> str:
    if number == 1 and line.startswith("["):
        return "a file that is one JSON list must be named .json; in .jsonl each line is an object"
    return "each line must be one JSON object"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"
    return "nested too deep" if isinstance(error, RecursionError) else "a number of thousands of digits"
