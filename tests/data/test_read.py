"""Files → rows: every kind of file, packed or not, every row with its place; chunks, and what they note."""

from __future__ import annotations

import functools
import json
import pickle
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.schema import DataSource
from finetune.data.read import Chunk, Row, read_chunks, read_rows, shown_path, source_files
from finetune.errors import DataError

from .conftest import fault, packed, read, write_rows

ROWS = [{"prompt": "Wo?", "completion": "Zürich, 1 €"}, {"prompt": 'a "b", c', "completion": "d\ne"}]


def write_csv(path: Path) -> Path:
    path.write_text('prompt,completion\nWo?,"Zürich, 1 €"\n"a ""b"", c","d\ne"\n', "utf-8")
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def write_tsv(path: Path) -> Path:
    path.write_text('prompt\tcompletion\nWo?\tZürich, 1 €\n"a ""b"", c"\t"d\ne"\n', "utf-8")
    return path


def write_arrow(path: Path, rows: list[dict[str, Any]] = ROWS, *, stream: bool = True) -> Path:
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=3000)
    return path


def values_and_errors(path: Path, **settings: Any) -> list[Any]:
    """All that the chunks of a file give, errors as what is printed."""
    chunks = read_chunks(DataSource(path=str(path), **settings))
    found = [row for chunk in chunks for row in chunk.rows()]
    return [row.values if isinstance(row, Row) else str(row) for row in found]


def notes(path: Path) -> dict[str, tuple[int, str]]:
    """What the chunks of a file note, added up as whoever prepares data does."""
    found: dict[str, tuple[int, str]] = {}
    for chunk in read_chunks(DataSource(path=str(path))):
        assert list(chunk.rows())
        for kind, (count, place) in chunk.notes.items():
            before, first = found.get(kind, (0, place))
            found[kind] = (before + count, first)
    return found


