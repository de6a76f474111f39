"""Files and Hub datasets → rows, each with the place it came from. Nothing is skipped: a bad row is an error."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import DataSource, is_local_data
from finetune.errors import DataError

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
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if not line.strip():
                continue
            place = f"{shown}:{number}"
            try:
                values = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"not valid UTF-8 (byte {error.start + 1} of the line)", place=place, hint="save the file as UTF-8"
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"not valid JSON: {_json_reason(error)}", place=place, hint="each line must be one JSON object"
                ) from error
            yield _checked(values, place)


def _json(path: Path, shown: str) -> Iterator[Row]:
    with _opened(path, shown) as file:
        content = file.read()
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError("not valid UTF-8", place=f"{shown}:{line}", hint="save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        hint = "a .json file is one list of objects; with one object a line it must be named .jsonl"
        raise DataError(f"not valid JSON: {_json_reason(error)}", place=f"{shown}:{line}", hint=hint) from error
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list)]
        values = lists[0] if len(lists) == 1 else values
    if not isinstance(values, list):
        raise DataError(
            "expected a list of objects", place=shown, hint="write [ {…}, {…} ], or one object a line (.jsonl)"
        )
    for number, value in enumerate(values, 1):
        yield _checked(value, f"{shown}: row {number}")


def _csv(path: Path, shown: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL)
    with _opened(path, shown):
        pass
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise DataError(
                    "not valid UTF-8", place=f"{shown}:{reader.line_num + 1}", hint="save the file as UTF-8"
                ) from error
            except csv.Error as error:
                raise DataError(
                    f"not valid CSV: {error}", place=f"{shown}:{reader.line_num}", hint="check the quotes in this row"
                ) from error
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(set(header)) != len(header):
                    raise DataError(
                        "two columns have the same name", place=f"{shown}:{reader.line_num}", hint="rename one of them"
                    )
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"has {len(cells)} cells where the header has {len(header)}",
                    place=f"{shown}:{reader.line_num}",
                    hint='a cell with a comma or a line break in it must stand in "quotes"',
                )
            yield Row(dict(zip(header, cells, strict=True)), f"{shown}:{reader.line_num}")


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
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            "not a readable Parquet file", place=shown, hint="write it again; its end may be missing"
        ) from error


def _hub(source: DataSource) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(source.path, split=source.split, revision=source.revision)
    except DatasetNotFoundError as error:
        raise DataError(
            "there is no such dataset on the Hub, or it is private",
            place=source.path,
            hint="check the name (owner/name); for a private one, `hf auth login` first",
        ) from error
    except (ValueError, OSError) as error:
        reason = str(error).split("\n")[0]
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


def _checked(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        kind = {list: "a list", str: "text", type(None): "null"}.get(type(values), "a number")
        raise DataError(
            f"expected an object with named fields, got {kind}", place=place, hint='a row looks like {"prompt": "…", …}'
        )
    return Row(values, place)


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"
    return "nested too deep"
