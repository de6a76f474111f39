"""Files → rows: every kind of file, every row with its place, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.schema import DataSource
from finetune.data.read import read_rows
from finetune.errors import DataError

from .conftest import fault, read, write_rows

ROWS = [{"prompt": "Wo?", "completion": "Zürich, 1 €"}, {"prompt": 'a "b", c', "completion": "d\ne"}]


def write_csv(path: Path) -> Path:
    path.write_text('prompt,completion\nWo?,"Zürich, 1 €"\n"a ""b"", c","d\ne"\n', "utf-8")
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def test_every_kind_of_file_gives_the_same_rows(here: Path) -> None:
    assert read(write_rows(here / "rows.jsonl", ROWS)) == ROWS
    (here / "rows.json").write_text(json.dumps(ROWS))
    assert read(here / "rows.json") == ROWS
    (here / "wrapped.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read(here / "wrapped.json") == ROWS
    assert read(write_csv(here / "rows.csv")) == ROWS
    assert read(write_parquet(here / "rows.PARQUET")) == ROWS


def test_every_row_has_its_place(here: Path) -> None:
    def places(path: Path) -> list[str]:
        return [row.place for row in read_rows(DataSource(path=str(path)))]

    (here / "rows.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert places(here / "rows.jsonl") == ["rows.jsonl:1", "rows.jsonl:4"]
    # A row of CSV over two lines is looked for where it begins.
    (here / "rows.csv").write_text('a,b\n"1\n",2\n\n3,4\n')
    assert places(here / "rows.csv") == ["rows.csv:2", "rows.csv:5"]
    (here / "rows.json").write_text('[{"a": 1}, {"a": 2}]')
    assert places(here / "rows.json") == ["rows.json: row 1", "rows.json: row 2"]
    assert places(write_parquet(here / "rows.parquet")) == ["rows.parquet: row 1", "rows.parquet: row 2"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_is_not_data(here: Path, name: str) -> None:
    text = {"rows.jsonl": '{"a": "1"}\n', "rows.json": '[{"a": "1"}]', "rows.csv": "a\n1\n"}[name]
    (here / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(here / name) == [{"a": "1"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_windows_line_ends(here: Path, name: str) -> None:
    text = {"rows.jsonl": '{"a": "1"}\r\n{"a": "2"}\r\n', "rows.csv": "a\r\n1\r\n2\r\n"}[name]
    (here / name).write_bytes(text.encode())
    assert read(here / name) == [{"a": "1"}, {"a": "2"}]


def test_only_a_line_feed_ends_a_line_of_jsonl(here: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\x0cd"}, {"text": "e"}]
    assert read(write_rows(here / "rows.jsonl", rows)) == rows


def test_columns_are_renamed(here: Path) -> None:
    path = write_rows(here / "rows.jsonl", [{"q": "Why?", "a": "So.", "id": 7}])
    assert read(path, columns={"prompt": "q", "completion": "a"}) == [{"prompt": "Why?", "completion": "So.", "id": 7}]
    assert read(path, columns={"q": "a", "a": "q"}) == [{"q": "So.", "a": "Why?", "id": 7}]
    assert fault(path, columns={"prompt": "question"}) == (
        "rows.jsonl:1: has no column 'question', which `columns` maps to 'prompt' | its columns are: q, a, id"
    )


MESSAGES = [
    ("a.jsonl", b"", "a.jsonl: there are no rows in it | a dataset needs at least two rows"),
    ("a.jsonl", b"\n \n", "a.jsonl: there are no rows in it | a dataset needs at least two rows"),
    ("a.json", b"[]", "a.json: there are no rows in it | a dataset needs at least two rows"),
    ("a.csv", b"", "a.csv: there are no rows in it | a dataset needs at least two rows"),
    ("a.csv", b"prompt,completion\n", "a.csv: there are no rows in it | a dataset needs at least two rows"),
    (
        "a.jsonl",
        b'{"a": 1}\n{"a": b}\n',
        "a.jsonl:2: not valid JSON: expecting value (column 7) | each line must be one JSON object",
    ),
    (
        "a.jsonl",
        b'{"a": 1}\n  {"a": 1\n',
        "a.jsonl:2: not valid JSON: expecting ',' delimiter (column 10) | each line must be one JSON object",
    ),
    (
        "a.jsonl",
        b'{"a": 1}\n"text"\n',
        'a.jsonl:2: expected an object with named fields, got text | a row looks like {"prompt": "…", …}',
    ),
    (
        "a.jsonl",
        b'[{"a": 1}]',
        "a.jsonl:1: a list where one object is expected | a file that is one JSON list must be named .json; in .jsonl "
        "each line is an object",
    ),
    (
        "a.jsonl",
        b'[\n{"a": 1}]',
        "a.jsonl:1: not valid JSON: expecting value (column 2) | a file that is one JSON list must be named .json; in "
        ".jsonl each line is an object",
    ),
    (
        "a.jsonl",
        b'{"a": 1}\n{"a": "\xff"}',
        "a.jsonl:2: not valid UTF-8 (byte 8 of the line) | save the file as UTF-8",
    ),
    (
        "a.jsonl",
        '{"a": 1}'.encode("utf-16"),
        "a.jsonl:1: not valid UTF-8 (byte 1 of the line) | save the file as UTF-8",
    ),
    (
        "a.jsonl",
        b'{"a": ' + b"[" * 100_000,
        "a.jsonl:1: not valid JSON: nested too deep | each line must be one JSON object",
    ),
    (
        "a.jsonl",
        b'{"a": ' + b"1" * 5000 + b"}",
        "a.jsonl:1: not valid JSON: a number of thousands of digits | each line must be one JSON object",
    ),
    (
        "a.jsonl",
        b'{"a": 1}\n{"a": "cut \\ud83d"}',
        "a.jsonl:2: half a character: \\ud83d without the other half of its pair | the text was cut in the middle of a "
        "character: mend the row, or remove it",
    ),
    (
        "a.json",
        b'[{"a": 1}, {"a": ["\\udca9"]}]',
        "a.json: row 2: half a character: \\udca9 without the other half of its pair | the text was cut in the middle "
        "of a character: mend the row, or remove it",
    ),
    (
        "a.json",
        b'{"a": 1}\n{"a": 2}\n',
        "a.json:2: not valid JSON: extra data (column 1) | a .json file is one list of objects; with one object a line "
        "it must be named .jsonl",
    ),
    ("a.json", b'"x"', "a.json: expected a list of objects | write [ {…}, {…} ], or one object a line (.jsonl)"),
    (
        "a.json",
        b'{"a": [], "b": []}',
        "a.json: expected a list of objects | write [ {…}, {…} ], or one object a line (.jsonl)",
    ),
    (
        "a.json",
        b'[{"a": 1}, true]',
        'a.json: row 2: expected an object with named fields, got true or false | a row looks like {"prompt": "…", …}',
    ),
    ("a.json", b'[\n{"a": "\xe9"}]', "a.json:2: not valid UTF-8 (byte 8 of the line) | save the file as UTF-8"),
    (
        "a.csv",
        b"a,b\n1,2\n3\n",
        "a.csv:3: has 1 cells where the header has 2 | a cell with a comma or a line break in it must stand in "
        '"quotes"',
    ),
    (
        "a.csv",
        b'a,b\n1,2\n3,"4\n5,6\n',
        "a.csv:3: not valid CSV: unexpected end of data | check the quotes and line ends of this row",
    ),
    ("a.csv", b"a, a\n1,2\n", "a.csv:1: two columns have the same name | rename one of them"),
    (
        "a.csv",
        b"prompt;completion\n1;2\n",
        "a.csv:1: has one column, named 'prompt;completion' | save the file with commas between the cells",
    ),
    (
        "a.parquet",
        b"PAR1 not really",
        "a.parquet: not a readable Parquet file | write it again; its end may be missing",
    ),
    ("a.parquet", b"", "a.parquet: not a readable Parquet file | write it again; its end may be missing"),
]


@pytest.mark.parametrize(("name", "content", "message"), MESSAGES)
def test_what_a_person_reads(here: Path, name: str, content: bytes, message: str) -> None:
    (here / name).write_bytes(content)
    assert fault(here / name) == message


def test_a_bad_byte_far_down_a_csv_is_found_where_it_stands(here: Path) -> None:
    lines = [b"prompt,completion", *[b"question,answer"] * 2000]
    lines[1500] = b"caf\xe9,answer"
    (here / "a.csv").write_bytes(b"\n".join(lines))
    assert fault(here / "a.csv") == "a.csv:1501: not valid UTF-8 (byte 4 of the line) | save the file as UTF-8"


def test_a_fault_is_found_on_line_1000(here: Path) -> None:
    lines = ['{"prompt": "a", "completion": "b"}'] * 1500
    lines[999] = '{"prompt": "a", "completion": b}'
    (here / "a.jsonl").write_text("\n".join(lines))
    assert fault(here / "a.jsonl").startswith("a.jsonl:1000: not valid JSON: expecting value (column 31)")


def test_text_in_a_parquet_file_that_is_not_utf8(here: Path) -> None:
    text = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": text}), here / "a.parquet")
    assert "not a readable Parquet file" in fault(here / "a.parquet")


def test_a_whole_emoji_in_two_escapes_is_fine(here: Path) -> None:
    (here / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read(here / "a.jsonl") == [{"a": "😀"}]


@given(
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet"]),
    content=st.binary(max_size=60)
    | st.lists(st.sampled_from(['{"a": "', '"}', "\n", "[", "]", ",", '"', "\r", "\0", "\\ud800", "é", "1e999"])).map(
        lambda parts: "".join(parts).encode()
    ),
)
def test_any_content_gives_rows_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        rows = read(path)
    except DataError as error:
        problems = error.problems
    else:
        assert rows
        assert all(isinstance(row, dict) for row in rows)
        json.dumps(rows, ensure_ascii=False).encode()
        return
    assert all(problem.place and problem.hint for problem in problems)


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    assert read(write_rows(path, rows)) == rows


@pytest.mark.parametrize("name", ["DatasetGenerationError", "DatasetNotFoundError", "DefunctDatasetError"])
def test_a_dataset_on_the_hub_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> None:
        raise getattr(datasets.exceptions, name)("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        list(read_rows(DataSource(path="owner/rows")))
    (problem,) = caught.value.problems
    assert problem.place == "owner/rows"
    assert problem.hint
    assert "second line" not in problem.message


def test_real_files(assets: Path) -> None:
    def count(name: str) -> int:
        return len(read(assets / "data" / name))

    assert count("gsm8k/test.jsonl") == 1319
    assert count("demo-formats/alpaca_en_demo.json") > 100
