"""Rows → conversations: each format, finding it, and what is wrong with a row."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.config.schema import Format
from finetune.data.conversation import Conversation
from finetune.data.formats import convert, detect_format
from finetune.data.read import Row, read_rows
from finetune.errors import DataError

FORMATS = [name for name in get_args(Format) if name != "auto"]


def row(values: dict[str, Any], place: str = "rows.jsonl:7") -> Row:
    return Row(values, place)


def turns(values: dict[str, Any], format_: str | None = None) -> list[tuple[str, str]]:
    found = convert(row(values), format_ or detect_format([row(values)]))
    return [(message.role, message.content) for message in found.messages]


def fault(values: dict[str, Any], format_: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        convert(row(values), format_ or detect_format([row(values)]))
    (problem,) = caught.value.problems
    return f"{problem} | {problem.hint}"


QA = [("user", "Why?"), ("assistant", "So.")]
SYSTEM = ("system", "Be brief.")


@pytest.mark.parametrize(
    ("format_", "values", "expected"),
    [
        (
            "messages",
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
            QA,
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": "So.", "weight": 1},
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": "So."},
                ]
            },
            [SYSTEM, *QA, *QA],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
            QA,
        ),
        (
            "sharegpt",
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "So."}],
            },
            [SYSTEM, *QA],
        ),
        ("alpaca", {"instruction": "Why?", "input": "", "output": "So."}, QA),
        ("alpaca", {"instruction": "Why?", "output": "So.", "system": "Be brief."}, [SYSTEM, *QA]),
        (
            "alpaca",
            {"instruction": "Why?", "input": "It is.", "output": "So."},
            [("user", "Why?\n\nIt is."), ("assistant", "So.")],
        ),
        ("prompt-completion", {"prompt": "Why?", "completion": "So.", "id": 3}, QA),
        ("prompt-completion", {"prompt": "Why?", "completion": "So.", "system": "Be brief."}, [SYSTEM, *QA]),
        ("question-answer", {"question": "Why?", "answer": "So."}, QA),
        ("question-answer", {"question": "Why?", "answer": "So.", "system": None}, QA),
    ],
)
def test_a_row_of_each_format(format_: str, values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert detect_format([row(values)]) == format_
    assert turns(values) == expected


def test_plain_text_stays_as_it_is() -> None:
    assert convert(row({"text": " a\n "}), detect_format([row({"text": " a\n "})])) == Conversation(
        (), "rows.jsonl:7", " a\n "
    )


def test_white_space_of_a_turn_is_kept() -> None:
    assert turns({"prompt": " Why? ", "completion": "\tSo.\n"}) == [("user", " Why? "), ("assistant", "\tSo.\n")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": ""}, "rows.jsonl:7: text is empty where text is expected | mend the row, or remove it"),
        ({"text": None}, "rows.jsonl:7: text is null where text is expected | mend the row, or remove it"),
        ({"text": 3}, "rows.jsonl:7: text is a number where text is expected | mend the row, or remove it"),
        ({"text": b""}, "rows.jsonl:7: text is of the type bytes where text is expected | mend the row, or remove it"),
        (
            {"prompt": "a", "completion": ["b"]},
            "rows.jsonl:7: completion is a list where text is expected | mend the row, or remove it",
        ),
        (
            {"prompt": "a", "completion": " \n"},
            "rows.jsonl:7: completion is empty where text is expected | mend the row, or remove it",
        ),
        (
            {"prompt": "a", "completion": "b", "system": 3},
            "rows.jsonl:7: system is a number where text is expected | mend the row, or remove it",
        ),
        ({"messages": []}, "rows.jsonl:7: messages is an empty list where a list of turns is expected"),
        ({"messages": "hi"}, "rows.jsonl:7: messages is 'hi' where a list of turns is expected"),
        (
            {"messages": ["hi"]},
            'rows.jsonl:7: messages[1]: expected an object | a turn is {"role": …, "content": …}',
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "rows.jsonl:7: turn 1 is a tool's result, but no tool was called | an assistant's turn with tool_calls",
        ),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "rows.jsonl:7: messages[1]: role is a list | known roles: system, developer, user, human, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
            "rows.jsonl:7: messages[2]: content is null | every turn needs text; remove the row if it has none",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "rows.jsonl:7: messages[1]: content[1]: a part of type 'image_url' | only text can be trained on; remove",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "rows.jsonl:7: the last turn is not the assistant's | there must be an answer to learn from",
        ),
        (
            {"messages": [{"role": "system", "content": "x"}]},
            "rows.jsonl:7: the last turn is not the assistant's | there must be an answer to learn from",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "rows.jsonl:7: turn 1 is by assistant where user should speak | after an optional system message, user and "
            "assistant take turns",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]},
            "rows.jsonl:7: turn 2 is by system where assistant should speak | after an optional system message, user "
            "and assistant take turns",
        ),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            "rows.jsonl:7: conversations[1]: from is 'alien' | known roles: system, developer, user, human, assistant, "
            "gpt, chatgpt, bot, model, tool, function, observation, function_response, function_call, tool_call",
        ),
        (
            {"instruct": "a", "output": "b"},
            "rows.jsonl:7: of no known format: its columns are instruct, output | rename them with `columns:`, for "
            "instance columns: {prompt: question, completion: answer}",
        ),
        ({}, "rows.jsonl:7: of no known format: its columns are none | "),
    ],
)
def test_what_a_person_reads(values: dict[str, Any], message: str) -> None:
    found = fault(values)
    assert found.startswith(message)
    assert not found.endswith("| None")


def test_a_field_that_is_not_there() -> None:
    assert fault({"prompt": "a"}, "prompt-completion") == (
        "rows.jsonl:7: has no field 'completion' | its fields are: prompt"
    )


def test_rows_of_different_formats_are_refused() -> None:
    rows = [row({"text": "a"}, "a:1"), row({"question": "a", "answer": "b"}, "a:2")]
    with pytest.raises(DataError) as caught:
        detect_format(rows)
    assert str(caught.value) == "a:2: looks like question-answer, but the rows before it like text"


words = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMES = ["messages", "conversations", "role", "content", "from", "value", "text", "prompt", "completion", "system"]
names = st.sampled_from([*NAMES, "instruction", "input", "output", "question", "answer"]) | st.text(max_size=3)
roles = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool"])
turn = st.fixed_dictionaries({}, optional={"role": roles | words, "content": words, "from": roles, "value": words})
anything = st.recursive(
    words | turn, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@given(
    values=st.dictionaries(names, anything | st.lists(turn, max_size=4), max_size=5), format_=st.sampled_from(FORMATS)
)
@example(values={"messages": [{"role": [], "content": "x"}]}, format_="messages")
@example(values={"conversations": [{"from": {}, "value": "x"}]}, format_="sharegpt")
def test_any_row_gives_a_conversation_or_an_error(values: dict[str, Any], format_: str) -> None:
    for attempt in (lambda: convert(row(values), format_), lambda: detect_format([row(values)])):
        try:
            found = attempt()
        except DataError as error:
            problems = error.problems
        else:
            if isinstance(found, Conversation) and found.text is None:
                assert found.messages[-1].role == "assistant"
            continue
        assert all(problem.place and problem.hint for problem in problems)


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("gsm8k/train.jsonl", "question-answer"),
        ("medquad/medquad.jsonl", "question-answer"),
        ("demo-formats/alpaca_en_demo.json", "alpaca"),
    ],
)
def test_real_files(assets: Any, name: str, format_: str) -> None:
    from itertools import islice

    from finetune.config.schema import DataSource

    rows = list(islice(read_rows(DataSource(path=str(assets / "data" / name))), 500))
    assert detect_format(rows) == format_
    assert all(convert(found, format_).messages for found in rows)
