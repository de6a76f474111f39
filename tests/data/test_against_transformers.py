"""Our rendering and our ids against transformers' own, on real templates and real tokenizers.

The only module here that imports transformers, which takes seconds; the program itself does without it.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from finetune.data.answers import AnswerFinder
from finetune.data.conversation import Conversation, Message
from finetune.data.jinja import TemplateRefusal
from finetune.data.template import ChatTemplate, choose_template

from .conftest import cached_tokenizer

transformers = pytest.importorskip("transformers")

CONVERSATIONS = [
    [Message("user", "Where is Paris?"), Message("assistant", "In France.")],
    [
        Message("system", "Be brief."),
        Message("user", " Wo liegt Zürich? "),
        Message("assistant", "In der Schweiz.\n\n- am See 🙂\t"),
        Message("user", "日本語 <b>'quoted'</b>"),
        Message("assistant", "e\u0301 1234567 ..."),
    ],
]


@pytest.fixture(scope="module")
def templates(assets: Path) -> list[ChatTemplate]:
    """All real templates; compiling one is what takes the time, so once for all tests."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    paths = sorted((assets / "chat_templates").glob("*.jinja"))
    return [ChatTemplate(path.read_text("utf-8"), special, path.name, datetime.datetime.now()) for path in paths]


def test_every_template_renders_as_transformers_renders_it(templates: list[ChatTemplate]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    compared = 0
    for template in templates:
        for messages, prompt in [(m, p) for m in CONVERSATIONS for p in (False, True)]:
            said = messages[:-1] if prompt else messages
            dicts = [message.as_dict() for message in said]
            try:
                theirs = render_jinja_template(
                    conversations=[dicts],
                    chat_template=template.source,
                    add_generation_prompt=prompt,
                    **template.special,
                )[0][0]
            except Exception:
                with pytest.raises(TemplateRefusal):
                    template.render(said, add_generation_prompt=prompt)
                continue
            assert template.render(said, add_generation_prompt=prompt) == theirs, template.origin
            compared += 1
    assert compared > 0.8 * 4 * len(templates)


def test_every_template_shows_its_answers_or_says_why_not(templates: list[ChatTemplate]) -> None:
    works = 0
    for template in templates:
        try:
            rendered = AnswerFinder(template).render(Conversation(tuple(CONVERSATIONS[0]), "here"), [1])
        except TemplateRefusal:
            continue
        works += 1
        (answer,) = [rendered.text[begin:end] for begin, end in rendered.spans]
        assert "In France." in answer, template.origin
        assert not answer.endswith("In France."), template.origin
    assert works > 0.8 * len(templates)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("tokenizers/qwen2", None),
        ("tokenizers/phi-3", None),
        ("tokenizers/llama-bpe", "meta-llama-Llama-3.2-3B-Instruct.jinja"),
        ("tokenizers/gpt-2", "plain"),
        ("models/stories260K", "plain"),
    ],
)
def test_the_ids_are_those_of_transformers(assets: Path, folder: str, name: str | None) -> None:
    tokenizer = cached_tokenizer(assets / folder)
    if name and name.endswith(".jinja"):
        name = str(assets / "chat_templates" / name)
    template = choose_template(name, tokenizer, datetime.datetime.now())
    auto: Any = transformers.AutoTokenizer.from_pretrained(str(assets / folder), local_files_only=True)
    for messages in CONVERSATIONS:
        ours = tokenizer.encode(template.render(messages), special=False)
        theirs = auto.apply_chat_template(
            [message.as_dict() for message in messages],
            chat_template=template.source,
            tokenize=True,
            return_dict=False,
        )
        assert ours == theirs
    for text in ("Plain text.", " two  spaces", "e\u0301\n\n日本 🙂"):
        assert tokenizer.encode(text, special=True) == auto(text)["input_ids"]
