"""Files and Hub datasets → rows, each with the place it came from. Nothing is skipped: a bad row is an error."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import DataSource, is_local_data
from finetune.errors import DataError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON escapes half of a character beyond U+FFFF; one without its other half is no text."""

MAX_CELL = 100_000_000
"""csv refuses cells above 128 KiB unless told otherwise; a document can be longer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset as it was written."""

    values: dict[str, Any]
    place: str
    """`file:line` for text files, `file: row N` (counted from 1) for the others."""


def read_rows(source: DataSource) -> Iterator[Row]:
    """All rows of a source, renamed columns applied. Raises DataError at the first row that cannot be read."""
    if is_local_data(source.path):
        path = Path(source.path)
        shown = shown_path(path)
        readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
        rows = readers[path.suffix.lower()](path, shown)
    else:
        shown = source.path
        rows = _hub(source)
    empty = True
    for row in rows:
        empty = False
        yield _renamed(row, source.columns) if source.columns else row
    if empty:
        raise DataError("there are no rows in it", place=shown, hint="a dataset needs at least two rows")


def shown_path(path: Path) -> str:
    """A path as short as it can be shown: relative to here where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    values = dict(row.values)
    taken = set(columns.values())
    for name, column in columns.items():
        if column not in row.values:
            known = ", ".join(map(str, row.values)) or "none"
            raise DataError(
                f"has no column {column!r}, which `columns` maps to {name!r}",
                place=row.place,
                hint=f"its columns are: {known}",
            )
        values[name] = row.values[column]
    for column in taken - set(columns):
        values.pop(column, None)
    return Row(values, row.place)


def _jsonl(path: Path, shown: str) -> Iterator[Row]:
    with _opened(path, shown) as file:
        for number, line in enumerate(_decoded(file, shown), 1):
            # Without its end, so that a line that breaks off is wrong in its last column, not in the next line's first.
            line = line.rstrip()
            if not line:
                continue
            place = f"{shown}:{number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"not valid JSON: {_json_reason(error)}", place=place, hint=_jsonl_hint(line, number)
                ) from error
            if number == 1 and isinstance(values, list):
                raise DataError("a list where one object is expected", place=place, hint=_jsonl_hint(line, number))
            yield _checked(values, place, escapes=bool(_SURROGATE.search(line)))


def _jsonl_hint(line: str, number: int) -> str:
    if number == 1 and line.startswith("["):
        return "a file that is one JSON list must be named .json; in .jsonl each line is an object"
    return "each line must be one JSON object"


def _json(path: Path, shown: str) -> Iterator[Row]:
    with _opened(path, shown) as file:
        content = "".join(_decoded(file, shown))
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        hint = "a .json file is one list of objects; with one object a line it must be named .jsonl"
        place = f"{shown}:{line}" if line else shown
        raise DataError(f"not valid JSON: {_json_reason(error)}", place=place, hint=hint) from error
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list)]
        values = lists[0] if len(lists) == 1 else values
    if not isinstance(values, list):
        raise DataError(
            "expected a list of objects", place=shown, hint="write [ {…}, {…} ], or one object a line (.jsonl)"
        )
    escapes = bool(_SURROGATE.search(content))
    for number, value in enumerate(values, 1):
        yield _checked(value, f"{shown}: row {number}", escapes=escapes)


def _csv(path: Path, shown: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL)
    with _opened(path, shown) as file:
        reader = csv.reader(_decoded(file, shown), strict=True)
        header: list[str] | None = None
        while True:
            # A row may go over several lines; a person looks for it where it begins.
            place = f"{shown}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"not valid CSV: {error}", place=place, hint="check the quotes and line ends of this row"
                ) from error
            if not cells:
                continue
            if header is None:
                header = _header(cells, place)
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"has {len(cells)} cells where the header has {len(header)}",
                    place=place,
                    hint='a cell with a comma or a line break in it must stand in "quotes"',
                )
            yield Row(dict(zip(header, cells, strict=True)), place)


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names):
        raise DataError("two columns have the same name", place=place, hint="rename one of them")
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise DataError(
            f"has one column, named {names[0]!r}", place=place, hint="save the file with commas between the cells"
        )
    return names


def _decoded(file: Iterable[bytes], shown: str) -> Iterator[str]:
    """The lines of a text file. Line by line, so that a byte that is not UTF-8 is reported where it stands."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"not valid UTF-8 (byte {error.start + 1} of the line)",
                place=f"{shown}:{number}",
                hint="save the file as UTF-8",
            ) from error


def _parquet(path: Path, shown: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield _checked(values, f"{shown}: row {number}")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two: text that is not UTF-8, times that Python has no value for.
        raise DataError(
            "not a readable Parquet file", place=shown, hint="write it again; its end may be missing"
        ) from error


def _hub(source: DataSource) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        dataset = load_dataset(source.path, split=source.split, revision=source.revision)
    except DatasetNotFoundError as error:
        raise DataError(
            "there is no such dataset on the Hub, or it is private",
            place=source.path,
            hint="check the name (owner/name); for a private one, `hf auth login` first",
        ) from error
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DataError(
            f"cannot be loaded: {reason}",
            place=source.path,
            hint="check the network and `split:`, or download the file",
        ) from error
    for number, values in enumerate(dataset, 1):
        yield Row(dict(values), f"{source.path}: row {number}")


def _opened(path: Path, shown: str) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", place=shown, hint="check the file's permissions"
        ) from error


def _checked(values: Any, place: str, *, escapes: bool = False) -> Row:
    """A row, if it is one. `escapes`: the JSON it was read from spells out characters that may be none."""
    if not isinstance(values, dict):
        kinds = {list: "a list", str: "text", type(None): "null", bool: "true or false"}
        kind = kinds.get(type(values), "a number")
        raise DataError(
            f"expected an object with named fields, got {kind}", place=place, hint='a row looks like {"prompt": "…", …}'
        )
    if escapes:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"half a character: \\u{ord(error.object[error.start]):04x} without the other half of its pair",
                place=place,
                hint="the text was cut in the middle of a character: mend the row, or remove it",
            ) from error
    return Row(values, place)


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"
    return "nested too deep" if isinstance(error, RecursionError) else "a number of thousands of digits"
