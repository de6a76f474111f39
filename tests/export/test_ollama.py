"""Modelfiles, and Go templates that say what chat templates say."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.data.conversation import Message
from finetune.data.template import CHATML, PLAIN, ChatTemplate
from finetune.errors import ExportError
from finetune.export.ollama import adapter_modelfile, modelfile, ollama_template

# -- Modelfiles ---------------------------------------------------------------------------------------------------


def test_the_least_a_modelfile_says() -> None:
    assert modelfile("m-q8_0.gguf") == "FROM ./m-q8_0.gguf\n"


def test_all_a_modelfile_says() -> None:
    text = modelfile(
        "m.gguf",
        stop=("<|im_end|>", "</s>"),
        system='Say "hi"!\nThen stop.',
        license_text="Apache-2.0",
        template="{{ .System }}\n",
    )
    assert text.splitlines() == [
        "FROM ./m.gguf",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "</s>"',
        'TEMPLATE """{{ .System }}',
        '"""',
        'SYSTEM """Say "hi"!',
        'Then stop."""',
        'LICENSE "Apache-2.0"',
    ]


def test_an_adapter_stands_beside_its_base() -> None:
    text = adapter_modelfile("llama3.2:3b", "lora.gguf", stop=("<|eot_id|>",), system="Be kind.")
    assert text == (
        'FROM llama3.2:3b\nADAPTER ./lora.gguf\nPARAMETER stop "<|eot_id|>"\nSYSTEM "Be kind."\n'
    )  # fmt: skip


@pytest.mark.parametrize("system", ['three """ marks', 'ends with "'])
def test_text_that_would_end_the_quotation_is_refused(system: str) -> None:
    with pytest.raises(ExportError, match="Modelfile"):
        modelfile("m.gguf", system=system)


@pytest.mark.parametrize("name", ["m.gguf\nSYSTEM evil", " m.gguf", "", "a\x00b"])
def test_a_name_that_would_be_more_than_a_name_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match="cannot name"):
        modelfile(name)
    with pytest.raises(ExportError, match="cannot name"):
        adapter_modelfile("llama3.2", name)


