"""Jinja as chat templates expect it (transformers' documentation: "Chat templates", advanced usage), sandboxed."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.errors import BaseError


class TemplateRefusal(BaseError):
    """Why a template cannot be used for a conversation; turned into a DataError where the row's place is known."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, hint="the chat template says so: change the conversation, or give another template")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks answers in some templates; here it is only passed through."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any = "") -> None:
    raise TemplateRefusal(" ".join(str(message).split()) or "it gives no reason")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """`today` is what `strftime_now` tells a template: frozen, so that all rows are rendered on the same day."""

    def __init__(self, today: datetime.datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        strftime_now: Callable[[str], str] = today.strftime
        self.filters["tojson"] = tojson
        self.globals.update(raise_exception=_raise_exception, strftime_now=strftime_now)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Jinja's sandbox, and no attribute of a class: `dict.update(message, …)` would change what it is given."""
        return not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value)
