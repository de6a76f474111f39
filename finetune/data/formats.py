"""One row → a `Conversation` (or a plain text). Pure functions, one per format, and the table that finds the format.

Every format ends as the same thing: a list of messages with roles. A field that is missing or of the wrong type is a
`DataError` with the row's place; nothing is guessed and nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finetune.data.conversation import Conversation, Message
from finetune.data.read import Row
from finetune.data.turns import check_order, field_error, read_tools, read_turn, read_turns, shown
from finetune.errors import DataError

MAX_TEXT = 20_000_000
"""Characters in a row: several times the longest book. Tokenising takes fifty bytes of memory for each."""


def detect_format(rows: Sequence[Row]) -> str:
    """The one format that these rows fit, by their columns. A row that fits none is wrong in whichever it is.

    Raises DataError when no row fits any, or when rows fit different ones.
    """
    found: str | None = None
    for row in rows:
        format_ = next((name for name, fits in _SIGNATURES if fits(row.values)), None)
        if format_ is None:
            continue
        if found is not None and format_ != found:
            raise DataError(
                f"looks like {format_}, but the rows before it like {found}",
                place=row.place,
                hint="put rows of different formats into different files",
            )
        found = format_
    if found is None:
        raise DataError(
            f"of no known format: its columns are {', '.join(map(str, rows[0].values)) or 'none'}",
            place=rows[0].place,
            hint="rename them with `columns:`, for instance columns: {prompt: question, completion: answer}",
        )
    return found


def convert(row: Row, format_: str) -> Conversation:
    """One row as a conversation. Raises DataError when a field is missing, empty or of the wrong type."""
    conversation = _CONVERTERS[format_](row)
    length = len(conversation.text or "")
    if format_ != "text":
        check_order(row, conversation.messages)
        length = sum(len(message.content) for message in conversation.messages)
    if length > MAX_TEXT:
        raise DataError(
            f"is a text of {length:,} characters, and {MAX_TEXT:,} are the most that can be taken in at once",
            place=row.place,
            hint="cut it into several rows; a line end or a quote may be missing",
        )
    return conversation


def _messages(row: Row) -> Conversation:
    turns = read_turns(row, "messages", row.values.get("messages"), style="messages")
    return Conversation(tuple(turns), row.place, tools=read_tools(row))


def _sharegpt(row: Row) -> Conversation:
    turns = read_turns(row, "conversations", row.values.get("conversations"), style="sharegpt")
    return Conversation((*_system(row), *turns), row.place, tools=read_tools(row))


def _alpaca(row: Row) -> Conversation:
    instruction = _text(row, "instruction")
    given = _optional_text(row, "input")
    asked = Message("user", f"{instruction}\n\n{given}" if given else instruction)
    answered = Message("assistant", _text(row, "output"))
    return Conversation((*_system(row), *_history(row), asked, answered), row.place)


def _history(row: Row) -> list[Message]:
    """Alpaca's earlier turns: a list of [instruction, output]."""
    history = row.values.get("history")
    if history is None or history == []:
        return []
    if not isinstance(history, list):
        raise field_error(row, "history", "a list of pairs")
    messages = []
    for number, pair in enumerate(history, 1):
        whole = isinstance(pair, list | tuple) and len(pair) == 2
        if not whole or not all(isinstance(text, str) and text.strip() for text in pair):
            raise DataError(
                "expected an instruction and its answer",
                place=f"{row.place}: history[{number}]",
                hint='history is [["instruction", "output"], …]',
            )
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _prompt_completion(row: Row) -> Conversation:
    return _prompted(row, "completion")


def _question_answer(row: Row) -> Conversation:
    messages = (*_system(row), Message("user", _text(row, "question")), Message("assistant", _text(row, "answer")))
    return Conversation(messages, row.place, completion=len(messages) - 1)


def _preference(row: Row) -> Conversation:
    """The prompt with the chosen answer. The rejected one is looked at too: a row without it is no such row."""
    if "prompt" not in row.values and "conversations" not in row.values and isinstance(row.values.get("chosen"), str):
        raise DataError(
            "has a chosen answer but no prompt",
            place=row.place,
            hint="chosen and rejected without a prompt must each be a whole list of turns",
        )
    chosen, rejected = _prompted(row, "chosen"), _prompted(row, "rejected")
    if chosen.messages == rejected.messages:
        raise DataError("chosen and rejected are the same", place=row.place, hint="mend the row, or remove it")
    return chosen


def _kto(row: Row) -> Conversation:
    label = row.values.get("label")
    wanted = {True: True, False: False, "true": True, "false": False, "True": True, "False": False}
    if not isinstance(label, bool | int | str) or label not in wanted:
        raise field_error(row, "label", "true or false")
    found = _messages(row) if "messages" in row.values else _prompted(row, "completion")
    return Conversation(
        found.messages, row.place, tools=found.tools, completion=found.completion, unwanted=not wanted[label]
    )


def _plain_text(row: Row) -> Conversation:
    return Conversation((), row.place, _text(row, "text"))


_CONVERTERS: dict[str, Callable[[Row], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
    "preference": _preference,
    "kto": _kto,
    "text": _plain_text,
}


def _labelled(values: dict[str, Any]) -> bool:
    """A label of true or false: other labels are classes, which say nothing about how good an answer is."""
    return isinstance(values.get("label"), bool) and ("messages" in values or {"prompt", "completion"} <= values.keys())


_SIGNATURES: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
    # The most telling first: a row may carry columns besides those of its format.
    ("preference", lambda values: {"chosen", "rejected"} <= values.keys()),
    ("kto", _labelled),
    ("messages", lambda values: "messages" in values),
    ("sharegpt", lambda values: "conversations" in values),
    ("alpaca", lambda values: {"instruction", "output"} <= values.keys()),
    ("prompt-completion", lambda values: {"prompt", "completion"} <= values.keys()),
    ("question-answer", lambda values: {"question", "answer"} <= values.keys()),
    ("text", lambda values: "text" in values),
)


def _prompted(row: Row, field: str) -> Conversation:
    """A prompt and what follows it: each a text, or turns. Without a prompt, all turns stand in `field`."""
    tools = read_tools(row)
    before = [*_system(row)]
    if "prompt" in row.values:
        before += _part(row, "prompt", "user", style="messages")
    elif "conversations" in row.values:
        before += read_turns(row, "conversations", row.values["conversations"], style="sharegpt")
    elif field == "completion":
        raise field_error(row, "prompt", "text")
    after = _part(row, field, "assistant", style="messages")
    return Conversation((*before, *after), row.place, tools=tools, completion=len(before) if before else None)


def _part(row: Row, field: str, role: str, *, style: str) -> list[Message]:
    value = row.values.get(field)
    if isinstance(value, dict):
        return [read_turn(value, f"{row.place}: {field}", style)]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return read_turns(row, field, value, style=style)
    return [Message(role, _text(row, field))]


def _system(row: Row) -> list[Message]:
    system = _optional_text(row, "system")
    return [Message("system", system)] if system else []


def _text(row: Row, field: str) -> str:
    value = row.values.get(field)
    if not isinstance(value, str) or not value.strip():
        raise field_error(row, field, "text")
    return value


def _optional_text(row: Row, field: str) -> str:
    value = row.values.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{field} is {shown(value)} where text is expected", place=row.place, hint="mend the row, or remove it"
        )
    return value if value.strip() else ""