def test_every_kind_of_file_gives_the_same_rows(here: Path) -> None:
    assert read(write_rows(here / "rows.jsonl", ROWS)) == ROWS
    (here / "rows.json").write_text(json.dumps(ROWS))
    assert read(here / "rows.json") == ROWS
    (here / "wrapped.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read(here / "wrapped.json") == ROWS
    assert read(write_csv(here / "rows.csv")) == ROWS
    assert read(write_tsv(here / "rows.tsv")) == ROWS
    assert read(write_parquet(here / "rows.PARQUET")) == ROWS
    assert read(write_arrow(here / "stream.arrow")) == ROWS
    assert read(write_arrow(here / "file.arrow", stream=False)) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ", ".zst.gz"])
def test_every_kind_of_file_can_be_packed(here: Path, suffix: str) -> None:
    (here / "rows.json").write_text(json.dumps(ROWS))
    kinds = [
        write_rows(here / "rows.jsonl", ROWS),
        here / "rows.json",
        write_csv(here / "rows.csv"),
        write_tsv(here / "rows.tsv"),
        write_parquet(here / "rows.parquet"),
        write_arrow(here / "rows.arrow"),
    ]
    for path in kinds:
        content = path.read_bytes()
        for part in suffix.lower().split(".")[1:]:
            content = packed(content, f".{part}")
        whole = path.with_name(path.name + suffix)
        whole.write_bytes(content)
        assert read(whole) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_archives_one_after_the_other_are_one_file(here: Path, suffix: str) -> None:
    (here / f"a.jsonl{suffix}").write_bytes(packed(b'{"a": 1}\n', suffix) + packed(b'\n{"a": 2}\n', suffix))
    found = list(read_rows(DataSource(path=str(here / f"a.jsonl{suffix}"))))
    assert [(row.values["a"], row.place) for row in found] == [(1, f"a.jsonl{suffix}:1"), (2, f"a.jsonl{suffix}:3")]


@pytest.mark.parametrize("nameless", [True, False])
def test_what_was_unpacked_is_removed(nameless: bool, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files can be without a name, what is unpacked never has one: not even SIGKILL can leave it behind."""
    if nameless and not Path("/proc/self/fd").is_dir():
        pytest.skip("the system has no /proc")
    (here / "room").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here / "room"))
    if not nameless:
        exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: "/fd/" not in str(path) and exists(path))
    content = write_arrow(here / "a.arrow", [{"a": number} for number in range(5000)]).read_bytes()
    (here / "a.arrow.gz").write_bytes(packed(content, ".gz"))
    rows = read_rows(DataSource(path=str(here / "a.arrow.gz")))
    assert next(rows).values == {"a": 0}
    assert bool(list((here / "room").iterdir())) is not nameless
    rows.close()  # type: ignore[attr-defined]
    assert not list((here / "room").iterdir())
    assert len(read(here / "a.arrow.gz")) == 5000
    assert not list((here / "room").iterdir())


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
    many = [{"a": number} for number in range(7000)]
    for found in (places(write_arrow(here / "rows.arrow", many)), places(write_rows(here / "many.jsonl", many))):
        assert len(found) == len(set(found)) == 7000
    assert places(here / "rows.arrow")[-1] == "rows.arrow: row 7000"
    assert places(here / "many.jsonl")[-1] == "many.jsonl:7000"


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


def test_the_rows_after_a_wrong_one_are_read(here: Path) -> None:
    (here / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": \n\n[2]\n{"a": "\xff"}\n{"a": "\\ud800"}\n{"b": 3}\n{"a": 4}')
    assert values_and_errors(here / "a.jsonl", columns={"c": "a"}) == [
        {"c": 1},
        "a.jsonl:2: not valid JSON: expecting value (column 6)",
        "a.jsonl:4: expected an object with named fields, got a list",
        "a.jsonl:5: not valid UTF-8 (byte 8 of the line)",
        "a.jsonl:6: half a character: \\ud800 without the other half of its pair",
        "a.jsonl:7: has no column 'a', which `columns` maps to 'c'",
        {"c": 4},
    ]
    (here / "a.csv").write_bytes(b'a,b\n1\n\n"2\n\xff",3\n4,5,6\n7,"8\n8"\n9,9\n9,9\n')
    assert values_and_errors(here / "a.csv") == [
        "a.csv:2: has 1 cells where the header has 2",
        "a.csv:5: not valid UTF-8 (byte 1 of the line)",
        "a.csv:6: has 3 cells where the header has 2",
        {"a": "7", "b": "8\n8"},
        *[{"a": "9", "b": "9"}] * 2,
    ]
    (here / "a.json").write_text('[{"a": 1}, 2, {"a": 3}]')
    assert values_and_errors(here / "a.json") == [
        {"a": 1},
        "a.json: row 2: expected an object with named fields, got a number",
        {"a": 3},
    ]
    text = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"a": text}), here / "a.parquet")
    assert values_and_errors(here / "a.parquet") == [
        {"a": "a"},
        "a.parquet: row 2: holds text that is not UTF-8",
        {"a": "c"},
    ]
    times = pa.table({"a": pa.array([0, 2**62], pa.timestamp("us")), "b": ["c", "d"]})
    pq.write_table(times, here / "b.parquet")
    assert [type(row) for row in values_and_errors(here / "b.parquet")] == [dict, str]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv.gz", "a.parquet", "a.arrow", "a.arrow.zst"])
def test_chunks_can_be_sent_to_another_process(here: Path, name: str) -> None:
    rows = [{"a": str(number), "b": "é" * 50} for number in range(2500)]
    if ".arrow" in name:
        content = write_arrow(here / "x.arrow", rows).read_bytes()
        (here / name).write_bytes(packed(content, ".zst") if name.endswith(".zst") else content)
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), here / name)
    elif name == "a.json":
        (here / name).write_text(json.dumps(rows))
    elif name == "a.jsonl":
        write_rows(here / name, rows)
    else:
        between = "," if name == "a.csv" else "\t"
        lines = [between.join(row.values()) for row in rows]
        content = "\r\n".join([between.join("ab"), *lines]).encode()
        (here / name).write_bytes(packed(content, ".gz") if name.endswith(".gz") else content)
    found = []
    total = 0
    for chunk in read_chunks(DataSource(path=str(here / name), columns={"c": "a"})):
        sent = pickle.dumps(chunk)
        total += len(sent)
        received: Chunk = pickle.loads(sent)
        found += [row.values for row in received.rows() if isinstance(row, Row)]
        assert [row.values for row in chunk.rows() if isinstance(row, Row)] == found[-len(list(chunk.rows())) :]
        assert received.notes == chunk.notes
    assert found == [{"b": row["b"], "c": row["a"]} for row in rows]
    # A slice of a table does not bring the whole table along.
    assert total < 1_000_000


def test_a_wrong_row_can_be_sent_back(here: Path) -> None:
    (here / "a.jsonl").write_text("{\n")
    ((error,),) = (list(chunk.rows()) for chunk in read_chunks(DataSource(path=str(here / "a.jsonl"))))
    assert isinstance(error, DataError)
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


def test_a_chunk_is_small(here: Path) -> None:
    write_rows(here / "short.jsonl", [{"a": 1}] * 2500)
    write_rows(here / "long.jsonl", [{"a": "b" * 1_500_000}] * 7)
    (here / "long.csv").write_text("a\n" + ("b" * 1_500_000 + "\n") * 7)
    sizes = {}
    for name in ("short.jsonl", "long.jsonl", "long.csv"):
        chunks = read_chunks(DataSource(path=str(here / name)))
        sizes[name] = [len(list(chunk.rows())) for chunk in chunks]
    assert sizes == {"short.jsonl": [500, 500, 500, 500, 500], "long.jsonl": [3, 3, 1], "long.csv": [3, 3, 1]}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_memory_does_not_grow_with_the_file(here: Path, suffix: str) -> None:
    content = (json.dumps({"a": "b" * 100_000}) + "\n").encode() * 400
    path = here / f"a.jsonl{suffix}"
    path.write_bytes(packed(content, suffix) if suffix else content)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(DataSource(path=str(path)))) == 400
        assert tracemalloc.get_traced_memory()[1] < 16_000_000 < len(content)
    finally:
        tracemalloc.stop()


def test_rows_are_read_as_they_are_asked_for(here: Path) -> None:
    (here / "a.jsonl").write_text('{"a": 1}\n' * 5000 + "{\n")
    rows = read_rows(DataSource(path=str(here / "a.jsonl")))
    assert [next(rows).values for _ in range(5000)] == [{"a": 1}] * 5000
    with pytest.raises(DataError, match=r"a\.jsonl:5001: not valid JSON"):
        next(rows)


def test_what_is_worth_a_word(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.read.text.HUGE_BYTES", 1000)
    bom = b"\xef\xbb\xbf"
    (here / "a.jsonl").write_bytes(bom + b'{"a": 1}\n' + b'{"a": 1}\r\n' * 3000 + b'{"a": "%s"}\n' % (b"b" * 1000))
    assert notes(here / "a.jsonl") == {
        "byte order mark": (1, "a.jsonl:1"),
        "CRLF line ends": (3000, "a.jsonl:2"),
        "row over 10 MB": (1, "a.jsonl:3002"),
    }
    (here / "a.csv").write_bytes(bom + b"a\r\n" + b"1\r\n" * 2500)
    assert notes(here / "a.csv") == {"byte order mark": (1, "a.csv:1"), "CRLF line ends": (2501, "a.csv:1")}
    (here / "a.json").write_bytes(bom + b'[\n{"a": 1},\r\n{"a": 2}]\r\n')
    assert notes(here / "a.json") == {"byte order mark": (1, "a.json:1"), "CRLF line ends": (2, "a.json:2")}
    assert notes(write_rows(here / "b.jsonl", ROWS)) == {}
    assert notes(write_parquet(here / "b.parquet")) == {}


def test_a_folder_is_all_its_files(here: Path) -> None:
    (here / "rows" / "deeper").mkdir(parents=True)
    (here / "rows" / "README.md").write_text("Rows.")
    write_rows(here / "rows" / "b.jsonl", [{"a": 1}])
    (here / "rows" / "deeper" / "c.csv").write_text("a\n2\n")
    (here / "rows" / "a.jsonl").touch()
    found = list(read_rows(DataSource(path=str(here / "rows"))))
    assert [(row.values["a"], row.place) for row in found] == [(1, "rows/b.jsonl:1"), ("2", "rows/deeper/c.csv:2")]
    source = DataSource(path=str(here / "rows" / "**" / "*.[cj]s*"))
    assert [shown_path(path) for path in source_files(source)] == [
        "rows/a.jsonl",
        "rows/b.jsonl",
        "rows/deeper/c.csv",
    ]
    assert list(read_rows(source)) == found


def test_a_folder_without_rows(here: Path) -> None:
    (here / "rows").mkdir()
    endings = "known endings: .jsonl, .json, .csv, .tsv, .parquet, .arrow (also packed: .gz, .zst)"
    assert fault(here / "rows") == f"rows: no data file is in this folder | {endings}"
    assert fault(here / "row[1-9]") == (
        "row[1-9]: no file matches this pattern | `*` stands for a part of a name, `**` for any folders; hidden files "
        "are left out"
    )
    (here / "rows" / "a.jsonl").touch()
    assert fault(here / "rows") == "rows: there are no rows in it | a dataset needs at least two rows"


def test_what_datasets_saves_is_read(here: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(here / "saved", num_shards=2)
    assert {path.name for path in (here / "saved").iterdir()} > {"dataset_info.json", "state.json"}
    assert read(here / "saved") == ROWS


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


def test_a_whole_emoji_in_two_escapes_is_fine(here: Path) -> None:
    (here / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read(here / "a.jsonl") == [{"a": "😀"}]


@given(
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.csv.gz", "a.json.zst"]),
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


@pytest.mark.parametrize("name", ["a.arrow", "b.arrow", "a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz"])
@given(where=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage_gives_rows_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, where: int, byte: int, cut: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = _whole(folder, name)
    where %= len(content)
    path = folder / f"damaged-{name}"
    path.write_bytes(content[:where] if cut else content[:where] + bytes([byte]) + content[where + 1 :])
    try:
        read(path)
    except DataError as error:
        problems = error.problems
    else:
        return
    assert all(problem.place and problem.hint for problem in problems)


@functools.cache
def _whole(folder: Path, name: str) -> bytes:
    if name.endswith(".arrow"):
        return write_arrow(folder / f"whole-{name}", stream=name == "a.arrow").read_bytes()
    if name == "a.parquet":
        return write_parquet(folder / "whole.parquet").read_bytes()
    text = write_csv(folder / "whole.csv") if ".csv" in name else write_rows(folder / "whole.jsonl", ROWS)
    return packed(text.read_bytes(), Path(name).suffix)


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    assert read(write_rows(path, rows)) == rows


def test_real_files(assets: Path) -> None:
    def count(name: str) -> int:
        return len(read(assets / "data" / name))

    assert count("gsm8k/test.jsonl") == 1319
    assert count("demo-formats/alpaca_en_demo.json") > 100
