"""Where answers stand in a rendered conversation, on every real template, by symbols and by text."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.answers import MAX_OUTLINES, AnswerFinder, Rendered, _Concrete
from finetune.data.conversation import Conversation, Message
from finetune.data.jinja import TemplateRefusal
from finetune.data.template import ChatTemplate, training_version
from scripts.chat_templates import CALL, CONVERSATIONS

TODAY = datetime.datetime(2024, 7, 26, 12, 30)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TRL = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"  # type: ignore[union-attr,index]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL, "t.jinja", TODAY)


def ask(*said: str, system: str = "") -> Conversation:
    messages = [Message("system", system)] if system else []
    messages += [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(said)]
    return Conversation(tuple(messages), "here")


def spans(rendered: Rendered) -> list[str]:
    return [rendered.text[begin:end] for begin, end in rendered.spans]


def all_templates(assets: Path) -> Iterator[Path]:
    yield from sorted((assets / "chat_templates").glob("*.jinja"))
    yield from sorted(TRL.glob("*.jinja"))


class Finders(list[AnswerFinder]):
    """Many; hypothesis would print each."""

    def __repr__(self) -> str:
        return f"{len(self)} finders"


@pytest.fixture(scope="module")
def finders(assets: Path) -> Finders:
    """Each template, strictly where that proves a conversation of two exchanges, otherwise leniently."""
    found = Finders()
    for path in all_templates(assets):
        own = ChatTemplate(path.read_text("utf-8"), SPECIAL, path.name, TODAY)
        for lenient in (False, True):
            finder = AnswerFinder(own, lenient=lenient)
            try:
                finder.render(ask("a", "b", "c", "d"), [1, 3])
            except TemplateRefusal:
                continue
            found.append(finder)
            break
    return found


def test_nearly_all_templates_can_be_proven(finders: Finders, assets: Path) -> None:
    assert len(finders) >= 0.87 * len(list(all_templates(assets)))


# Contents that templates look for, strip, split or escape, among others that mean nothing to them.
TRICKY = ["</think>", "<think>", "\n", " ", '"', "{{ x }}", "<|im_end|>", "\\n", "<tool_call>", "日", "<b>&amp;", "%s"]
contents = st.lists(
    st.sampled_from([*TRICKY, "\x02"]) | st.text("abc. ", min_size=1, max_size=5), min_size=1, max_size=4
).map("".join)
four = st.lists(contents, min_size=4, max_size=4)
EVERY = 8
"""Each example takes every so many-th template, or it would take minutes."""


@given(first=four, then=four, system=contents, begin=st.integers(0, EVERY - 1))
@settings(max_examples=40)
def test_what_is_learnt_from_one_conversation_holds_for_the_next(
    finders: Finders, first: list[str], then: list[str], system: str, begin: int
) -> None:
    """The text is what the template renders, to the letter, and a span holds its answer: or the row is refused."""
    for finder in finders[begin::EVERY]:
        for conversation in (ask(*first), ask(*then), ask(*then, system=system), ask(*first[:2], system=system)):
            trained = conversation.trained("assistant")
            try:
                rendered = finder.render(conversation, trained)
            except TemplateRefusal:
                continue
            whole = finder.template.render(conversation.messages)
            assert rendered.text.startswith(whole), finder.template.origin
            closing = rendered.text[len(whole) :].strip()
            assert not closing or (finder._lenient and closing[0] in "<["), finder.template.origin
            for index, (at, _), said in zip(trained, rendered.spans, spans(rendered), strict=True):
                # Thinking may begin in the generation prompt, which ends where the span begins.
                around = "".join((whole[max(at - 60, 0) : at] + said).split())
                assert "".join(conversation.messages[index].content.split()) in around, finder.template.origin


@given(said=four, begin=st.integers(0, EVERY - 1))
@settings(max_examples=40)
def test_symbols_and_texts_prove_the_same(finders: Finders, said: list[str], begin: int) -> None:
    """Up to what a template puts before an answer of its own accord, such as an empty thinking block."""
    conversation = ask(*said)
    for finder in finders[begin::EVERY]:
        try:
            one = finder.render(conversation, [1, 3])
            other = _Concrete(finder.template, conversation).render([1, 3])
        except TemplateRefusal:
            continue
        if one.text == other.text:
            for mine, theirs in zip(spans(one), spans(other), strict=True):
                assert mine.strip().endswith(theirs.strip()), finder.template.origin


# -- what symbols follow ------------------------------------------------------------------------------------------

BODY = (
    "{{% for m in messages %}}[{{{{ m.role }}}}]{}[end]{{% endfor %}}"
    "{{% if add_generation_prompt %}}[assistant]{{% endif %}}"
)

FOLLOWED = [
    "{{ m.content }}",
    "{{ m['content'] | trim }}",
    "{{ m.content.strip() }}",
    "{{ ' ' + m.content + ' ' }}",
    "{{ 'a' ~ m.content ~ 1 }}",
    "{{ '%s' | format(m.content) if false else m.content }}",
    "{% set c = m.content %}{{ c }}",
    "{% set c %}<{{ m.content }}>{% endset %}{{ c | trim }}",
    "{% macro f(x) %}({{ x | trim }}){% endmacro %}{{ f(m.content) }}",
    "{{ ['x', m.content, 'y'] | join('-') }}",
    "{{ '-'.join(['x', m.content]) }}",
    "{{ m.content if m.content is string else 'no' }}",
    "{{ m.content if '</think>' in m.content else m.content + '!' }}",
    "{% if m.content.startswith('<') %}<{% endif %}{{ m.content }}",
    "{{ m.content | default('x') | string }}",
    "{{ m.content.split('</think>')[-1] if '</think>' in m.content else m.content }}",
    "{{ m.content.replace('a', 'b') if 'a' not in m.content else m.content }}",
    "{{ m.content[1:] if m.content[0] == '!' else m.content }}",
    "{% if m.content | length > 3 %}long{% endif %}{{ m.content }}",
    "{% if m.content == 'abc' %}same{% endif %}{{ m.content }}",
    "{% if 'x' == m.content or m.content in ['y', 'z'] %}one{% endif %}{{ m.content }}",
    "{% if m.content in 'abcabc' %}part{% endif %}{{ m.content }}",
    "{{ m.content | tojson }}",
    "{{ {'c': m.content} | tojson }}",
    "{{ m.content | upper if m.content | lower == m.content | upper else m.content }}",
    "{{ m | tojson }}",
    "{% for c in m.content %}{{ c }}{% endfor %}",
    "{{ m.content * 2 if false else m.content }}",
    "{{ '{}'.format(m.content) }}",
    "{{ '%s' % m.content }}",
    "{{ m.content | replace('\\n', ' ') if '\\n' not in m.content else m.content }}",
    "{{ m.content | e }}",
    "{% set ns = namespace(t='') %}{% set ns.t = ns.t + m.content %}{{ ns.t }}",
    "{{ (messages | map(attribute='content') | list)[loop.index0] }}",
    "{{ (m.content ~ 'x')[:-1] }}",
    "{% if m.content ~ 'x' == 'abcx' %}same{% endif %}{{ m.content }}",
    "{{ m.content }}{{ [m.content] | tojson }}",
    "{{ m.content }}{{ {'result': m.content} | tojson }}",
    "{{ m.content }}{% if m.content[4] %}LONG{% endif %}",
    "{{ m.content }}[{{ m.content[4] }}]",
    "{{ m.content }}{{ m.content.index('a') }}",
    "{{ m.content }}{{ m.content.split('a')[1] | default('none', boolean=true) }}",
    "{{ m.content }}{% if m.content in 'axxx' in ['axxx'] %}yes{% endif %}",
    "{{ m.content | safe + '<b>' }}",
    "{{ m.content }}{{ m.content | float }}",
]


@pytest.mark.parametrize("piece", FOLLOWED)
@given(said=st.lists(contents, min_size=6, max_size=6))
@settings(max_examples=12)
def test_whatever_a_template_does_with_a_content(piece: str, said: list[str]) -> None:
    """Conversations of one shape share what was learnt; each still comes out as the template itself would render it."""
    finder = AnswerFinder(template(BODY.format(piece)))
    for begin in (0, 2, 4, 0):
        conversation = ask(*said[begin : begin + 2])
        try:
            rendered = finder.render(conversation, [1])
        except TemplateRefusal:
            continue
        assert rendered.text == finder.template.render(conversation.messages)
        (answer,) = spans(rendered)
        assert answer.endswith("[end]")
        assert rendered.text.endswith(answer)


def test_one_rendering_serves_all_conversations_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = AnswerFinder(template(BODY.format("{{ m.content | trim }}")))
    finder.render(ask("a", "b"), [1])
    monkeypatch.setattr(ChatTemplate, "render_dicts", None)
    assert spans(finder.render(ask(" c ", "\nd"), [1])) == ["d[end]"]


def test_what_is_known_already_does_not_decide(assets: Path) -> None:
    """Rows that are refused, and shapes beyond those kept, leave the verdict on the others as it is."""
    source = (assets / "chat_templates" / "Qwen-Qwen3-0.6B.jinja").read_text("utf-8")

    def chat(number: int, early: int) -> Conversation:
        said = []
        for turn in range(6):
            thinks = (early >> turn & 1) if turn < 5 else number % 2
            said += [f"Q{number} {turn}", ("<think>\nhm\n</think>\n\n" if thinks else "") + f"A{number} {turn}"]
        return ask(*said)

    good, bad = [chat(number, 0) for number in range(6)], [chat(0, 1 + number) for number in range(20)]
    for order in ([*good, *bad], [*bad, *good]):
        finder = AnswerFinder(template(source), lenient=True)
        for conversation in order:
            if conversation in bad:
                with pytest.raises(TemplateRefusal):
                    finder.render(conversation, conversation.trained("assistant"))
            else:
                assert len(finder.render(conversation, conversation.trained("assistant")).spans) == 6


def test_a_template_that_asks_too_much_still_renders_right() -> None:
    finder = AnswerFinder(template(BODY.format("{% if m.content | length % 2 %}odd{% endif %}{{ m.content }}")))
    for length in range(1, 3 * MAX_OUTLINES):
        conversation = ask("q", "a" * length)
        assert finder.render(conversation, [1]).text == finder.template.render(conversation.messages)
    assert all(len(outlines) <= MAX_OUTLINES for outlines in finder._outlines.values())


# -- thinking, tools, what is trained --------------------------------------------------------------------------------

(CALLED,) = CONVERSATIONS["tool calls"]


@pytest.mark.parametrize(
    ("name", "call", "answer"),
    [
        (
            "Qwen-Qwen2.5-7B-Instruct",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "It is sunny.<|im_end|>",
        ),
        (
            "meta-llama-Llama-3.1-8B-Instruct",
            '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
            "It is sunny.<|eot_id|>",
        ),
        (
            "Mistral-Small-3.2-24B-Instruct-2506",
            '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}</s>',
            "It is sunny.</s>",
        ),
        (
            "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "It is sunny.<|im_end|>",
        ),
    ],
)
def test_tool_calls_are_learnt_and_results_are_not(assets: Path, name: str, call: str, answer: str) -> None:
    source = (assets / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    found = spans(AnswerFinder(template(source)).render(CALLED, CALLED.trained("assistant")))
    assert [text.strip() for text in found] == [call, answer]


def thinking(*pairs: tuple[str, str]) -> Conversation:
    messages: list[Message] = []
    for number, (thought, said) in enumerate(pairs):
        extra = (("reasoning_content", thought),)
        messages += [Message("user", f"Q{number}"), Message("assistant", said, extra=extra)]
    return Conversation(tuple(messages), "here")


def test_reasoning_is_learnt_where_the_template_writes_it(assets: Path) -> None:
    source = (assets / "chat_templates" / "Qwen-Qwen3-0.6B.jinja").read_text("utf-8")
    conversation = thinking(("Hm.", "Yes."))
    assert spans(AnswerFinder(template(source)).render(conversation, [1])) == [
        "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
    ]
    in_the_text = ask("Q", "<think>\nHm.\n</think>\n\nYes.")
    assert spans(AnswerFinder(template(source)).render(in_the_text, [1])) == [
        "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
    ]


@pytest.mark.parametrize("name", ["deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "Qwen-Qwen3-0.6B"])
def test_reasoning_that_a_template_leaves_out_is_an_error(assets: Path, name: str) -> None:
    source = (assets / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    conversation = ask("Q", "<think>\nHm.\n</think>\n\nYes.", "Q", "<think>\nHa.\n</think>\n\nNo.")
    for lenient in (False, True):
        with pytest.raises(TemplateRefusal, match=r"leaves out or changes the answer|writes turn 2 differently"):
            AnswerFinder(template(source), lenient=lenient).render(conversation, [1, 3])


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3", "qwen3_5_think"])
def test_trl_has_a_version_that_writes_all_of_it(name: str) -> None:
    own = template((TRL / f"{name}.jinja").read_text("utf-8"))
    training = training_version(own)
    assert training is not None
    found = spans(AnswerFinder(training).render(ask("Q", "Yes.", "Q", "No."), [1, 3]))
    assert ["Yes." in found[0], "No." in found[1]] == [True, True]
    last = AnswerFinder(own).render(ask("Q", "Yes."), [1]).text
    assert AnswerFinder(training).render(ask("Q", "Yes."), [1]).text == last or name == "deepseek_r1_distill"


def test_a_template_that_trl_does_not_know_has_no_training_version() -> None:
    assert training_version(template("{{ messages }}")) is None


def test_a_template_that_ends_a_turn_only_when_another_follows(assets: Path) -> None:
    """GLM's models stop at the next user's marker, so that is what they must learn to write."""
    source = (assets / "chat_templates" / "GLM-4.6.jinja").read_text("utf-8")
    finder = AnswerFinder(template(source), lenient=True)
    found = spans(finder.render(ask("a", "b", "c", "d"), [1, 3]))
    assert [text.rpartition("<|user|>")[1:] for text in found] == [("<|user|>", "")] * 2


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", [2, 4, 6]),
        ("last-assistant", [6]),
        ("completion", [4, 6]),
    ],
)
def test_which_messages_carry_loss(loss_on: str, expected: list[int]) -> None:
    messages: list[Any] = [Message("system", "S")]
    messages += [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    messages += [Message("assistant", "", (CALL,)), Message("tool", "d"), Message("assistant", "e")]
    assert Conversation(tuple(messages), "here").trained(loss_on) == expected


def test_a_weight_of_0_takes_a_message_out() -> None:
    messages = (
        Message("user", "a"),
        Message("assistant", "b", weight=0),
        Message("user", "c"),
        Message("assistant", "d"),
    )
    assert Conversation(messages, "here").trained("assistant") == [3]


def test_a_loss_on_all_leaves_no_message_out(assets: Path) -> None:
    source = (assets / "chat_templates" / "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja").read_text("utf-8")
    finder = AnswerFinder(template(source))
    assert finder.render(ask("a", "b", "c", "d"), None).spans == []
    with pytest.raises(TemplateRefusal, match="leaves out or changes turn 2, the assistant's"):
        finder.render(ask("a", "<think>hm</think>b", "c", "d"), None)
