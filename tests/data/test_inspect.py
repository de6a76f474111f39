"""What `ft data` shows of the rows."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.inspect import histogram, segments, show_rows
from finetune.errors import DataError

from .conftest import Prepare, question


def config(sequence_length: int = 2048) -> Config:
    values = {"base": "a/b", "data": [{"path": "c/d"}], "train": {"sequence_length": sequence_length}}
    return Config.model_validate(values)


def test_rows_are_shown_with_their_loss_in_brackets(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared([question(1), question(2)])
    show_rows(data, config(), Console(), first=2, count=5)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert (
        shown.err
        == """
tokens per row: 25 to 25
 1–4   0
 5–8   0
 9–12  0
13–16  0
17–20  0
21–24  0
25–25 ████████████████████████████████████████ 2
packed into 1 sequences of 2,048, 2.4% full

with loss in [[double brackets]]

row 2, rows.jsonl:2: 25 tokens, 3 with loss
<|im_start|>user
Q2<|im_end|>
<|im_start|>assistant
[[A2<|im_end|>]]

"""
    )


def test_rows_for_programs(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    show_rows(prepared([question(1), question(2)]), config(), Console(json_events=True), first=1, count=1)
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert (row["event"], row["number"], row["place"], row["tokens"], row["supervised"]) == (
        "row",
        1,
        "rows.jsonl:1",
        25,
        3,
    )
    assert [part["loss"] for part in row["segments"]] == [False, True, False]
    assert row["segments"][1]["text"] == "A1<|im_end|>"


@pytest.mark.parametrize("first", [0, -1, 3])
def test_a_row_that_is_not_there(prepared: Prepare, first: int) -> None:
    with pytest.raises(DataError) as caught:
        show_rows(prepared([question(1), question(2)]), config(), Console(), first=first, count=1)
    (problem,) = caught.value.problems
    assert f"{problem} | {problem.hint}" == (f"--row {first}: there is no such row to train on | name one from 1 to 2")


def test_segments_are_the_whole_row(prepared: Prepare) -> None:
    data = prepared([question(1)])
    whole = data.tokenizer.decode(data.train[0].ids.tolist(), skip_special=False)
    assert "".join(text for _, text in segments(data, data.train[0])) == whole


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=50))
def test_every_row_is_in_the_histogram(lengths: list[int]) -> None:
    head, *lines = histogram(lengths)
    assert head == f"tokens per row: {min(lengths):,} to {max(lengths):,}"
    assert len(lines) <= 8
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines if "█" in line) == len(lengths)
