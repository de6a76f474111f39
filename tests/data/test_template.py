"""Chat templates: real ones, and programs that mean harm."""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.answers import AnswerFinder
from finetune.data.conversation import Conversation, Message
from finetune.data.jinja import TemplateRefusal
from finetune.data.template import CHATML, PLAIN, ChatTemplate, choose_template, end_of_turn
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import BaseError, FinetuneError

TODAY = datetime.datetime(2024, 7, 26, 12, 30)
ASK = [Message("user", "Where is Paris?"), Message("assistant", "In France.")]
AGAIN = [*ASK, Message("user", "And Rome?"), Message("assistant", "In Italy.")]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "t.jinja", TODAY)


def answers(source: str, messages: list[Message]) -> list[str]:
    conversation = Conversation(tuple(messages), "here")
    rendered = AnswerFinder(template(source)).render(conversation, conversation.trained("assistant"))
    assert rendered.text == template(source).render(messages)
    return [rendered.text[begin:end] for begin, end in rendered.spans]


def refused(source: str, messages: list[Message]) -> str:
    with pytest.raises(TemplateRefusal) as caught:
        answers(source, messages)
    return str(caught.value)


# -- which part is the answer -------------------------------------------------------------------------------------

# Real templates of many kinds, and what they have the model write, with a system message before it where they take one.
REAL = {
    "Qwen-Qwen2.5-7B-Instruct": "{}<|im_end|>",
    "Qwen-QwQ-32B": "{}<|im_end|>",
    "meta-llama-Llama-3.1-8B-Instruct": "{}<|eot_id|>",
    "meta-llama-Llama-3.3-70B-Instruct": "{}<|eot_id|>",
    "google-gemma-4-31B-it": "{}<turn|>",
    "Mistral-Small-3.2-24B-Instruct-2506": "{}</s>",
    "HuggingFaceTB-SmolLM3-3B": "{}<|im_end|>",
    "ibm-granite-granite-3.3-2B-Instruct": "{}<|end_of_text|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "{}<｜end▁of▁sentence｜>",
    "moonshotai-Kimi-K2": "{}<|im_end|>",
    "LFM2-8B-A1B": "{}<|im_end|>",
    # What such models write before the answer is theirs to write too.
    "Kimi-K2-Thinking": "<think></think>{}<|im_end|>",
    "meetkai-functionary-medium-v3.2": "all\n{}<|eot_id|>",
    "upstage-Solar-Open-100B": "<|content|>{}<|end|>",
}


