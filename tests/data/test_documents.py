"""docs/data.md and docs/chat-templates.md say what is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from finetune.config.schema import Format
from finetune.data.formats import convert, detect_format
from finetune.data.read import Row
from scripts.chat_templates import page

from .conftest import Prepare

DOCS = Path(__file__).parents[2] / "docs"


def documented() -> list[tuple[str, dict[str, Any]]]:
    """Every row in docs/data.md, with the format under whose heading it stands."""
    text = (DOCS / "data.md").read_text("utf-8")
    found = []
    for section in text.split("\n### ")[1:]:
        name = section.split("\n")[0]
        found += [(name, json.loads(block)) for block in re.findall(r"```json\n(.*?)\n```", section, re.DOTALL)]
    return found


@pytest.mark.parametrize(("format_", "values"), documented(), ids=lambda value: value if isinstance(value, str) else "")
def test_each_documented_row_is_read_and_trained_on(format_: str, values: dict[str, Any], prepared: Prepare) -> None:
    row = Row(values, "docs/data.md")
    assert detect_format([row]) == format_
    conversation = convert(row, format_)
    if conversation.tools or any(message.reasoning for message in conversation.messages):
        return  # the stand-in template of these tests has neither
    data = prepared([values])
    assert len(data.train) == 1
    said = data.tokenizer.decode(data.train[0].ids[data.train[0].supervised].tolist(), skip_special=False)
    last = conversation.text if conversation.text is not None else conversation.messages[-1].content
    assert last is not None
    assert last in said


def test_every_format_is_documented() -> None:
    assert {name for name, _ in documented()} == {name for name in get_args(Format) if name != "auto"}


def test_the_table_of_templates_is_current(assets: Path) -> None:
    """Made anew by `scripts/chat_templates.py ../shared/assets/chat_templates`; making it checks every span in it."""
    assert (DOCS / "chat-templates.md").read_text("utf-8") == page(assets / "chat_templates")
