"""Data that cannot be read or trained on, through the real command. What readers say of bytes: tests/data/."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from .conftest import Refused
from .host import Host
from .made import LFS_POINTER, POINTER

ROW = b'{"question": "Why?", "answer": "So."}\n'
MEND = "mend the row, or remove it"
EACH_LINE = "each line must be one JSON object"
TAKE_TURNS = "after an optional system message, user and assistant take turns"
CUT = "the archive breaks off before its end | copy or download it again; what it held may be incomplete"
ENDINGS = "known endings: .jsonl, .json, .csv, .tsv, .parquet, .arrow (also packed: .gz, .zst)"
RENAME = "rename them with `columns:`, for instance columns: {prompt: question, completion: answer}"


def turns(*said: tuple[str, object]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}).encode()


FILES: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("a.jsonl", b"", "there are no rows in it | a dataset needs at least two rows"),
    "an empty csv": ("a.csv", b"", "there are no rows in it | a dataset needs at least two rows"),
    "a malformed line": (
        "a.jsonl",
        ROW + b'{"question": "Why?", "answer": So.}\n',
        f"2: not valid JSON: expecting value (column 32) | {EACH_LINE}",
    ),
    "a page of a web site": (
        "a.jsonl",
        b"<!DOCTYPE html>\n<html>404</html>",
        f"1: not valid JSON: expecting value (column 1) | {EACH_LINE}",
    ),
    "a pointer in place of lines": ("a.jsonl", LFS_POINTER, POINTER),
    "a pointer in place of a list": ("a.json", LFS_POINTER, POINTER),
    "a pointer in place of cells": ("a.csv", LFS_POINTER, POINTER),
    "a pointer in place of a table": ("a.parquet", LFS_POINTER, POINTER),
    "a pointer in place of an archive": ("a.jsonl.gz", LFS_POINTER, POINTER),
    "UTF-16": (
        "a.jsonl",
        ROW.decode().encode("utf-16"),
        "1: not valid UTF-8 (byte 1 of the line) | save the file as UTF-8",
    ),
    "Latin-1 in cells": (
        "a.csv",
        b"question,answer\nr\xe9p,b\n",
        "2: not valid UTF-8 (byte 2 of the line) | save the file as UTF-8",
    ),
    "null bytes": ("a.jsonl", bytes(4096), f"1: not valid JSON: expecting value (column 1) | {EACH_LINE}"),
    "ten million brackets": (
        "a.json",
        b"[" * 10_000_000,
        "not valid JSON: nested too deep | a .json file is one list of objects; with one object a line it must be "
        "named .jsonl",
    ),
    "an archive that breaks off": ("a.jsonl.gz", gzip.compress(ROW * 20)[:-9], CUT),
    "a .zst of nothing": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", CUT),
    "half a table": (
        "a.parquet",
        b"PAR1" + bytes(100),
        "not a readable Parquet file | write it again; its end may be missing",
    ),
    "half a stream": (
        "a.arrow",
        b"ARROW1" + bytes(100),
        "not a readable Arrow file | write it again; its end may be missing",
    ),
    "a cell too many": (
        "a.tsv",
        b"question\tanswer\na\tb\tc\n",
        '2: has 3 cells where the header has 2 | a cell with a tab or a line break in it must stand in "quotes"',
    ),
    "a row that is a list": (
        "a.jsonl",
        ROW + b"[1]\n",
        '2: expected an object with named fields, got a list | a row looks like {"prompt": "…", …}',
    ),
    "columns of no known format": (
        "a.jsonl",
        b'{"ask": "Why?", "reply": "So."}\n',
        f"1: of no known format: its columns are ask, reply | {RENAME}",
    ),
    "rows of two formats": (
        "a.jsonl",
        ROW + b'{"text": "x"}\n',
        "2: looks like text, but the rows before it like question-answer | put rows of different formats into "
        "different files",
    ),
    "a field that is missing": (
        "a.jsonl",
        ROW + b'{"question": "Why?", "anwser": "So."}\n',
        "2: has no field 'answer' | its fields are: question, anwser",
    ),
    "a field that is empty": (
        "a.jsonl",
        b'{"question": " ", "answer": "So."}\n',
        f"1: question is empty where text is expected | {MEND}",
    ),
    "a field that is a number": (
        "a.jsonl",
        b'{"question": NaN, "answer": "So."}\n',
        f"1: question is a number where text is expected | {MEND}",
    ),
    "messages that are text": (
        "a.jsonl",
        b'{"messages": "hello"}',
        f"1: messages is 'hello' where a list of turns is expected | {MEND}",
    ),
    "an answer without a question": (
        "a.jsonl",
        turns(("assistant", "x")),
        f"1: turn 1 is by assistant where user should speak | {TAKE_TURNS}",
    ),
    "two questions": (
        "a.jsonl",
        turns(("user", "x"), ("user", "y"), ("assistant", "z")),
        f"1: turn 2 is by user where assistant should speak | {TAKE_TURNS}",
    ),
    "no answer": (
        "a.jsonl",
        turns(("user", "x")),
        "1: the last turn is not the assistant's | there must be an answer to learn from",
    ),
    "an unknown role": (
        "a.jsonl",
        turns(("wizard", "x")),
        "1: messages[1]: role is 'wizard' | known roles: system, developer, user, human, assistant, gpt, chatgpt, bot, "
        "model, tool, function, observation, function_response, function_call, tool_call",
    ),
    "a turn that is a number": (
        "a.jsonl",
        turns(("user", 3)),
        "1: messages[1]: content is a number | every turn needs text; remove the row if it has none",
    ),
    "a picture": (
        "a.jsonl",
        turns(("user", [{"type": "image_url"}])),
        "1: messages[1]: content[1]: a part of type 'image_url' | only text can be trained on; remove the row, or "
        "describe the part in words",
    ),
    "arguments of a call that are no JSON": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": '
        b'"f", "arguments": "{oops"}}]}]}',
        "1: messages[2]: tool_calls[1]: arguments: not valid JSON: expecting property name enclosed in double quotes "
        f"(character 2) | {MEND}",
    ),
}


@pytest.mark.fault("data that is damaged or malformed", stage="input", outcome="refused with file and line")
@pytest.mark.parametrize("case", FILES)
def test_data_that_is_wrong(folder: Path, refused: Refused, case: str) -> None:
    name, content, expected = FILES[case]
    (folder / name).write_bytes(content)
    separator = ":" if expected[0].isdigit() else ": "
    assert refused("check", "c.yaml", "-s", f"data.0.path={name}") == f"{name}{separator}{expected}"


def test_a_far_line_that_is_wrong(folder: Path, refused: Refused) -> None:
    (folder / "rows.jsonl").write_bytes(ROW * 999 + b'{"question": "Why?", "answer": So.}\n' + ROW * 200)
    assert refused("train", "c.yaml") == f"rows.jsonl:1000: not valid JSON: expecting value (column 32) | {EACH_LINE}"
    assert not (folder / "runs" / "c").exists()


def test_ten_kinds_of_wrong_rows_are_listed(folder: Path, refused: Refused) -> None:
    rows = [turns((f"r{number}", "x")) + b"\n" for number in range(14)]
    good = [turns(("user", f"x{number}"), ("assistant", "y")) + b"\n" for number in range(100)]
    (folder / "rows.jsonl").write_bytes(b"".join(good + rows))
    said = refused("train", "c.yaml").splitlines()
    assert len(said) == 11
    assert said[0].startswith("rows.jsonl:101: messages[1]: role is 'r0' | known roles: ")
    assert said[10] == (
        "14 rows have something wrong; 4 further kinds are not shown | mend them, or allow so many to be left out with "
        "`max_dropped:` in data"
    )


@pytest.mark.fault("a row of 20 MB, a line of 2 GB", stage="input", outcome="refused in bounded time and memory")
def test_a_row_too_long_to_take_in(folder: Path, host: Host) -> None:
    with open(folder / "rows.jsonl", "ab") as file:
        file.write(b'{"question": "Why?", "answer": "' + b"so " * 7_000_000 + b'"}\n')
    outcome = host.run(["train", "c.yaml"], folder)
    assert outcome.code == 2
    assert outcome.stderr == (
        "error: rows.jsonl:21: is a text of 21,000,004 characters, and 20,000,000 are the most that can be taken in at "
        "once\nhint: cut it into several rows; a line end or a quote may be missing\n"
    )
    assert outcome.peak < 1e9


def test_a_line_without_end(folder: Path, host: Host) -> None:
    """A sparse file: 2 GB of null bytes, which take no room."""
    with open(folder / "rows.jsonl", "wb") as file:
        file.truncate(2_000_000_000)
    outcome = host.run(["check", "c.yaml"], folder)
    assert outcome.code == 2
    assert outcome.stderr == (
        "error: rows.jsonl:1: goes on for more than 100,000,000 bytes without an end\nhint: nothing so long can be a "
        "row: check the line ends and the quotes\n"
    )
    assert outcome.peak < 5e8


# -- what is named as data ----------------------------------------------------------------------------------------


def test_data_that_is_not_there(folder: Path, refused: Refused) -> None:
    (folder / "rows.jsonl").rename(folder / "rows2.jsonl")
    assert refused("train", "c.yaml") == "c.yaml:3: data.0.path: no such file: rows.jsonl | did you mean rows2.jsonl?"


@pytest.mark.fault("a pipe or a device in place of a file", stage="input", outcome="refused, never waited for")
@pytest.mark.parametrize("command", ["check", "train"])
def test_data_that_is_a_pipe(folder: Path, refused: Refused, command: str) -> None:
    os.mkfifo(folder / "a.jsonl")
    assert refused(command, "c.yaml", "-s", "data.0.path=a.jsonl") == (
        "-s data.0.path: data.0.path: a.jsonl is a pipe, not a file | name a file, which can be read more than once"
    )


@pytest.mark.parametrize(
    ("target", "what"), [("/dev/zero", "a device"), ("nowhere.jsonl", "a link that leads nowhere")]
)
def test_data_that_is_a_link(folder: Path, refused: Refused, target: str, what: str) -> None:
    (folder / "a.jsonl").symlink_to(target)
    assert refused("check", "c.yaml", "-s", "data.0.path=a.jsonl") == (
        f"-s data.0.path: data.0.path: a.jsonl is {what}, not a file | name a file, which can be read more than once"
    )


def test_a_link_to_itself(folder: Path, refused: Refused) -> None:
    (folder / "a.jsonl").symlink_to("a.jsonl")
    assert "a.jsonl is a link that leads nowhere" in refused("check", "c.yaml", "-s", "data.0.path=a.jsonl")


def test_a_folder_that_holds_a_pipe_only(folder: Path, refused: Refused) -> None:
    (folder / "more").mkdir()
    os.mkfifo(folder / "more" / "a.jsonl")
    assert refused("check", "c.yaml", "-s", "data.0.path=./more") == (
        f"-s data.0.path: data.0.path: more: no data file is in this folder | {ENDINGS}"
    )


def test_a_pattern_without_a_match(folder: Path, refused: Refused) -> None:
    assert refused("check", "c.yaml", "-s", "data.0.path=./*.zip.jsonl") == (
        "-s data.0.path: data.0.path: *.zip.jsonl: no file matches this pattern | `*` stands for a part of a name, "
        "`**` for any folders; hidden files are left out"
    )


def test_a_file_of_no_known_kind(folder: Path, refused: Refused) -> None:
    (folder / "a.sqlite").write_bytes(b"SQLite format 3\0")
    assert refused("check", "c.yaml", "-s", "data.0.path=./a.sqlite") == (
        f"-s data.0.path: data.0.path: a.sqlite is of no known kind | {ENDINGS}"
    )


def test_a_bad_row_in_one_of_several_files(folder: Path, refused: Refused) -> None:
    (folder / "more.csv").write_text("question,answer\nWhy?\n")
    assert refused("check", "c.yaml", "-s", "data.0.path=./*.[cj]s[vo]*") == (
        "more.csv:2: has 1 cells where the header has 2 | a cell with a comma or a line break in it must stand in "
        '"quotes"'
    )


def test_a_format_that_is_another(folder: Path, refused: Refused) -> None:
    assert refused("check", "c.yaml", "-s", "data.0.format=alpaca") == (
        "rows.jsonl:1: has no field 'instruction' | its fields are: question, answer"
    )


def test_a_column_that_is_not_there(folder: Path, refused: Refused) -> None:
    assert refused("check", "c.yaml", "-s", "data.0.columns={prompt: ask}") == (
        "rows.jsonl:1: has no column 'ask', which `columns` maps to 'prompt' | its columns are: question, answer"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_that_may_not_be_read(folder: Path, refused: Refused) -> None:
    (folder / "rows.jsonl").chmod(0)
    assert refused("check", "c.yaml") == "rows.jsonl: cannot be read: Permission denied | check the file's permissions"


# -- what cannot be made of the rows ------------------------------------------------------------------------------


def test_an_overlong_row(folder: Path, refused: Refused) -> None:
    with open(folder / "rows.jsonl", "ab") as file:
        file.write(b'{"question": "Why?", "answer": "' + b"so " * 3000 + b'"}\n')
    said = refused("train", "c.yaml", "-s", "evaluation.split=0")
    assert said.startswith(
        "rows.jsonl:21: 1 of 21 rows are longer than train.sequence_length 2,048; the first is here, "
    )
    assert " | raise train.sequence_length to " in said


def test_a_split_that_leaves_nothing(folder: Path, refused: Refused) -> None:
    assert refused("train", "c.yaml", "-s", "evaluation.split=20") == (
        "evaluation.split: would hold out 20 of 20 rows, which leaves none to train on | give more rows, hold out "
        "fewer, or set it to 0, which evaluates nothing"
    )


def test_a_single_row(folder: Path, refused: Refused) -> None:
    (folder / "rows.jsonl").write_bytes(ROW)
    assert refused("train", "c.yaml").startswith("evaluation.split: would hold out 1 of 1 rows")
