"""Every way in which a file of data can be wrong: how it comes about, and the exact error and hint."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.read.packed import _write
from finetune.errors import DataError

from .conftest import fault, packed

LINES = b"".join(b'{"a": "%d"}\n' % number for number in range(1000))
TABLE = pa.table({"a": [str(number) for number in range(1000)]})
NOT_UTF8 = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe"))
OUTSIDE = pa.StringArray.from_buffers(
    3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\xff\xff\xff\x7f\2\0\0\0"), pa.py_buffer(b"ab" * 32)
)
"""Its second value would be two GB long, in a buffer of 64 bytes."""


def arrow(table: Any, kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as out:
        out.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet(table: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def damaged(content: bytes) -> bytes:
    """With a few bytes near the end changed, where gzip keeps its checksum."""
    return content[:-6] + bytes(byte ^ 0xFF for byte in content[-6:])


EMPTY = "there are no rows in it | a dataset needs at least two rows"
EACH_LINE = "each line must be one JSON object"
LIST = "a file that is one JSON list must be named .json; in .jsonl each line is an object"
ONE_LIST = "a .json file is one list of objects; with one object a line it must be named .jsonl"
A_LIST = "expected a list of objects | write [ {…}, {…} ], or one object a line (.jsonl)"
A_ROW = 'a row looks like {"prompt": "…", …}'
UTF8 = "save the file as UTF-8"
HALF = "without the other half of its pair | the text was cut in the middle of a character: mend the row, or remove it"
COMMA = 'a cell with a comma or a line break in it must stand in "quotes"'
QUOTES = "check the quotes and line ends of this row"
PARQUET = "not a readable Parquet file | write it again; its end may be missing"
ARROW = "not a readable Arrow file | write it again; its end may be missing"
CUT = "the archive breaks off before its end | copy or download it again; what it held may be incomplete"
DAMAGED = "the archive is damaged | copy or download it again; what it held may be incomplete"
AGAIN = "write the file again from its source; a time may be out of range, or the file damaged"


def no_archive(suffix: str) -> str:
    return (
        f"not a {suffix} archive, which its name says it is | remove {suffix} from its name if it is not packed; "
        "otherwise copy or download it again"
    )


CASES: dict[str, tuple[str, bytes, str]] = {
    # Nothing in it.
    "an empty jsonl": ("a.jsonl", b"", EMPTY),
    "blank lines only": ("a.jsonl", b"\n \n\r\n", EMPTY),
    "a byte order mark only": ("a.jsonl", b"\xef\xbb\xbf", EMPTY),
    "an empty list": ("a.json", b"[]", EMPTY),
    "an empty csv": ("a.csv", b"", EMPTY),
    "a header only": ("a.csv", b"prompt,completion\n", EMPTY),
    "a tsv header only": ("a.tsv", b"prompt\tcompletion\n", EMPTY),
    "an empty table": ("a.parquet", parquet(TABLE.slice(0, 0)), EMPTY),
    "an empty stream": ("a.arrow", arrow(TABLE.slice(0, 0), "stream"), EMPTY),
    "an archive of nothing": ("a.jsonl.gz", packed(b"", ".gz"), EMPTY),
    # JSON, one object a line.
    "a word without quotes": (
        "a.jsonl",
        b'{"a": 1}\n{"a": b}\n',
        f"a.jsonl:2: not valid JSON: expecting value (column 7) | {EACH_LINE}",
    ),
    "a line that breaks off": (
        "a.jsonl",
        b'{"a": 1}\n  {"a": 1\n',
        f"a.jsonl:2: not valid JSON: expecting ',' delimiter (column 10) | {EACH_LINE}",
    ),
    "the last line cut by a full disk": (
        "a.jsonl",
        LINES[:-6],
        f"a.jsonl:1000: not valid JSON: unterminated string starting at (column 7) | {EACH_LINE}",
    ),
    "two objects on one line": (
        "a.jsonl",
        b'{"a": 1}{"a": 2}\n',
        f"a.jsonl:1: not valid JSON: extra data (column 9) | {EACH_LINE}",
    ),
    "line ends of an old Mac": (
        "a.jsonl",
        b'{"a": 1}\r{"a": 2}\r',
        f"a.jsonl:1: not valid JSON: extra data (column 10) | {EACH_LINE}",
    ),
    "an object over several lines": (
        "a.jsonl",
        b'{\n  "a": 1\n}\n',
        "a.jsonl:1: not valid JSON: expecting property name enclosed in double quotes (column 2) | " + EACH_LINE,
    ),
    "single quotes": (
        "a.jsonl",
        b"{'a': 1}\n",
        "a.jsonl:1: not valid JSON: expecting property name enclosed in double quotes (column 2) | " + EACH_LINE,
    ),
    "a raw tab in a string": (
        "a.jsonl",
        b'{"a": "b\tc"}\n',
        f"a.jsonl:1: not valid JSON: invalid control character at (column 9) | {EACH_LINE}",
    ),
    "zeros where a crash left a hole": (
        "a.jsonl",
        b'{"a": 1}\n' + b"\0" * 100,
        f"a.jsonl:2: not valid JSON: expecting value (column 1) | {EACH_LINE}",
    ),
    "a row of text": (
        "a.jsonl",
        b'{"a": 1}\n"text"\n',
        f"a.jsonl:2: expected an object with named fields, got text | {A_ROW}",
    ),
    "a row that is null": (
        "a.jsonl",
        b"null\n",
        f"a.jsonl:1: expected an object with named fields, got null | {A_ROW}",
    ),
    "a row that is a number": (
        "a.jsonl",
        b"1e3",
        f"a.jsonl:1: expected an object with named fields, got a number | {A_ROW}",
    ),
    "a row that is a list": (
        "a.jsonl",
        b'{"a": 1}\n[1]\n',
        f"a.jsonl:2: expected an object with named fields, got a list | {A_ROW}",
    ),
    "a list on line 1": ("a.jsonl", b'[{"a": 1}]', f"a.jsonl:1: a list where one object is expected | {LIST}"),
    "a list over several lines": (
        "a.jsonl",
        b'[\n{"a": 1}]',
        f"a.jsonl:1: not valid JSON: expecting value (column 2) | {LIST}",
    ),
    "a letter in Latin-1": (
        "a.jsonl",
        b'{"a": 1}\n{"a": "\xff"}',
        f"a.jsonl:2: not valid UTF-8 (byte 8 of the line) | {UTF8}",
    ),
    "UTF-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), f"a.jsonl:1: not valid UTF-8 (byte 1 of the line) | {UTF8}"),
    "a second byte order mark": (
        "a.jsonl",
        b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n',
        f"a.jsonl:2: not valid JSON: unexpected UTF-8 BOM (decode using utf-8-sig) (column 1) | {EACH_LINE}",
    ),
    "a hundred thousand brackets": (
        "a.jsonl",
        b'{"a": ' + b"[" * 100_000,
        f"a.jsonl:1: not valid JSON: nested too deep | {EACH_LINE}",
    ),
    "a number of 5,000 digits": (
        "a.jsonl",
        b'{"a": ' + b"1" * 5000 + b"}",
        f"a.jsonl:1: not valid JSON: a number of thousands of digits | {EACH_LINE}",
    ),
    "half an emoji": (
        "a.jsonl",
        b'{"a": 1}\n{"a": "cut \\ud83d"}',
        f"a.jsonl:2: half a character: \\ud83d {HALF}",
    ),
    # JSON, one list.
    "half an emoji deep in a list": (
        "a.json",
        b'[{"a": 1}, {"a": ["\\udca9"]}]',
        f"a.json: row 2: half a character: \\udca9 {HALF}",
    ),
    "one object a line in .json": (
        "a.json",
        b'{"a": 1}\n{"a": 2}\n',
        f"a.json:2: not valid JSON: extra data (column 1) | {ONE_LIST}",
    ),
    "an empty .json": ("a.json", b"", f"a.json:1: not valid JSON: expecting value (column 1) | {ONE_LIST}"),
    "a trailing comma": (
        "a.json",
        b'[\n{"a": 1},\n]',
        f"a.json:3: not valid JSON: expecting value (column 1) | {ONE_LIST}",
    ),
    "a list that breaks off": (
        "a.json",
        b'[{"a": 1}, ',
        f"a.json:1: not valid JSON: expecting value (column 12) | {ONE_LIST}",
    ),
    "brackets without end": ("a.json", b"[" * 100_000, f"a.json: not valid JSON: nested too deep | {ONE_LIST}"),
    "text instead of a list": ("a.json", b'"x"', f"a.json: {A_LIST}"),
    "two lists": ("a.json", b'{"a": [], "b": []}', f"a.json: {A_LIST}"),
    "a list with true in it": (
        "a.json",
        b'[{"a": 1}, true]',
        f"a.json: row 2: expected an object with named fields, got true or false | {A_ROW}",
    ),
    "Latin-1 in a list": ("a.json", b'[\n{"a": "\xe9"}]', f"a.json:2: not valid UTF-8 (byte 8 of the line) | {UTF8}"),
    # Cells under a header.
    "a missing cell": (
        "a.csv",
        b"a,b\n1,2\n3\n",
        f"a.csv:3: has 1 cells where the header has 2 | {COMMA}",
    ),
    "a comma without quotes": (
        "a.csv",
        b"a,b\nYes, of course,2\n",
        f"a.csv:2: has 3 cells where the header has 2 | {COMMA}",
    ),
    "a quote that is never closed": (
        "a.csv",
        b'a,b\n1,2\n3,"4\n5,6\n',
        f"a.csv:3: not valid CSV: unexpected end of data | {QUOTES}",
    ),
    "text after a quote": ("a.csv", b'a,b\n"1"x,2\n', f"a.csv:2: not valid CSV: ',' expected after '\"' | {QUOTES}"),
    "a csv of an old Mac": (
        "a.csv",
        b"a,b\r1,2\r",
        f"a.csv:1: not valid CSV: new-line character seen in unquoted field | {QUOTES}",
    ),
    "two columns of one name": (
        "a.csv",
        b"a, a\n1,2\n",
        "a.csv:1: two columns have the same name | rename one of them",
    ),
    "semicolons": (
        "a.csv",
        b"prompt;completion\n1;2\n",
        "a.csv:1: has one column, named 'prompt;completion' | save the file with commas between the cells",
    ),
    "commas in a tsv": (
        "a.tsv",
        b"prompt,completion\n1,2\n",
        "a.tsv:1: has one column, named 'prompt,completion' | save the file with tabs between the cells",
    ),
    "a missing cell in a tsv": (
        "a.tsv",
        b"a\tb\n1\t2\n3\n",
        'a.tsv:3: has 1 cells where the header has 2 | a cell with a tab or a line break in it must stand in "quotes"',
    ),
    "a quote in a tsv": ("a.tsv", b'a\tb\n"1\t2\n', f"a.tsv:2: not valid TSV: unexpected end of data | {QUOTES}"),
    "Latin-1 in a header": ("a.csv", b"pr\xe9nom,b\n1,2\n", f"a.csv:1: not valid UTF-8 (byte 3 of the line) | {UTF8}"),
    "Latin-1 in a cell over two lines": (
        "a.csv",
        b'a,b\n"1\n\xe9",2\n',
        f"a.csv:3: not valid UTF-8 (byte 1 of the line) | {UTF8}",
    ),
    # Tables stored by column.
    "text named .parquet": ("a.parquet", b"PAR1 not really", f"a.parquet: {PARQUET}"),
    "nothing named .parquet": ("a.parquet", b"", f"a.parquet: {PARQUET}"),
    "half a .parquet": ("a.parquet", parquet(TABLE)[:2000], f"a.parquet: {PARQUET}"),
    "a .parquet named .arrow": ("a.arrow", parquet(TABLE), f"a.arrow: {ARROW}"),
    "nothing named .arrow": ("a.arrow", b"", f"a.arrow: {ARROW}"),
    "half an .arrow file": ("a.arrow", arrow(TABLE, "file")[:2000], f"a.arrow: {ARROW}"),
    "half an .arrow stream": ("a.arrow", arrow(TABLE, "stream")[:2000], f"a.arrow: {ARROW}"),
    "text in a .parquet that is none": (
        "a.parquet",
        parquet(pa.table({"a": NOT_UTF8})),
        f"a.parquet: row 2: holds text that is not UTF-8 | {AGAIN}",
    ),
    "text in an .arrow that is none": (
        "a.arrow",
        arrow(pa.table({"a": NOT_UTF8}), "stream"),
        f"a.arrow: row 2: holds text that is not UTF-8 | {AGAIN}",
    ),
    "an .arrow that points outside of itself": (
        "a.arrow",
        arrow(pa.table({"a": OUTSIDE}), "file"),
        f"a.arrow: row 2: holds a value that cannot be read | {AGAIN}",
    ),
    "a time that Python has no value for": (
        "a.parquet",
        parquet(pa.table({"a": pa.array([0, 2**62], pa.timestamp("us"))})),
        f"a.parquet: row 2: holds a value that cannot be read | {AGAIN}",
    ),
    # Archives.
    "text named .gz": ("a.jsonl.gz", LINES, f"a.jsonl.gz: {no_archive('.gz')}"),
    "text named .zst": ("a.jsonl.zst", LINES, f"a.jsonl.zst: {no_archive('.zst')}"),
    "nothing named .gz": ("a.csv.gz", b"", f"a.csv.gz: {no_archive('.gz')}"),
    "a .gz named .zst": ("a.jsonl.zst", packed(LINES, ".gz"), f"a.jsonl.zst: {no_archive('.zst')}"),
    "a .gz that breaks off": ("a.jsonl.gz", packed(LINES, ".gz")[:-20], f"a.jsonl.gz: {CUT}"),
    "a .gz without its checksum": ("a.jsonl.gz", packed(LINES, ".gz")[:-8], f"a.jsonl.gz: {CUT}"),
    "a .zst that breaks off": ("a.jsonl.zst", packed(LINES, ".zst")[:-20], f"a.jsonl.zst: {CUT}"),
    "a .csv.gz that breaks off": ("a.csv.gz", packed(b"a,b\n1,2\n", ".gz")[:-3], f"a.csv.gz: {CUT}"),
    "a .json.zst that breaks off": ("a.json.zst", packed(b'[{"a": 1}]', ".zst")[:-3], f"a.json.zst: {CUT}"),
    "a .parquet.gz that breaks off": ("a.parquet.gz", packed(parquet(TABLE), ".gz")[:-3], f"a.parquet.gz: {CUT}"),
    "a .gz with a wrong checksum": ("a.jsonl.gz", damaged(packed(LINES, ".gz")), f"a.jsonl.gz: {DAMAGED}"),
    "a .gz with something after it": ("a.jsonl.gz", packed(LINES, ".gz") + b"more", f"a.jsonl.gz: {DAMAGED}"),
    "a .zst with something after it": ("a.jsonl.zst", packed(LINES, ".zst") + b"some more", f"a.jsonl.zst: {DAMAGED}"),
    "a bad line in an archive": (
        "a.jsonl.gz",
        packed(LINES + b"{]\n", ".gz"),
        "a.jsonl.gz:1001: not valid JSON: expecting property name enclosed in double quotes (column 2) | " + EACH_LINE,
    ),
    "a bad table in an archive": ("a.parquet.zst", packed(b"PAR1 not really", ".zst"), f"a.parquet.zst: {PARQUET}"),
    # Files that are not what `ft` reads.
    "an unknown kind": (
        "a.txt",
        b"Hello\n",
        "a.txt: is of no known kind | known endings: .jsonl, .json, .csv, .tsv, .parquet, .arrow (also packed: .gz, "
        ".zst)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_person_reads(here: Path, case: str) -> None:
    name, content, message = CASES[case]
    (here / name).write_bytes(content)
    assert fault(here / name) == (f"{name}: {message}" if message == EMPTY else message)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv.gz", "a.parquet", "a.arrow", "a.arrow.zst"])
def test_a_file_that_is_not_there(here: Path, name: str) -> None:
    assert fault(here / name) == f"{name}: cannot be read: No such file or directory | check the file's permissions"


LONG = (
    "goes on for more than 5,000 bytes without an end | nothing so long can be a row: check the line ends and the "
    "quotes"
)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "' + b"b" * 6000 + b'"}\n', "a.jsonl:2"),
        ("a.csv", b"a,b\n1,2\n3," + b"4" * 6000 + b"\n", "a.csv:3"),
        # No cell of it is long, and no line, but the record has no end.
        ("a.csv", b'a,b\n1,2\n3,"4' + b'\n","' * 6000, "a.csv:3"),
        # 5 MB that were packed into 5 kB.
        ("a.jsonl.gz", gzip.compress(b'{"a": "' + b"b" * 5_000_000), "a.jsonl.gz:1"),
    ],
)
def test_a_line_without_end(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, place: str) -> None:
    monkeypatch.setattr("finetune.data.read.packed.MAX_LINE", 5000)
    (here / name).write_bytes(content)
    assert fault(here / name) == f"{place}: {LONG}"


def test_a_cell_without_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.read.cells.MAX_CELL", 200_000)
    (here / "a.csv").write_bytes(b"a,b\n1," + b"2" * 200_000 + b"\n3," + b"4" * 200_001 + b"\n")
    assert fault(here / "a.csv") == f"a.csv:3: not valid CSV: field larger than field limit (200000) | {QUOTES}"


def test_a_json_file_that_cannot_be_held(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.read.text.MAX_JSON", 100)
    (here / "a.json").write_bytes(b"[" + b'{"a": 1},' * 20)
    assert fault(here / "a.json") == (
        "a.json: has more than 100 bytes, and a .json file has to be held whole | write one object a line and name it "
        ".jsonl"
    )


def test_no_room_to_unpack(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.parquet.gz").write_bytes(packed(parquet(TABLE), ".gz"))
    monkeypatch.setattr("finetune.data.read.packed._write", _full)
    assert fault(here / "a.parquet.gz").startswith("a.parquet.gz: cannot be read: No space left on device")


def test_no_room_at_the_end_of_unpacking() -> None:
    """What is small enough is first written where the file is flushed."""

    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot be unpacked into .*No space left on device"):
        _write(io.BufferedReader(io.BytesIO(b"a")), Full(), "a.parquet.gz")


def test_no_folder_to_unpack_into(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.parquet.gz").write_bytes(packed(parquet(TABLE), ".gz"))
    monkeypatch.setattr("tempfile.TemporaryFile", _full)
    assert fault(here / "a.parquet.gz").startswith("a.parquet.gz: cannot be unpacked: No space left on device")


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")
