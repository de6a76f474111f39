"""Config → tokenised rows: the mask, the account of every row, overlong rows, the held-out split, the packs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData, prepare
from finetune.data.store import IGNORED
from finetune.errors import DataError

from .conftest import Prepare, question, write_rows

ROWS = [question(number) for number in range(40)]


def supervised(data: PreparedData, index: int = 0) -> str:
    row = data.train[index]
    return data.tokenizer.decode(row.ids[row.supervised].tolist(), skip_special=False)


def fault(prepared: Prepare, *args: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepared(*args, **settings)
    (problem,) = caught.value.problems
    return f"{problem} | {problem.hint}"


def adds_up(data: PreparedData) -> bool:
    account = data.accounting
    kept = account.used == len(data.train) and account.held_out == len(data.held_out)
    return kept and account.read == account.used + account.held_out + sum(account.dropped.values())


# -- the mask -----------------------------------------------------------------------------------------------------


def test_the_answer_and_its_end_carry_loss(prepared: Prepare) -> None:
    data = prepared([{"prompt": "Why?", "completion": "So é."}])
    row = data.train[0]
    whole = data.tokenizer.decode(row.ids.tolist(), skip_special=False)
    assert whole == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo é.<|im_end|>\n"
    assert supervised(data) == "So é.<|im_end|>"
    assert row.supervised.sum() == len("So é.".encode()) + 1
    assert row.labels()[row.supervised].tolist() == row.ids[row.supervised].tolist()
    assert set(row.labels()[~row.supervised].tolist()) == {IGNORED}


def test_every_answer_of_a_conversation_carries_loss(prepared: Prepare) -> None:
    said = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    data = prepared([{"messages": [{"role": role, "content": content} for role, content in said]}])
    assert supervised(data) == "b<|im_end|>d<|im_end|>"


def test_a_user_who_writes_the_markers_gets_no_loss(prepared: Prepare) -> None:
    data = prepared([{"prompt": "<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>", "completion": "true"}])
    assert supervised(data) == "true<|im_end|>"


def test_plain_text_trains_on_all_of_it_and_ends(prepared: Prepare) -> None:
    data = prepared([{"text": "abc"}])
    assert data.template is None
    assert data.tokenizer.decode(data.train[0].ids.tolist(), skip_special=False) == "abc</s>"
    assert data.train[0].supervised.all()


def test_loss_on_all(prepared: Prepare) -> None:
    data = prepared(ROWS, train={"loss_on": "all"})
    assert all(row.supervised.all() for row in data.train)


# -- the account --------------------------------------------------------------------------------------------------


def test_lengths_can_be_counted_by_hand(prepared: Prepare) -> None:
    data = prepared([question(0)])
    assert len(data.train[0].ids) == len("<user\nQ0>\n<assistant\nA0>\n")


def test_every_row_is_accounted_for(prepared: Prepare) -> None:
    data = prepared(ROWS, evaluation={"split": 0.1})
    assert (data.accounting.read, data.accounting.used, data.accounting.held_out) == (40, 36, 4)
    assert data.accounting.formats == {"rows.jsonl": "question-answer"}
    assert adds_up(data)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=12),
    policy=st.sampled_from(["truncate", "drop"]),
    limit=st.integers(8, 90),
    split=st.sampled_from([0, 1, 0.3]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_the_account_adds_up_whatever_is_cut(
    prepared: Prepare, lengths: list[int], policy: str, limit: int, split: float
) -> None:
    rows = [question(index, "a" * length) for index, length in enumerate(lengths)]
    try:
        data = prepared(
            rows,
            {"on_overlong": policy},
            evaluation={"split": split, "allow_leakage": True},
            train={"sequence_length": limit},
        )
    except DataError as error:
        if not any(reason in str(error) for reason in ("no row is left to train on", "leaves none to train on")):
            raise
        return
    assert adds_up(data)
    assert all(len(row.ids) <= limit and row.supervised[1:].any() for row in [*data.train, *data.held_out])
    assert data.packs is not None
    assert sorted(index for members in data.packs for index in members) == list(range(len(data.train)))
    if policy == "drop":
        assert data.accounting.truncated == data.accounting.lost_supervised_tokens == 0
    else:
        whole = sum(length + 1 for length in lengths)
        kept = sum(int(row.supervised.sum()) for row in [*data.train, *data.held_out])
        fully = data.accounting.lost_supervised_tokens + kept
        assert fully == whole or sum(data.accounting.dropped.values())


def test_overlong_rows_are_an_error_that_says_what_each_way_out_costs(prepared: Prepare) -> None:
    rows = [*ROWS[:3], question(3, "a" * 30), question(4, "b" * 100)]
    assert fault(prepared, rows, train={"sequence_length": 40}) == (
        "rows.jsonl:4: 2 of 5 rows are longer than train.sequence_length 40; the first is here, the longest has 123 "
        "tokens (rows.jsonl:5) | raise train.sequence_length to 123, or set in data `on_overlong: truncate` (loses 94 "
        "tokens with loss, 0 rows whole), `on_overlong: split` (loses 132) or `on_overlong: drop` (loses 132 in 2 "
        "rows)"
    )


def test_overlong_rows_are_dropped_and_named(prepared: Prepare) -> None:
    rows = [*ROWS[:3], question(3, "a" * 30), question(4, "b" * 100)]
    account = prepared(rows, {"on_overlong": "drop"}, train={"sequence_length": 40}).accounting
    assert account.dropped == {"longer than train.sequence_length": 2}
    assert account.first_dropped == {"longer than train.sequence_length": "rows.jsonl:4"}


def test_overlong_rows_are_cut_and_what_is_lost_is_counted(prepared: Prepare) -> None:
    rows = [*ROWS[:3], question(3, "a" * 30), {"question": "q" * 60, "answer": "a"}]
    data = prepared(rows, {"on_overlong": "truncate"}, train={"sequence_length": 40})
    assert data.accounting.dropped == {"no token with loss is left": 1}
    assert data.accounting.first_dropped == {"no token with loss is left": "rows.jsonl:5"}
    assert (data.accounting.truncated, len(data.train[3].ids)) == (1, 40)
    assert data.accounting.lost_supervised_tokens == 31 - int(data.train[3].supervised.sum())


def test_nothing_left_to_train_on(prepared: Prepare) -> None:
    assert fault(prepared, ROWS, {"on_overlong": "drop"}, train={"sequence_length": 8}) == (
        "rows.jsonl: no row is left to train on: longer than train.sequence_length (the first: rows.jsonl:1) | raise "
        "train.sequence_length, or set `on_overlong: error` in data to see how long the rows are"
    )


def test_each_source_has_its_own_policy(here: Path, byte_base: Path) -> None:
    long = question(0, "a" * 90)
    for name in ("cut", "dropped"):
        write_rows(here / f"{name}.jsonl", [long, question(1)])
    sources = [("cut", "truncate"), ("dropped", "drop")]
    config = Config.model_validate(
        {
            "base": str(byte_base),
            "chat_template": "chatml",
            "data": [{"path": str(here / f"{name}.jsonl"), "on_overlong": policy} for name, policy in sources],
            "evaluation": {"split": 0},
            "train": {"sequence_length": 60},
        }
    )
    account = prepare(config, byte_base).accounting
    assert (account.read, account.used, account.truncated, account.dropped) == (
        4,
        3,
        1,
        {"longer than train.sequence_length": 1},
    )


def test_a_row_that_does_not_fit_the_format_of_its_file(prepared: Prepare) -> None:
    rows = [*[question(number) for number in range(150)], {"question": "Why?"}]
    assert fault(prepared, rows) == "rows.jsonl:151: has no field 'answer' | its fields are: question"


# -- the held-out rows --------------------------------------------------------------------------------------------


def held_out(data: PreparedData) -> list[str]:
    return [row.place for row in data.held_out]


def test_the_split_is_drawn_with_the_seed(prepared: Prepare) -> None:
    first = prepared(ROWS, evaluation={"split": 0.25})
    again = prepared(ROWS, evaluation={"split": 0.25})
    other = prepared(ROWS, evaluation={"split": 0.25}, train={"seed": 43})
    assert held_out(first) == held_out(again)
    assert held_out(first) != held_out(other)
    assert first.packs is not None
    assert again.packs is not None
    assert [pack.tolist() for pack in first.packs] == [pack.tolist() for pack in again.packs]
    # Known rows, so that a new version of Python or of ours that draws others is noticed.
    assert held_out(prepared(ROWS, evaluation={"split": 3})) == ["rows.jsonl:19", "rows.jsonl:8", "rows.jsonl:18"]


@given(number=st.integers(2, 60), split=st.floats(0.001, 0.999) | st.integers(1, 70))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_no_row_is_both_trained_on_and_held_out(prepared: Prepare, number: int, split: float) -> None:
    rows = [question(index) for index in range(number)]
    wanted = max(1, round(split * number) if split < 1 else int(split))
    if wanted >= number:
        message = f"evaluation.split: would hold out {wanted} of {number} rows, which leaves none to train on"
        assert fault(prepared, rows, evaluation={"split": split}).startswith(message)
        return
    data = prepared(rows, evaluation={"split": split})
    assert len(data.held_out) == wanted
    assert adds_up(data)
    assert not {row.place for row in data.train} & set(held_out(data))


def test_a_single_row_cannot_be_split(prepared: Prepare) -> None:
    assert fault(prepared, ROWS[:1], evaluation={}) == (
        "evaluation.split: would hold out 1 of 1 rows, which leaves none to train on | give more rows, hold out fewer, "
        "or set it to 0, which evaluates nothing"
    )


def test_a_file_of_held_out_rows(prepared: Prepare, here: Path) -> None:
    write_rows(here / "held.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    data = prepared(ROWS, evaluation={"path": str(here / "held.jsonl")})
    assert held_out(data) == ["held.jsonl:1", "held.jsonl:2"]
    assert data.accounting.formats == {"rows.jsonl": "question-answer", "held.jsonl": "prompt-completion"}
    assert adds_up(data)


# -- the packs ----------------------------------------------------------------------------------------------------


def test_packs_hold_every_row_once_and_do_not_follow_length(prepared: Prepare) -> None:
    rows = [question(number, "a" * (number + 1)) for number in range(60)]
    data = prepared(rows, train={"sequence_length": 128})
    assert data.packs is not None
    assert Counter(index for members in data.packs for index in members) == Counter(range(60))
    longest = [max(len(data.train[index].ids) for index in members) for members in data.packs]
    assert longest != sorted(longest, reverse=True)
    assert data.sequences == len(data.packs)


def test_without_packing_each_row_is_a_sequence(prepared: Prepare) -> None:
    data = prepared(ROWS, train={"packing": False})
    assert data.packs is None
    assert data.sequences == len(ROWS)


def test_progress_is_told_to_the_end(here: Path, byte_base: Path) -> None:
    told: list[int] = []
    values = {
        "base": str(byte_base),
        "chat_template": "chatml",
        "data": [{"path": str(write_rows(here / "rows.jsonl", [question(number) for number in range(1200)]))}],
    }
    prepare(Config.model_validate(values), byte_base, on_progress=told.append)
    assert told == [500, 1000, 1200]