# -- Go templates -------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a template and a conversation (template/template.go, `Execute` and `collate`).

    Only the words of Go's language that our templates use: if/else if/else, range, eq, fields and texts.
    """
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    pieces = re.split(r"(\{\{ .*? \}\})", template, flags=re.DOTALL)
    tokens = iter(piece for piece in pieces if piece)
    tree, end = _parse(tokens)
    assert end is None
    return _run(tree, {"System": system, "Messages": messages})


def _parse(tokens: Iterator[str]) -> tuple[list[Any], str | None]:
    """Nodes until an `end` or `else` of this level, and that word."""
    nodes: list[Any] = []
    for token in tokens:
        action = _TOKEN.fullmatch(token)
        if action is None:
            assert "{{" not in token, token
            nodes.append(("text", token))
            continue
        word, _, rest = action[1].partition(" ")
        if word in ("end", "else"):
            return nodes, action[1]
        if word in ("if", "range"):
            nodes.append((word, rest, *_branches(tokens)))
        elif word.startswith('"'):
            nodes.append(("text", json.loads(action[1])))  # these texts are both JSON's and Go's
        else:
            nodes.append(("field", word))
    return nodes, None


def _branches(tokens: Iterator[str]) -> tuple[list[Any], list[Any]]:
    first, word = _parse(tokens)
    if word == "end":
        return first, []
    assert word is not None
    if word.startswith("else if "):
        return first, [("if", word.removeprefix("else if "), *_branches(tokens))]
    second, word = _parse(tokens)
    assert word == "end"
    return first, second


def _run(nodes: list[Any], dot: dict[str, Any]) -> str:
    out = ""
    for kind, what, *branches in nodes:
        if kind == "text":
            out += what
        elif kind == "field":
            out += _value(what, dot)
        elif kind == "if":
            out += _run(branches[0] if _value(what, dot) else branches[1], dot)
        else:
            for item in _value(what, dot):
                out += _run(branches[0], {"Role": item["role"], "Content": item["content"]})
    return out


def _value(expression: str, dot: dict[str, Any]) -> Any:
    if match := re.fullmatch(r'eq (\.\w+) "(\w+)"', expression):
        return _value(match[1], dot) == match[2]
    return dot[expression.removeprefix(".")]


def test_the_evaluator_does_what_go_does() -> None:
    source = '{{ if .System }}S={{ .System }};{{ else }}none;{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}'
    source += 'U{{ .Content }}{{ else if eq .Role "assistant" }}A{{ .Content }}{{ "{{" }}{{ end }}{{ end }}.'
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert go(source, said) == "none;UqAa{{."
    assert go(source, [{"role": "system", "content": "s"}, *said]) == "S=s;UqAa{{."


LLAMA3 = (
    "{{- bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' }}"
)
BRACES = CHATML + "{{ '{\"answer\": {{\\n' }}"

MADE = {"chatml": CHATML, "plain": PLAIN, "llama3": LLAMA3, "llama2": LLAMA2, "mistral": MISTRAL, "zephyr": ZEPHYR}
MADE["braces"] = BRACES
REAL = [
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "microsoft-Phi-3.5-mini-instruct",
    "google-gemma-2-2b-it",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
]
SAID = ["First\nquestion {{ x }}?", "An answer.", "And \"then\"?", "Ünd 你好.", "Last?"]  # fmt: skip


def chat_template(source: str) -> ChatTemplate:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, special, "a template", datetime.datetime(2026, 5, 4))


def conversations(system: bool) -> Iterator[list[Message]]:
    for count in (1, 3, 5):
        turns = [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(SAID[:count])]
        yield turns
        if system:
            yield [Message("system", "You are\nkind."), *turns]


def assert_same(template: ChatTemplate, source: str, adds_bos: bool, system: bool) -> None:
    for messages in conversations(system):
        expected = template.render(messages, add_generation_prompt=True)
        if adds_bos:
            expected = expected.removeprefix("<s>")
        assert go(source, [message.as_dict() for message in messages]) == expected


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", MADE)
def test_a_go_template_gives_the_text_of_the_chat_template(name: str, adds_bos: bool) -> None:
    template = chat_template(MADE[name])
    assert_same(template, ollama_template(template, adds_bos=adds_bos), adds_bos, system=name != "mistral")


def test_only_the_first_bos_is_left_to_the_runtime() -> None:
    template = chat_template(LLAMA2)
    source = ollama_template(template, adds_bos=True)
    assert source.count("<s>") == 1  # between an answer and the next question
    assert_same(template, source, adds_bos=True, system=True)


@pytest.mark.parametrize("name", REAL)
def test_real_chat_templates_in_go(assets: Path, name: str) -> None:
    template = chat_template((assets / "chat_templates" / f"{name}.jinja").read_text())
    source = ollama_template(template, adds_bos=True)
    assert_same(template, source, adds_bos=True, system="gemma-2" not in name)


def test_a_system_message_that_the_template_refuses_begins_the_first_question() -> None:
    source = ollama_template(chat_template(MISTRAL), adds_bos=True)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert go(source, messages) == "[INST] Be kind.\n\nHi [/INST]"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}{% endfor %}",  # counts
        "{% for m in messages %}{{ m.role ~ ':' ~ m.content|upper }}{% endfor %}",  # changes texts
        "{{ messages[-1].content }}",  # forgets
        "{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}",  # repeats
        "{% for m in messages %}{{ m.content ~ ('.' if m.content|length > 9 else '!') }}{% endfor %}",  # looks inside
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",  # drops system
    ],
)
def test_a_chat_template_that_no_go_template_matches_is_refused(source: str) -> None:
    with pytest.raises(ExportError, match="Ollama's language") as caught:
        ollama_template(chat_template(source), adds_bos=True)
    assert caught.value.problems[0].place == "a template"


def test_mistrals_system_message_in_the_last_question_is_refused(assets: Path) -> None:
    source = (assets / "chat_templates" / "mistralai-Mistral-Nemo-Instruct-2407.jinja").read_text()
    with pytest.raises(ExportError, match="Ollama's language"):
        ollama_template(chat_template(source), adds_bos=True)
