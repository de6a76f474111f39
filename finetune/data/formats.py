"""One row → a `Conversation` (or a plain text). Pure functions, one per format, and the table that finds the format.

Every format ends as the same thing: a list of messages with roles. A field that is missing or of the wrong type is a
`DataError` with the row's place; nothing is guessed and nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.read import Row
from finetune.errors import DataError

ROLES = ("system", "user", "assistant")

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """As chat templates want it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a model is trained on: messages that end with an assistant's, or, for `text`, a single text."""

    messages: tuple[Message, ...]
    place: str
    text: str | None = None


def detect_format(rows: Sequence[Row]) -> str:
    """The one format that all of these rows fit, by their columns.

    Raises DataError when a row fits none, or when rows fit different ones.
    """
    found: str | None = None
    for row in rows:
        format_ = next((name for name, columns in _SIGNATURES if columns <= row.values.keys()), None)
        if format_ is None:
            raise DataError(
                f"of no known format: its columns are {', '.join(map(str, row.values)) or 'none'}",
                place=row.place,
                hint="rename them with `columns:`, for instance columns: {prompt: question, completion: answer}",
            )
        if found is not None and format_ != found:
            raise DataError(
                f"looks like {format_}, but the rows before it like {found}",
                place=row.place,
                hint="put rows of different formats into different files",
            )
        found = format_
    assert found is not None, "read_rows yields at least one row"
    return found


def convert(row: Row, format_: str) -> Conversation:
    """One row as a conversation. Raises DataError when a field is missing, empty or of the wrong type."""
    return _CONVERTERS[format_](row)


def _messages(row: Row) -> Conversation:
    return _conversation(row, _turns(row, "messages", "role", "content", {role: role for role in ROLES}))


def _sharegpt(row: Row) -> Conversation:
    messages = _turns(row, "conversations", "from", "value", _SHAREGPT_ROLES)
    if isinstance(row.values.get("system"), str) and row.values["system"].strip():
        messages = [Message("system", row.values["system"]), *messages]
    return _conversation(row, messages)


def _alpaca(row: Row) -> Conversation:
    instruction = _text(row, "instruction")
    given = _optional_text(row, "input")
    messages = [Message("user", f"{instruction}\n\n{given}" if given else instruction)]
    system = _optional_text(row, "system")
    if system:
        messages.insert(0, Message("system", system))
    return _conversation(row, [*messages, Message("assistant", _text(row, "output"))])


def _prompt_completion(row: Row) -> Conversation:
    return _pair(row, "prompt", "completion")


def _question_answer(row: Row) -> Conversation:
    return _pair(row, "question", "answer")


def _plain_text(row: Row) -> Conversation:
    return Conversation((), row.place, _text(row, "text"))


_CONVERTERS: dict[str, Callable[[Row], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
    "text": _plain_text,
}

_SIGNATURES: tuple[tuple[str, set[str]], ...] = (
    # The most telling first: a row may carry columns besides those of its format.
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("alpaca", {"instruction", "output"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("question-answer", {"question", "answer"}),
    ("text", {"text"}),
)


def _pair(row: Row, prompt: str, completion: str) -> Conversation:
    messages = [Message("user", _text(row, prompt)), Message("assistant", _text(row, completion))]
    system = _optional_text(row, "system")
    if system:
        messages.insert(0, Message("system", system))
    return _conversation(row, messages)


def _turns(row: Row, field: str, role_key: str, content_key: str, roles: dict[str, str]) -> list[Message]:
    turns = row.values.get(field)
    if not isinstance(turns, list) or not turns:
        raise _field_error(row, field, "a list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        place = f"{row.place}: {field}[{number}]"
        if not isinstance(turn, dict):
            raise DataError(
                "expected an object", place=place, hint=f'a turn is {{"{role_key}": …, "{content_key}": …}}'
            )
        role, content = turn.get(role_key), turn.get(content_key)
        if not isinstance(role, str) or role not in roles:
            known = ", ".join(roles)
            raise DataError(f"{role_key} is {_shown(role)}", place=place, hint=f"known roles: {known}")
        if not isinstance(content, str) or not content.strip():
            raise DataError(
                f"{content_key} is {_shown(content)}",
                place=place,
                hint="every turn needs text; remove the row if it has none",
            )
        messages.append(Message(roles[role], content))
    return messages


def _conversation(row: Row, messages: Iterable[Message]) -> Conversation:
    """Check the order of roles: an optional system message, then user and assistant in turn, an assistant last."""
    found = tuple(messages)
    expected = "user"
    for number, message in enumerate(found):
        if message.role == "system" and number == 0:
            continue
        if message.role != expected:
            raise DataError(
                f"turn {number + 1} is by {message.role} where {expected} should speak",
                place=row.place,
                hint="after an optional system message, user and assistant take turns",
            )
        expected = "assistant" if expected == "user" else "user"
    if not found or found[-1].role != "assistant":
        raise DataError(
            "the last turn is not the assistant's", place=row.place, hint="there must be an answer to learn from"
        )
    return Conversation(found, row.place)


def _text(row: Row, field: str) -> str:
    value = row.values.get(field)
    if not isinstance(value, str) or not value.strip():
        raise _field_error(row, field, "text")
    return value


def _optional_text(row: Row, field: str) -> str:
    value = row.values.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _field_error(row, field, "text")
    return value if value.strip() else ""


def _field_error(row: Row, field: str, expected: str) -> DataError:
    if field not in row.values:
        known = ", ".join(map(str, row.values)) or "none"
        return DataError(f"has no field {field!r}", place=row.place, hint=f"its fields are: {known}")
    return DataError(
        f"{field} is {_shown(row.values[field])} where {expected} is expected",
        place=row.place,
        hint="mend the row, or remove it",
    )


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "empty" if not value.strip() else repr(value[:30])
    if value == []:
        return "an empty list"
    kinds = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")
