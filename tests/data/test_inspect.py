"""What `ft data` shows of the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.inspect import Wanted, histogram, segments, show_rows, visible
from finetune.errors import DataError

from .conftest import Prepare, question


def config(sequence_length: int = 2048) -> Config:
    values = {"base": "a/b", "data": [{"path": "c/d"}], "train": {"sequence_length": sequence_length}}
    return Config.model_validate(values)


def test_rows_are_shown_with_their_loss_in_brackets(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared([question(1), question(2)])
    show_rows(data, config(), Console(), Wanted(2, 5), [])
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
languages (guessed, of 2 rows): unknown 100%

with loss in [[double brackets]]

row 2, rows.jsonl:2: 25 tokens, 3 with loss
<|im_start|>user
Q2<|im_end|>
<|im_start|>assistant
[[A2<|im_end|>]]

"""
    )


def test_rows_for_programs(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    show_rows(prepared([question(1), question(2)]), config(), Console(json_events=True), Wanted(1, 1), [])
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert (row["event"], row["number"], row["place"], row["tokens"], row["supervised"]) == (
        "row",
        1,
        "rows.jsonl:1",
        25,
        3,
    )
    assert [(part["loss"], part["special"], part["text"]) for part in row["segments"]] == [
        (False, True, "<|im_start|>"),
        (False, False, "user\nQ1"),
        (False, True, "<|im_end|>"),
        (False, False, "\n"),
        (False, True, "<|im_start|>"),
        (False, False, "assistant\n"),
        (True, False, "A1"),
        (True, True, "<|im_end|>"),
        (False, False, "\n"),
    ]


@pytest.mark.parametrize("first", [0, -1, 3])
def test_a_row_that_is_not_there(prepared: Prepare, first: int) -> None:
    with pytest.raises(DataError) as caught:
        show_rows(prepared([question(1), question(2)]), config(), Console(), Wanted(first, 1), [])
    (problem,) = caught.value.problems
    assert f"{problem} | {problem.hint}" == (f"--row {first}: there is no such row to train on | name one from 1 to 2")


def test_segments_are_the_whole_row(prepared: Prepare) -> None:
    data = prepared([question(1)])
    whole = data.tokenizer.decode(data.train[0].ids.tolist(), skip_special=False)
    assert "".join(part.text for part in segments(data, data.train[0])) == whole


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=50))
def test_every_row_is_in_the_histogram(lengths: list[int]) -> None:
    head, *lines = histogram(lengths)
    assert head == f"tokens per row: {min(lengths):,} to {max(lengths):,}"
    assert len(lines) <= 8
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines if "█" in line) == len(lengths)


def test_rows_are_found_by_what_they_say(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared([question(number, f"Nr. {number} é") for number in range(30)])
    show_rows(data, config(), Console(), Wanted(1, 2, "nR. 1"), [])
    shown = capsys.readouterr().err
    assert [line.partition(",")[0] for line in shown.splitlines() if line.startswith("row ")] == ["row 2", "row 11"]
    with pytest.raises(DataError) as caught:
        show_rows(data, config(), Console(), Wanted(find="nowhere"), [])
    assert str(caught.value) == "--find nowhere: no row to train on holds this text"
    assert capsys.readouterr().err == "", "nothing is printed before it is known that there is something to show"


def test_a_page_runs_and_fetches_nothing(prepared: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared([question(1, "<script>alert(1)</script> & \x1b[2J"), question(2)])
    show_rows(data, config(), Console(), Wanted(html=tmp_path / "data.html"), ["data: 2 rows"])
    page = (tmp_path / "data.html").read_text("utf-8")
    assert capsys.readouterr().err == f"wrote {tmp_path / 'data.html'}\n"
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page
    assert "data: 2 rows" in page
    assert "<b>&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\x1b[2J</b><b><i>&lt;|im_end|&gt;</i></b>" in page


def test_nothing_reaches_the_terminal_that_it_would_obey(prepared: Prepare, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared([question(1, "a\x1b[31mred\x07\u202etxt\ttab")])
    show_rows(data, config(), Console(), Wanted(), [])
    assert "a\\x1b[31mred\\x07\\u202etxt\ttab" in capsys.readouterr().err


@given(st.text())
def test_visible_text_is_harmless_and_stays_itself(text: str) -> None:
    shown = visible(text)
    assert not any(ord(character) < 32 and character not in "\t\n" for character in shown)
    assert "\x7f" not in shown
    assert visible(shown) == shown