@pytest.mark.parametrize("name", REAL)
def test_real_templates(assets: Path, name: str) -> None:
    source = (assets / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    expected = [REAL[name].format("In France."), REAL[name].format("In Italy.")]
    assert answers(source, AGAIN) == expected
    assert answers(source, [Message("system", "Be brief."), *AGAIN]) == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("GLM-4.6", "it ends turn 2 without an end-of-turn token, so nothing learns to stop"),
        ("Qwen-Qwen3-0.6B", "it writes turn 2 differently once more turns follow"),
        ("google-gemma-2-2b-it", "System role not supported"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "it leaves out or changes turn 1, the system's"),
        ("CohereForAI-c4ai-command-r-plus-tool_use", "'NoneType' object is not iterable"),
    ],
)
def test_real_templates_that_cannot_be_proven(assets: Path, name: str, reason: str) -> None:
    source = (assets / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    messages = AGAIN if "system" not in reason.lower() else [Message("system", "Be brief."), *AGAIN]
    assert refused(source, messages) == reason


@pytest.mark.parametrize(
    "content", [" In France.", "\n\nIn France. \n", "In\n\nFrance", "\u2063x", "{{ 7 * 7 }}", "</think>x"]
)
@pytest.mark.parametrize(
    "name", ["Qwen-Qwen3-0.6B", "Qwen-Qwen2.5-7B-Instruct", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"]
)
def test_contents_that_templates_like_to_change(assets: Path, name: str, content: str) -> None:
    """The span holds the answer, or the conversation is refused: never something else."""
    source = (assets / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    try:
        (found,) = answers(source, [ASK[0], Message("assistant", content)])
    except TemplateRefusal:
        assert "</think>" in content
        return
    assert content.strip() in found or "</think>" in content


def test_leading_white_space_with_a_template_that_opens_a_thinking_block() -> None:
    """Where the generation prompt says more than the turn does, the answer is found by changing it."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    for content in ("x", " x", "\n\n x y "):
        assert answers(source, [ASK[0], Message("assistant", content)]) == [f"{content}[end]"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no, thanks') }}", "no, thanks"),
        ("{{ messages[9].content }}", "list object has no element 9"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{{ 'a' + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages[0].content }}", "it leaves out or changes the answer of turn 2"),
        ("fixed", "it leaves out or changes the answer of turn 2"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "it ends turn 2 without an end-of-turn token"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "it leaves out or changes turn 1"),
        (
            "{% for m in messages %}{{ m.content if m.role == 'user' else 'const' }}</s>{% endfor %}"
            "{% if add_generation_prompt %}?{% endif %}",
            "it leaves out or changes the answer of turn 2",
        ),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(source: str, reason: str) -> None:
    assert refused(source, ASK).startswith(reason)


def test_the_builtin_templates() -> None:
    assert template(CHATML).render(ASK) == (
        "<|im_start|>user\nWhere is Paris?<|im_end|>\n<|im_start|>assistant\nIn France.<|im_end|>\n"
    )
    assert template(PLAIN).render([Message("system", "Be brief."), *ASK]) == (
        "Be brief.\n\n### User:\nWhere is Paris?\n\n### Assistant:\nIn France.</s>\n\n"
    )
    assert template(PLAIN).render(ASK[:1], add_generation_prompt=True).endswith("\n\n### Assistant:\n")


def test_a_run_has_one_day() -> None:
    assert template("{{ strftime_now('%d %b %Y %H:%M') }}").render([]) == "26 Jul 2024 12:30"


def test_json_in_a_template_is_as_transformers_writes_it() -> None:
    source = "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}"
    assert template(source).render([Message("user", "é<'")]) == '{"content":"é<\'","role":"user"}'


# -- programs that mean harm --------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__self__.__class__ }}{{ strftime_now.__func__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ self._TemplateReference__context }}",
    "{{ ''['format_map'] }}{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ namespace(a=1).__class__.__bases__ }}",
    "{{ [].append(1) }}{% set _ = messages.append({}) %}",
    "{% set _ = messages[0].update({'content': 'x'}) %}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ open('/etc/passwd') }}",
    "{{ ''.join(range(10 ** 9)) }}",
    "{% for i in range(10 ** 12) %}x{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'x' | center(10 ** 30) }}",
    "{{ 'a' * 10 ** 30 }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ strftime_now(3) }}{{ strftime_now('\ud800') }}",
    "{{ tojson }}{{ messages | tojson(indent='x' * 9, separators=3) }}",
    "{{ raise_exception() }}",
    "{{ {} | tojson(default=raise_exception) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    try:
        text = template(source).render(ASK)
    except (TemplateRefusal, FinetuneError):
        return
    # What a forbidden attribute gives is nothing.
    assert all(word not in text for word in ("<class", "root:", "<function", "<module", "environ"))


def test_messages_are_not_changed_by_a_template() -> None:
    source = "{% set _ = messages.clear() %}"
    with pytest.raises(TemplateRefusal):
        template(source).render(ASK)


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x",
        "{% unknown %}",
        "{{ x | no_such_filter }}",
        "{% generation %}never ended",
        "{{ " + "(" * 2000 + ")" * 2000 + " }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{% if a %}" * 300 + "{% endif %}" * 300,
        "{{ " + "-" * 5000 + "1 }}",
    ],
)
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(BaseError) as caught:
        template(source).render(ASK)
    (problem,) = caught.value.problems
    assert problem.message.startswith("the chat template is not valid Jinja: ")
    assert problem.place is not None
    assert problem.place.startswith("t.jinja")
    assert problem.hint == "give another with `chat_template: chatml | plain | path.jinja`"


PIECES = ["{{", "}}", "{%", "%}", "messages", ".", "__class__", "[0]", "|", "tojson", "for m in", "if", "endfor", "set"]
PIECES += [" x ", "=", "(", ")", "'", "range", "~", "*", "9" * 12, "raise_exception", "strftime_now", "loop", "content"]
PIECES += ["generation", "endgeneration", "macro", "\n", "{#", "#}", "endif", "break", "'%d'", "namespace", "%", "-"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join))
def test_any_template_renders_or_is_refused(source: str) -> None:
    with contextlib.suppress(TemplateRefusal, FinetuneError):
        answers(source, ASK)


# -- which template, and what ends an answer ----------------------------------------------------------------------


def test_a_template_from_a_file(byte_base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_base)
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}</s>")
    assert choose_template(str(path), tokenizer, TODAY).render(ASK) == "Where is Paris?</s>"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BaseError, match="the chat template cannot be read"):
        choose_template(str(path), tokenizer, TODAY)


def test_what_ends_an_answer(byte_base: Path) -> None:
    tokenizer = load_tokenizer(byte_base)
    chatml = choose_template("chatml", tokenizer, TODAY)
    ids, texts = end_of_turn(chatml, tokenizer)
    assert texts == ["<|im_end|>", "</s>"]
    assert ids == [tokenizer.token_id("<|im_end|>"), tokenizer.token_id("</s>")]
    assert end_of_turn(None, tokenizer) == ([tokenizer.eos_id], ["</s>"])


# -- damaged tokenizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json: tokenizer.json cannot be read"),
        ("tokenizer.json", b"\xff", "tokenizer.json: tokenizer.json cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: is not a mapping"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}, 3], "bos_token": 3, "eos_token": {}}', ""),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot be read"),
    ],
)
def test_damaged_files(byte_base: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    for path in byte_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content)
    if not message:
        with pytest.raises(BaseError, match="the tokenizer has no eos_token"):
            _ = load_tokenizer(tmp_path).eos_id
        return
    with pytest.raises(BaseError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == f"{tmp_path}/{message}"
    assert caught.value.problems[0].hint


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_first_marker_ends_an_answer(byte_base: Path) -> None:
    """Phi-3 writes an eos after the last answer of all; GLM ends a turn only with the next one's marker."""
    tokenizer = load_tokenizer(byte_base)
    both = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}</s>"
    before = "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '' }}{{ m.content }}{% endfor %}"
    assert end_of_turn(template(both), tokenizer)[1] == ["<|im_end|>", "</s>"]
    assert end_of_turn(template(before), tokenizer)[1] == ["<|im_start|>", "</s>"]
