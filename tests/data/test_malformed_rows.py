"""Every way in which a row can be wrong though its file is not: the exact error and hint, from preparing it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.errors import DataError

from .conftest import Prepare

ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "So."}
CALL = {"function": {"name": "f", "arguments": {}}}

MEND = "mend the row, or remove it"
TURN = "every turn needs text; remove the row if it has none"
ORDER = "after an optional system message, user and assistant take turns"
TOOLS = ORDER + ", and tools answer what the assistant calls"
LEARN = "there must be an answer to learn from"
A_TURN = 'a turn is {"role": …, "content": …}'
A_CALL = 'a call is {"type": "function", "function": {"name": …, "arguments": {…}}}'
A_TOOL = 'a tool is {"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
TEXT_ONLY = "only text can be trained on; remove the row, or describe the part in words"
HISTORY = 'history is [["instruction", "output"], …]'
ROLES = (
    "known roles: system, developer, user, human, assistant, gpt, chatgpt, bot, model, tool, function, observation, "
    "function_response, function_call, tool_call"
)


def said(*turns: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


def calls(value: Any) -> dict[str, Any]:
    return said(ASK, {"role": "assistant", "content": None, "tool_calls": value})


CASES: list[tuple[str, dict[str, Any], str]] = [
    # -- messages
    ("no turns", said(), f"messages is an empty list where a list of turns is expected | {MEND}"),
    ("turns as text", {"messages": "Hi"}, f"messages is 'Hi' where a list of turns is expected | {MEND}"),
    ("turns null", {"messages": None}, f"messages is null where a list of turns is expected | {MEND}"),
    ("a turn as text", said("Hi"), f"messages[1]: expected an object | {A_TURN}"),
    ("a turn null", said(ASK, None), f"messages[2]: expected an object | {A_TURN}"),
    ("no role", said({"content": "x"}), f"messages[1]: role is null | {ROLES}"),
    ("an unknown role", said({"role": "narrator", "content": "x"}), f"messages[1]: role is 'narrator' | {ROLES}"),
    ("a role in capitals", said({"role": "User", "content": "x"}), f"messages[1]: role is 'User' | {ROLES}"),
    ("a role that is a number", said({"role": 1, "content": "x"}), f"messages[1]: role is a number | {ROLES}"),
    ("null content", said(ASK, {"role": "assistant", "content": None}), f"messages[2]: content is null | {TURN}"),
    ("no content", said(ASK, {"role": "assistant"}), f"messages[2]: content is null | {TURN}"),
    ("empty content", said(ASK, {"role": "assistant", "content": ""}), f"messages[2]: content is empty | {TURN}"),
    ("blank content", said({"role": "user", "content": " \n"}, SAY), f"messages[1]: content is empty | {TURN}"),
    ("content as a number", said({"role": "user", "content": 3}, SAY), f"messages[1]: content is a number | {TURN}"),
    ("content as an object", said({"role": "user", "content": {}}, SAY), f"messages[1]: content is an object | {TURN}"),
    (
        "an image",
        said({"role": "user", "content": [{"type": "image_url"}]}, SAY),
        f"messages[1]: content[1]: a part of type 'image_url' | {TEXT_ONLY}",
    ),
    (
        "a part without text",
        said({"role": "user", "content": [{"type": "text"}]}, SAY),
        f"messages[1]: content[1]: a part without text | {TEXT_ONLY}",
    ),
    (
        "a part that is a number",
        said({"role": "user", "content": ["a", 3]}, SAY),
        f"messages[1]: content[2]: a part without text | {TEXT_ONLY}",
    ),
    ("no parts", said({"role": "user", "content": []}, SAY), f"messages[1]: content is empty | {TURN}"),
    (
        "a weight of 2",
        said(ASK, {**SAY, "weight": 2}),
        "messages[2]: weight is 2 | 1 trains on the message, 0 does not",
    ),
    (
        "a weight as text",
        said(ASK, {**SAY, "weight": "0"}),
        "messages[2]: weight is '0' | 1 trains on the message, 0 does not",
    ),
    # -- the order
    ("only a question", said(ASK), f"the last turn is not the assistant's | {LEARN}"),
    (
        "only a system message",
        said({"role": "system", "content": "x"}),
        f"the last turn is not the assistant's | {LEARN}",
    ),
    ("an answer first", said(SAY, ASK), f"turn 1 is by assistant where user should speak | {ORDER}"),
    ("two questions", said(ASK, ASK, SAY), f"turn 2 is by user where assistant should speak | {ORDER}"),
    ("two answers", said(ASK, SAY, SAY), f"turn 3 is by assistant where user should speak | {ORDER}"),
    (
        "a system message later",
        said(ASK, {"role": "system", "content": "x"}, SAY),
        f"turn 2 is by system where assistant should speak | {ORDER}",
    ),
    (
        "two system messages",
        said({"role": "system", "content": "x"}, {"role": "system", "content": "y"}, ASK, SAY),
        f"turn 2 is by system where user should speak | {ORDER}",
    ),
    # -- tools
    (
        "a result of no call",
        said(ASK, SAY, {"role": "tool", "content": "x"}, SAY),
        "turn 3 is a tool's result, but no tool was called | an assistant's turn with tool_calls must come before it",
    ),
    (
        "a call without a result",
        said(ASK, {"role": "assistant", "tool_calls": [CALL]}, SAY),
        f"turn 3 is by assistant where tool should speak | {TOOLS}",
    ),
    (
        "a question after a result",
        said(ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "x"}, ASK, SAY),
        f"turn 4 is by user where assistant should speak | {ORDER}",
    ),
    (
        "a null result",
        said(ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": None}, SAY),
        f"messages[3]: content is null | {TURN}",
    ),
    ("calls as text", calls("f()"), f"messages[2]: tool_calls is not a list of calls | {A_CALL}"),
    ("a call as text", calls(["f()"]), f"messages[2]: tool_calls is not a list of calls | {A_CALL}"),
    (
        "a call without a name",
        calls([{"function": {"arguments": {}}}]),
        f"messages[2]: tool_calls[1]: has no name of a function | {A_CALL}",
    ),
    (
        "a function that is text",
        calls([{"function": "f"}]),
        f"messages[2]: tool_calls[1]: has no name of a function | {A_CALL}",
    ),
    (
        "arguments cut off",
        calls([{"function": {"name": "f", "arguments": '{"a": '}}]),
        f"messages[2]: tool_calls[1]: arguments: not valid JSON: expecting value (character 7) | {MEND}",
    ),
    (
        "arguments as a list",
        calls([{"function": {"name": "f", "arguments": [1]}}]),
        "messages[2]: tool_calls[1]: arguments is a list | arguments are an object, or it as JSON",
    ),
    (
        "arguments as a number in JSON",
        calls([{"function": {"name": "f", "arguments": "3"}}]),
        "messages[2]: tool_calls[1]: arguments is a number | arguments are an object, or it as JSON",
    ),
    (
        "arguments nested too deep",
        calls([{"function": {"name": "f", "arguments": "[" * 100_000}}]),
        f"messages[2]: tool_calls[1]: arguments: not valid JSON: nested too deep | {MEND}",
    ),
    (
        "half a character in arguments",
        calls([{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]),
        "messages[2]: tool_calls[1]: arguments: half a character: \\ud800 without the other half of its pair | the "
        "text was cut in the middle of a character: mend the row, or remove it",
    ),
    (
        "tools that are no JSON",
        said(ASK, SAY, tools="weather"),
        f"tools: not valid JSON: expecting value (character 1) | {MEND}",
    ),
    ("tools that are a number", said(ASK, SAY, tools=3), f"tools: expected a list of functions | {A_TOOL}"),
    ("tools of texts", said(ASK, SAY, tools=["weather"]), f"tools: expected a list of functions | {A_TOOL}"),
    # -- sharegpt
    (
        "a call that is no JSON",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f(x)"}]},
        f"conversations[2]: value: not valid JSON: expecting value (character 1) | {MEND}",
    ),
    (
        "a null value",
        {"conversations": [{"from": "human", "value": None}]},
        f"conversations[1]: value is null | {TURN}",
    ),
    (
        "an unknown speaker",
        {"conversations": [{"from": "alien", "value": "x"}]},
        f"conversations[1]: from is 'alien' | {ROLES}",
    ),
    (
        "a turn that is a list",
        {"conversations": [["human", "x"]]},
        'conversations[1]: expected an object | a turn is {"from": …, "value": …}',
    ),
    # -- alpaca
    ("an empty output", {"instruction": "x", "output": ""}, f"output is empty where text is expected | {MEND}"),
    (
        "a null instruction",
        {"instruction": None, "output": "x"},
        f"instruction is null where text is expected | {MEND}",
    ),
    (
        "an input that is a list",
        {"instruction": "x", "input": ["y"], "output": "z"},
        f"input is a list where text is expected | {MEND}",
    ),
    (
        "a history that is text",
        {"instruction": "x", "output": "z", "history": "y"},
        f"history is 'y' where a list of pairs is expected | {MEND}",
    ),
    (
        "a pair of three",
        {"instruction": "x", "output": "z", "history": [["a", "b", "c"]]},
        f"history[1]: expected an instruction and its answer | {HISTORY}",
    ),
    (
        "half a pair",
        {"instruction": "x", "output": "z", "history": [["a", "b"], ["c", ""]]},
        f"history[2]: expected an instruction and its answer | {HISTORY}",
    ),
    # -- prompt-completion, question-answer, text
    ("a null completion", {"prompt": "x", "completion": None}, f"completion is null where text is expected | {MEND}"),
    (
        "a completion of texts",
        {"prompt": "x", "completion": ["y"]},
        f"completion is a list where text is expected | {MEND}",
    ),
    (
        "a completion by the user",
        {"prompt": [ASK], "completion": [ASK]},
        f"turn 2 is by user where assistant should speak | {ORDER}",
    ),
    (
        "a prompt that ends with an answer",
        {"prompt": [ASK, SAY], "completion": "x"},
        f"turn 3 is by assistant where user should speak | {ORDER}",
    ),
    ("a blank question", {"question": "\t", "answer": "x"}, f"question is empty where text is expected | {MEND}"),
    (
        "an answer that is a number",
        {"question": "x", "answer": 4},
        f"answer is a number where text is expected | {MEND}",
    ),
    (
        "an answer that is true",
        {"question": "x", "answer": True},
        f"answer is true or false where text is expected | {MEND}",
    ),
    ("an empty text", {"text": ""}, f"text is empty where text is expected | {MEND}"),
    # -- preference and kto
    (
        "no rejected answer",
        {"prompt": "x", "chosen": "y", "rejected": None},
        f"rejected is null where text is expected | {MEND}",
    ),
    (
        "the same answer twice",
        {"prompt": "x", "chosen": "y", "rejected": "y"},
        f"chosen and rejected are the same | {MEND}",
    ),
    (
        "answers to nothing",
        {"chosen": "y", "rejected": "z"},
        "has a chosen answer but no prompt | chosen and rejected without a prompt must each be a whole list of turns",
    ),
    (
        "a label without a completion",
        {"prompt": "x", "completion": "", "label": True},
        f"completion is empty where text is expected | {MEND}",
    ),
    # -- no format
    (
        "no columns",
        {},
        "of no known format: its columns are none | rename them with `columns:`, for instance columns: "
        "{prompt: question, completion: answer}",
    ),
    (
        "other columns",
        {"instruct": "a", "output": "b"},
        "of no known format: its columns are instruct, output | rename "
        "them with `columns:`, for instance columns: {prompt: question, completion: answer}",
    ),
]


@pytest.mark.parametrize(("values", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_wrong_with_a_row(prepared: Prepare, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared([values])
    (problem,) = caught.value.problems
    assert problem.place is not None
    found = f"{problem.message} | {problem.hint}"
    place = problem.place.removeprefix("rows.jsonl:1")
    assert problem.place.startswith("rows.jsonl:1")
    assert (f"{place.removeprefix(': ')}: " if place else "") + found == expected


@pytest.mark.parametrize("label", ["maybe", None, 2, [], "TRUE"])
def test_a_label_that_is_none(prepared: Prepare, label: Any) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: label is .* where true or false is expected"):
        prepared([{"prompt": "x", "completion": "y", "label": label}], {"format": "kto"})


def test_all_that_is_wrong_is_told_at_once(prepared: Prepare) -> None:
    good = {"question": "a", "answer": "b"}
    bad = [{"question": "a"}, {"question": "", "answer": "b"}, {"question": "a", "answer": ""}]
    rows = [*[{**good, "answer": f"b{number}"} for number in range(100)], *bad, bad[0], bad[1], bad[0]]
    with pytest.raises(DataError) as caught:
        prepared(rows)
    assert [f"{problem} | {problem.hint}" for problem in caught.value.problems] == [
        "rows.jsonl:101: has no field 'answer' (and 2 more rows like it) | its fields are: question",
        f"rows.jsonl:102: question is empty where text is expected (and 1 more row like it) | {MEND}",
        f"rows.jsonl:103: answer is empty where text is expected | {MEND}",
        "6 rows have something wrong | mend them, or allow so many to be left out with `max_dropped:` in data",
    ]


def test_so_many_wrong_rows_as_are_allowed_are_left_out_and_counted(prepared: Prepare) -> None:
    rows: list[Any] = [{"question": f"a{number}", "answer": "b"} for number in range(20)]
    rows[3], rows[7] = {"question": "a", "answer": None}, {"question": "a"}
    data = prepared(rows, {"max_dropped": 2})
    account = data.accounting
    assert (account.read, account.used) == (20, 18)
    assert account.dropped == {"answer is null where text is expected": 1, "has no field 'answer'": 1}
    assert account.first_dropped == {
        "answer is null where text is expected": "rows.jsonl:4",
        "has no field 'answer'": "rows.jsonl:8",
    }
    with pytest.raises(DataError, match=r"2 rows have something wrong, where data.max_dropped allows 1"):
        prepared(rows, {"max_dropped": 1})


def test_reading_stops_once_it_has_shown_enough(prepared: Prepare) -> None:
    rows: list[Any] = [{"question": "a", "answer": f"b{number}"} for number in range(100)]
    with pytest.raises(DataError) as caught:
        prepared([*rows, *[{"question": "a", "answer": number} for number in range(5000)]])
    (problem,) = caught.value.problems
    assert problem.message.startswith("answer is a number where text is expected (and ")
    assert int(problem.message.split("and ")[1].split(" ")[0].replace(",", "")) < 4000


def test_at_most_ten_kinds_are_listed(prepared: Prepare) -> None:
    rows: list[Any] = [{"question": "a", "answer": f"b{number}"} for number in range(100)]
    rows += [{"question": "a", "answer": "b", "system": number * [0] or {}} for number in range(3)]
    wrong = [{"messages": [{"role": f"r{number}", "content": "x"}]} for number in range(14)]
    with pytest.raises(DataError) as caught:
        prepared([*[{"messages": [ASK, {**SAY, "content": f"x{number}"}]} for number in range(100)], *wrong])
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1].message == "14 rows have something wrong; 4 further kinds are not shown"
