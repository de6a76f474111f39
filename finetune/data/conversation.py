"""What every format becomes: a conversation, or a plain text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names under which data and chat templates keep what a model thought before it answered."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. The fields after `content` are those of OpenAI's chat format, as chat templates read them."""

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    """`{"type": "function", "function": {"name": …, "arguments": {…}}}` each; arguments are an object here."""
    extra: tuple[tuple[str, str], ...] = ()
    """Further fields that templates read, by name: reasoning, `name`, `tool_call_id`."""
    weight: int = 1
    """0 where the data says that this message carries no loss."""

    def as_dict(self, *, text_arguments: bool = False) -> dict[str, Any]:
        """As chat templates want it; `text_arguments`: with the arguments of tool calls as JSON text, which some do."""
        found: dict[str, Any] = {"role": self.role, "content": self.content, **dict(self.extra)}
        if self.tool_calls:
            found["tool_calls"] = [_with_text(call) if text_arguments else call for call in self.tool_calls]
        return found

    @property
    def reasoning(self) -> str:
        """What the model thought before it answered, where the data has it apart from the answer."""
        return next((text for name, text in self.extra if name in REASONING), "")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a model is trained on: messages that end with an assistant's, or, for `text`, a single text."""

    messages: tuple[Message, ...]
    place: str
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    """JSON Schemas of the functions that the model may call."""
    completion: int | None = None
    """The index of the first message of the completion, where the format says which that is."""
    unwanted: bool = False
    """A KTO row whose completion is labelled as bad: nothing for a model to imitate."""

    def trained(self, loss_on: str) -> list[int]:
        """The indices of the messages that carry loss under `train.loss_on` (any but `all`)."""
        answers = [index for index, message in enumerate(self.messages) if message.role == "assistant"]
        if loss_on == "last-assistant":
            answers = answers[-1:]
        elif loss_on == "completion":
            last_asked = max((i for i, message in enumerate(self.messages) if message.role == "user"), default=-1)
            begin = self.completion if self.completion is not None else last_asked + 1
            answers = [index for index in answers if index >= begin]
        return [index for index in answers if self.messages[index].weight]

    def all_text(self) -> list[str]:
        """Every text in it that somebody wrote, for the search after what should not be in it."""
        if self.text is not None:
            return [self.text]
        found = []
        for message in self.messages:
            found += [message.content, *(text for _, text in message.extra)]
            if message.tool_calls:
                found.append(json.dumps(message.tool_calls, ensure_ascii=False))
        return found


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
