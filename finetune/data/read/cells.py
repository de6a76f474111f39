"""Rows of cells under a header: .csv and .tsv. Parsed where they are read: a record may go over several lines."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.data.read import packed
from finetune.data.read.chunks import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    CHUNK_ROWS,
    CRLF,
    Chunk,
    Notes,
    ValueChunk,
    note,
)
from finetune.data.read.text import BOM, not_utf8
from finetune.errors import DataError

MAX_CELL = 100_000_000
"""csv refuses cells above 128 KiB unless told otherwise; a document can be longer."""


def read_csv(path: Path, shown: str, columns: dict[str, str]) -> Iterator[Chunk]:
    return _read(path, shown, columns, ",")


def read_tsv(path: Path, shown: str, columns: dict[str, str]) -> Iterator[Chunk]:
    return _read(path, shown, columns, "\t")


def _read(path: Path, shown: str, columns: dict[str, str], between: str) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_CELL)
    with packed.opened(path, shown) as file:
        text = _Lines(packed.lines(file, shown), shown)
        reader = csv.reader(text, delimiter=between, strict=True)
        header: list[str] | None = None
        values: list[Any] = []
        numbers: list[int] = []
        while True:
            # A record may go over several lines; a person looks for it where it begins.
            number = reader.line_num + 1
            text.begin_record(f"{shown}:{number}")
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                # After the dash, csv tells a programmer how to open the file.
                reason = str(error).partition(" - ")[0]
                raise DataError(
                    f"not valid {_kind(between)}: {reason}",
                    place=f"{shown}:{number}",
                    hint="check the quotes and line ends of this row",
                ) from error
            if header is None and text.wrong is not None:
                raise text.wrong
            if not cells:
                continue
            if header is None:
                header = _header(cells, f"{shown}:{number}", between)
                continue
            values.append(text.wrong or _record(header, cells, f"{shown}:{number}", between))
            numbers.append(number)
            if len(values) == CHUNK_ROWS or text.size >= CHUNK_BYTES:
                yield ValueChunk(f"{shown}:", values, numbers, columns, notes=text.notes)
                values, numbers, text.notes, text.size = [], [], {}, 0
        if values:
            yield ValueChunk(f"{shown}:", values, numbers, columns, notes=text.notes)


class _Lines:
    """The lines of a file as text, one by one as the parser asks for them, and what there is to say about them."""

    def __init__(self, lines: Iterable[bytes], shown: str) -> None:
        self._lines, self._shown = enumerate(lines, 1), shown
        self._record, self._length = shown, 0
        self.notes: Notes = {}
        self.size = 0
        """How many bytes were read since somebody set it to 0."""
        self.wrong: DataError | None = None
        """The first line of the record that is not UTF-8: the parser must still see where the record ends."""

    def begin_record(self, place: str) -> None:
        self._record, self._length, self.wrong = place, 0, None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.size += len(line)
        self._length += len(line)
        if self._length > packed.MAX_LINE:
            raise packed.too_long(self._record)
        if number == 1 and line.startswith(BOM):
            line = line.removeprefix(BOM)
            note(self.notes, BYTE_ORDER_MARK, f"{self._shown}:1")
        if line.endswith(b"\r\n"):
            note(self.notes, CRLF, f"{self._shown}:{number}")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.wrong = self.wrong or not_utf8(error, f"{self._shown}:{number}")
            return line.decode(errors="replace")


def _record(header: list[str], cells: list[str], place: str, between: str) -> dict[str, str] | DataError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    character = "comma" if between == "," else "tab"
    return DataError(
        f"has {len(cells)} cells where the header has {len(header)}",
        place=place,
        hint=f'a cell with a {character} or a line break in it must stand in "quotes"',
    )


def _header(cells: list[str], place: str, between: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names):
        raise DataError("two columns have the same name", place=place, hint="rename one of them")
    others = {",", ";", "\t"} - {between}
    if len(names) == 1 and others & set(names[0]):
        kind = "commas" if between == "," else "tabs"
        raise DataError(
            f"has one column, named {names[0]!r}", place=place, hint=f"save the file with {kind} between the cells"
        )
    return names


def _kind(between: str) -> str:
    return "CSV" if between == "," else "TSV"
