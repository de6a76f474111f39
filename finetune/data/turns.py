"""The turns of a conversation, as the various files spell them → messages, and the order they must stand in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finetune.data.conversation import REASONING, Message
from finetune.data.read import Row
from finetune.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
"""Every name that the common formats have for a role → the role. A `function_call` is an assistant's, in JSON."""


def read_turns(row: Row, field: str, turns: Any, *, style: str) -> list[Message]:
    """The messages of a list of turns. `style`: how a turn is shown in hints, "messages" or "sharegpt"."""
    if not isinstance(turns, list) or not turns:
        raise field_error(row, field, "a list of turns")
    return [read_turn(turn, f"{row.place}: {field}[{number}]", style) for number, turn in enumerate(turns, 1)]


def read_turn(turn: Any, place: str, style: str) -> Message:
    """One turn. Both spellings (role and content, from and value) are read wherever turns stand."""
    role_key, content_key = ("from", "value") if style == "sharegpt" else ("role", "content")
    if not isinstance(turn, dict):
        raise DataError("expected an object", place=place, hint=f'a turn is {{"{role_key}": …, "{content_key}": …}}')
    if role_key not in turn and ("role" in turn or "from" in turn):
        role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    said = turn.get(role_key)
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(f"{role_key} is {shown(said)}", place=place, hint=f"known roles: {', '.join(ROLES)}")
    content = turn.get(content_key)
    if type(content) is str and content and not content.isspace() and len(turn) == 2 and role != "function_call":
        return Message(role, content)  # by far the most turns, and there may be millions
    if isinstance(content, list):
        content = _joined(content, f"{place}: {content_key}")
    if role == "function_call":
        return Message("assistant", "", tool_calls=(_call_from_text(content, place, content_key),))
    calls = _tool_calls(turn.get("tool_calls"), place) if role == "assistant" else ()
    extra = tuple(
        (name, turn[name])
        for name in (*(REASONING if role == "assistant" else ()), "name", "tool_call_id")
        if isinstance(turn.get(name), str) and turn[name].strip()
    )
    may_be_empty = bool(calls) or (role == "tool" and isinstance(content, str))
    if content is None and may_be_empty:
        content = ""
    if not isinstance(content, str) or not (content.strip() or may_be_empty):
        raise DataError(
            f"{content_key} is {shown(content)}",
            place=place,
            hint="every turn needs text; remove the row if it has none",
        )
    return Message(role, content, calls, extra, _weight(turn, place))


def check_order(row: Row, messages: Sequence[Message]) -> None:
    """An optional system message, then user and assistant in turn, tools between a call and the answer to it.

    Raises DataError naming the turn. The last turn must be the assistant's: there must be something to learn.
    """
    previous = "system"
    called = False
    for number, message in enumerate(messages, 1):
        role = message.role
        if role == "system" and number == 1:
            continue
        if previous in ("system", "assistant") and not called:
            expected = "user"
        elif previous in ("system", "assistant"):
            expected = "tool"
        else:
            expected = "assistant"
        if role == "tool" and not called:
            raise DataError(
                f"turn {number} is a tool's result, but no tool was called",
                place=row.place,
                hint="an assistant's turn with tool_calls must come before it",
            )
        if role != expected and not (role == "tool" and previous == "tool"):
            raise DataError(
                f"turn {number} is by {role} where {expected} should speak",
                place=row.place,
                hint="after an optional system message, user and assistant take turns"
                + (", and tools answer what the assistant calls" if "tool" in (role, expected) else ""),
            )
        called = bool(message.tool_calls) or (called and role == "tool")
        previous = role
    if not messages or messages[-1].role != "assistant":
        raise DataError(
            "the last turn is not the assistant's", place=row.place, hint="there must be an answer to learn from"
        )


def read_tools(row: Row) -> tuple[dict[str, Any], ...]:
    """The `tools` column: a list of JSON Schemas, or the same as JSON text."""
    tools = row.values.get("tools")
    if tools is None or tools == "" or tools == []:
        return ()
    if isinstance(tools, str):
        tools = _parsed(tools, f"{row.place}: tools")
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            "expected a list of functions",
            place=f"{row.place}: tools",
            hint='a tool is {"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}',
        )
    # Some files leave out the wrapper that every chat template expects.
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _tool_calls(calls: Any, place: str) -> tuple[dict[str, Any], ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError("tool_calls is not a list of calls", place=place, hint=_CALL_HINT)
    found = []
    for number, call in enumerate(calls, 1):
        inner = call.get("function", call)
        here = f"{place}: tool_calls[{number}]"
        found.append({**{k: v for k, v in call.items() if k == "id" and v}, **_call(inner, here)})
    return tuple(found)


_CALL_HINT = 'a call is {"type": "function", "function": {"name": …, "arguments": {…}}}'


def _call(function: Any, place: str) -> dict[str, Any]:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError("has no name of a function", place=place, hint=_CALL_HINT)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"arguments is {shown(arguments)}", place=place, hint="arguments are an object, or it as JSON")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _call_from_text(content: Any, place: str, key: str) -> dict[str, Any]:
    if not isinstance(content, str):
        hint = 'a call is {"name": …, "arguments": {…}} as text'
        raise DataError(f"{key} is {shown(content)}", place=place, hint=hint)
    return _call(_parsed(content, f"{place}: {key}"), place)


def _parsed(text: str, place: str) -> Any:
    try:
        values = json.loads(text)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()
        return values
    except UnicodeEncodeError as error:
        raise DataError(
            f"half a character: \\u{ord(error.object[error.start]):04x} without the other half of its pair",
            place=place,
            hint="the text was cut in the middle of a character: mend the row, or remove it",
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deep"
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg[0].lower()}{error.msg[1:]} (character {error.pos + 1})"
        raise DataError(f"not valid JSON: {reason}", place=place, hint="mend the row, or remove it") from error


def _joined(parts: list[Any], place: str) -> str:
    """Content in parts, joined: a model that reads text has no use for the seams."""
    found = []
    for number, part in enumerate(parts, 1):
        if isinstance(part, str):
            found.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"of type {kind!r}" if isinstance(kind, str) and kind != "text" else "without text"
            raise DataError(
                f"a part {what}",
                place=f"{place}[{number}]",
                hint="only text can be trained on; remove the row, or describe the part in words",
            )
        found.append(part["text"])
    return "".join(found)


def _weight(turn: dict[str, Any], place: str) -> int:
    weight = turn.get("weight")
    if weight is None:
        return 1
    if weight not in (0, 1) or isinstance(weight, str):
        raise DataError(f"weight is {weight!r}", place=place, hint="1 trains on the message, 0 does not")
    return int(weight)


def field_error(row: Row, field: str, expected: str) -> DataError:
    """A field that is missing, empty or of the wrong type."""
    if field not in row.values:
        known = ", ".join(map(str, row.values)) or "none"
        return DataError(f"has no field {field!r}", place=row.place, hint=f"its fields are: {known}")
    return DataError(
        f"{field} is {shown(row.values[field])} where {expected} is expected",
        place=row.place,
        hint="mend the row, or remove it",
    )


def shown(value: Any) -> str:
    """What a field holds, in a word or two."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "empty" if not value.strip() else repr(value[:30])
    if value == []:
        return "an empty list"
    kinds = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")
