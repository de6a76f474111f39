"""Which characters of a rendered conversation are answers: where the model's own writing begins and ends.

An answer begins where the generation prompt ends, because from there on the model writes; where a template's generation
prompt says more than the turn does (some open a thinking block), it begins with the answer's own first text. It ends
where the conversation up to it ends, less the white space after the end-of-turn token, which nobody waits for. Both are
proven: rendering the conversation up to there gives a prefix of the whole. Never is a string searched for that a user
could also have typed. What cannot be proven is a `TemplateRefusal`.

A template that writes a turn differently once more turns follow (Qwen3 takes the thinking out of earlier ones) has no
such prefix. `lenient` then takes the turn as the whole conversation has it: from where its text comes out to the same
end-of-turn token as the turn has when it is the last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from finetune.data.conversation import REASONING, Conversation, Message
from finetune.data.jinja import TemplateRefusal
from finetune.data.limits import bounded, check_length
from finetune.data.symbolic import (
    Condition,
    Content,
    Part,
    Same,
    Session,
    SymbolicEnvironment,
    Untracked,
    grows,
    whole,
)
from finetune.data.template import MARKER, ChatTemplate
from finetune.errors import BaseError

Span = tuple[int, int]

MAX_OUTLINES = 16
"""Of one shape of conversation, with what they depend on. Beyond that, looking for the right one is the slower way."""

MAX_SHAPES = 2000


REPEATED = 8
"""Parts for each of a conversation's texts. With more, an outline is filled within bounds."""

NEXT = Content(-1)
"""A user's turn that is not there, to see what a template writes before it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[Span]
    """Begin and end, in characters, of each answer that is trained on."""
    contents: list[Span]
    """Where the texts of messages other than the system's stand: what makes the row different from others."""


@dataclass(frozen=True)
class _Outline:
    """A rendered conversation with its contents left open, for all conversations that meet the conditions."""

    parts: tuple[Part, ...]
    answers: tuple[tuple[int, int], ...]
    """First part of each answer, and the part after its last."""
    contents: tuple[int, ...]
    """The parts that come from messages other than the system's."""
    conditions: tuple[Condition | Same, ...]
    checks: tuple[tuple[int, int, int, str], ...]
    """(number of a text, first part, part after the last, complaint): texts that were changed on the way, to be looked
    for in what came out there."""
    origin: str
    """The template, for messages."""
    grows: bool
    """Whether what comes out can be much longer than the contents are."""

    def attempt(self, values: Sequence[str]) -> Rendered | None:
        """The conversation with these texts, or None where the outline does not fit it."""
        try:
            return bounded(self.origin, lambda: self._attempt(values)) if self.grows else self._attempt(values)
        except BaseError:
            raise
        except Exception:  # what an operation does to another text, such as ask for a character that it has not
            return None

    def fill(self, values: Sequence[str]) -> Rendered:
        return bounded(self.origin, lambda: self._fill(values))

    def _attempt(self, values: Sequence[str]) -> Rendered | None:
        return self._fill(values) if all(condition.holds(values) for condition in self.conditions) else None

    def _fill(self, values: Sequence[str]) -> Rendered:
        texts = [part if isinstance(part, str) else part.of(values) for part in self.parts]
        begins = [0, *accumulate(map(len, texts))]
        check_length(begins[-1], self.origin)
        spans = [(begins[first], begins[after]) for first, after in self.answers]
        for index, first, after, complaint in self.checks:
            if not _appears(values[index], "".join(texts[first:after])):
                raise TemplateRefusal(complaint)
        contents = [(begins[number], begins[number + 1]) for number in self.contents]
        return Rendered("".join(texts), spans, contents)


class AnswerFinder:
    """Renders conversations with their answers; what it learns about a shape serves all conversations of that shape."""

    def __init__(self, template: ChatTemplate, *, lenient: bool = False) -> None:
        self.template, self._lenient = template, lenient
        self._environment = SymbolicEnvironment(template.today)
        self._compiled = template.compiled_in(self._environment)
        self._outlines: dict[Any, list[_Outline]] = {}

    def render(self, conversation: Conversation, trained: Sequence[int] | None) -> Rendered:
        """The text, and the spans of the messages whose indices are `trained`. Raises TemplateRefusal.

        With None, for a loss on all of the text, there are no spans, but no message may be left out.
        """
        messages = conversation.messages
        values: list[str] = []
        shape: list[Any] = []
        shareable = not conversation.tools
        for message in messages:
            shape.append(message.role)
            if message.content:
                shape.append(len(values))
                values.append(message.content)
            for name, text in message.extra:
                shape.append(name)
                if name in REASONING:
                    values.append(text)
                else:
                    shape.append(text)
            if message.tool_calls:
                shareable = False
        key = (*shape, None, *(trained if trained is not None else (None,)))
        known = self._outlines.get(key, ())
        if shareable:
            for outline in known:
                if (found := outline.attempt(values)) is not None:
                    return found
        # What is known already must not matter for what comes out, only for how long it takes: with all places taken,
        # the conversation is proven like the others.
        try:
            outline = _Symbolic(self.template, self._environment, self._compiled, conversation, values).outline(
                trained, lenient=self._lenient
            )
        except Untracked:
            return _Concrete(self.template, conversation).render(trained)
        rendered = outline.fill(values)
        if shareable and len(known) < MAX_OUTLINES and len(self._outlines) < MAX_SHAPES:
            self._outlines.setdefault(key, []).append(outline)
        return rendered


class _Symbolic:
    """The proof on symbols, for one conversation and all that are like it."""

    def __init__(
        self,
        template: ChatTemplate,
        environment: SymbolicEnvironment,
        compiled: Any,
        conversation: Conversation,
        values: Sequence[str],
    ) -> None:
        self._template, self._compiled, self._conversation = template, compiled, conversation
        self._session = environment.session = Session(values)
        self._dicts = template.as_dicts(conversation.messages)
        self._contents: list[dict[str, int]] = []
        count = 0
        for message, fields in zip(conversation.messages, self._dicts, strict=True):
            found = {}
            for name in ("content", *(name for name, _ in message.extra if name in REASONING)):
                if fields[name]:
                    fields[name] = self._session.symbol(Content(count))
                    found[name] = count
                    count += 1
            self._contents.append(found)

    def _render(self, turns: int, add_generation_prompt: bool = False) -> list[Part]:
        text = self._template.render_dicts(
            self._compiled, self._dicts[:turns], self._conversation.tools, add_generation_prompt
        )
        return self._session.parts(str.__str__(text))

    def outline(self, trained: Sequence[int] | None, *, lenient: bool) -> _Outline:
        messages = self._conversation.messages
        everything, trained = trained is None, trained or ()
        full = self._render(len(messages))
        if lenient and len(messages) - 1 in trained and not self._ending(full, len(messages) - 1):
            full = [*full, self._closing(full)]
        cuts = []
        for index in trained:
            through = full if index == len(messages) - 1 else self._render(index + 1)
            cuts.append((self._begin(full, index), self._end(full, through, index, lenient)))
        parts, places = _cut(full, sorted({cut for pair in cuts for cut in pair}))
        answers = tuple((places[begin], places[end]) for begin, end in cuts)
        checks = self._checks(parts, dict(zip(trained, answers, strict=True)), everything)
        # What was asked about the question that `_closing` made up is nobody's.
        asked = [condition for condition in self._session.conditions if NEXT.index not in condition.sources()]
        conditions = tuple(dict.fromkeys(asked))
        return _Outline(
            tuple(parts),
            answers,
            self._contents_of(parts),
            conditions,
            tuple(checks),
            self._template.origin,
            grows=len(parts) > REPEATED * (len(self._session.values) + 1) or any(map(grows, (*parts, *conditions))),
        )

    def _begin(self, full: list[Part], index: int) -> Cut:
        prompt = self._render(index, add_generation_prompt=True)
        found = self._after(full, prompt)
        if found is not None:
            return found
        own = set(self._contents[index].values())
        first = next((n for n, part in enumerate(full) if not isinstance(part, str) and part.sources() & own), None)
        if first is None and own:
            raise TemplateRefusal(_left_out(index + 1, "assistant", True))
        if first is None:
            return self._parting(full, prompt, index)
        return (first, 0)

    def _parting(self, full: list[Part], prompt: list[Part], index: int) -> Cut:
        """For a turn without a text of its own (tool calls): where it and the generation prompt part.

        Up to there both agree, so it is what the model is given; the cut is put after the last whole marker or line.
        """
        before = self._after(full, self._render(index))
        same = 0
        while same < min(len(full), len(prompt)) and self._session.same(full[same], prompt[same]):
            same += 1
        one, other = full[same : same + 1], prompt[same : same + 1]
        common = (
            _common(one[0], other[0]) if one and other and isinstance(one[0], str) and isinstance(other[0], str) else ""
        )
        cut = max(common.rfind(mark) for mark in (">", "]", "\n")) + 1
        if before is None or not cut or (same, cut) < before:
            raise TemplateRefusal(f"where it puts the answer of turn {index + 1} cannot be proven")
        return (same, cut)

    def _last(self, parts: Sequence[Part], index: int) -> int:
        """The number of the last part that comes from a message, or -1."""
        own = set(self._contents[index].values())
        return max((n for n, p in enumerate(parts) if not isinstance(p, str) and p.sources() & own), default=-1)

    def _ending(self, through: Sequence[Part], index: int) -> str:
        """What a template writes after the last message of a conversation."""
        tail = through[-1] if through else ""
        return tail.rstrip() if isinstance(tail, str) and self._last(through, index) in (-1, len(through) - 2) else ""

    def _closing(self, full: Sequence[Part]) -> str:
        """What ends a turn in a template that only ends it when another follows: the first marker after it.

        (GLM's models stop at the next `<|user|>`; Apertus' template leaves the last turn open to be gone on with.)
        """
        self._dicts.append({"role": "user", "content": self._session.symbol(NEXT)})
        longer = self._render(len(self._dicts))
        self._dicts.pop()
        last = self._last(longer, len(self._conversation.messages) - 1)
        following = longer[last + 1] if 0 <= last < len(longer) - 1 else ""
        found = MARKER.match(following) if isinstance(following, str) else None
        if found is None:
            turn = len(self._conversation.messages)
            raise TemplateRefusal(f"it ends turn {turn} without an end-of-turn token, so nothing learns to stop")
        return found.group()

    def _end(self, full: list[Part], through: list[Part], index: int, lenient: bool) -> Cut:
        turn = index + 1
        if self._contents[index]:
            if self._last(through, index) < 0:
                raise TemplateRefusal(_left_out(turn, "assistant", True))
            if not self._ending(through, index) and not lenient:
                raise TemplateRefusal(f"it ends turn {turn} without an end-of-turn token, so nothing learns to stop")
        ending = self._ending(through, index)
        if ending and self._after(full, through) is not None:
            found = self._after(full, [*through[:-1], ending])
            assert found is not None, "a prefix of a prefix is one"
            return found
        last = self._last(full, index)
        if lenient and last >= 0:
            following = full[last + 1] if last + 1 < len(full) else ""
            if not ending:
                ending = self._closing(through)
            common = _common(ending, following) if isinstance(following, str) else ""
            # What ends a turn is a marker such as <|im_end|>; what both go on with after it may be half of one.
            marker = common[: max(common.rfind(">"), common.rfind("]")) + 1]
            if marker:
                return (last + 1, len(marker))
        raise TemplateRefusal(f"it writes turn {turn} differently once more turns follow")

    def _after(self, full: Sequence[Part], prefix: Sequence[Part]) -> Cut | None:
        """Where `prefix` ends in `full`, if it is one."""
        if not prefix:
            return (0, 0)
        *before, last = prefix
        if len(full) <= len(before) or not all(map(self._session.same, full, before)):
            return None
        at = full[len(before)]
        if isinstance(last, str) and isinstance(at, str) and at.startswith(last):
            return (len(before), len(last))
        return (len(before) + 1, 0) if not isinstance(last, str) and self._session.same(at, last) else None

    def _checks(
        self, parts: Sequence[Part], answers: dict[int, tuple[int, int]], everything: bool
    ) -> list[tuple[int, int, int, str]]:
        """Nothing may be left out: neither what an answer depends on nor any of what is trained."""
        found = []
        for index, (message, contents) in enumerate(zip(self._conversation.messages, self._contents, strict=True)):
            trained = index in answers
            if message.role == "assistant" and not trained and not everything:
                continue  # an earlier answer that is not trained on may stand there as the template has it
            first, after = answers.get(index, (0, len(parts)))
            # The generation prompt may hold the beginning of what the data says, such as <think>.
            while trained and first > 0 and isinstance(parts[first - 1], str):
                first -= 1
            within = [part for part in parts[first:after] if not isinstance(part, str)]
            for name, number in contents.items():
                if any(whole(part) and part.sources() == {number} for part in within):
                    continue
                complaint = _left_out(index + 1, message.role, trained, name)
                if not any(number in part.sources() for part in within):
                    raise TemplateRefusal(complaint)
                found.append((number, first, after, complaint))
        return found

    def _contents_of(self, parts: Sequence[Part]) -> tuple[int, ...]:
        system = {
            number
            for message, contents in zip(self._conversation.messages, self._contents, strict=True)
            if message.role == "system"
            for number in contents.values()
        }
        return tuple(n for n, part in enumerate(parts) if not isinstance(part, str) and part.sources() - system)


Cut = tuple[int, int]
"""A place in a list of parts: the number of a part, and the characters of it (if it is a literal) before the place."""


def _common(a: str, b: str) -> str:
    """What both begin with."""
    return a[: next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _cut(full: Sequence[Part], cuts: Sequence[Cut]) -> tuple[list[Part], dict[Cut, int]]:
    """The parts with literals divided at the cuts, and the number of the part that begins at each cut."""
    parts: list[Part] = []
    places: dict[Cut, int] = {}
    for number, part in enumerate(full):
        offsets = [offset for at, offset in cuts if at == number]
        begin = 0
        for offset in offsets:
            if isinstance(part, str) and offset > begin:
                parts.append(part[begin:offset])
                begin = offset
            places[number, offset] = len(parts)
        if not isinstance(part, str):
            parts.append(part)
        elif begin < len(part):
            parts.append(part[begin:])
    for at, offset in cuts:
        if at >= len(full):
            places[at, offset] = len(parts)
    return parts, places


def _left_out(turn: int, role: str, trained: bool, name: str = "content") -> str:
    if trained:
        what = "the answer" if name == "content" else "the reasoning"
        return f"it leaves out or changes {what} of turn {turn}"
    return f"it leaves out or changes turn {turn}, the {role}'s"


class _Concrete:
    """The same proof on the texts of one conversation, for templates that do what symbols cannot follow."""

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self._template, self._conversation = template, conversation

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._template.render(
            messages, tools=self._conversation.tools, add_generation_prompt=add_generation_prompt
        )

    def render(self, trained: Sequence[int] | None) -> Rendered:
        messages = self._conversation.messages
        full = self._render(messages)
        everything, trained = trained is None, trained or ()
        for number, message in enumerate(messages, 1):
            if (message.role != "assistant" or everything) and not _appears(message.content, full):
                raise TemplateRefusal(_left_out(number, message.role, False))
        spans: list[Span] = []
        for index in trained:
            message = messages[index]
            through = full if index == len(messages) - 1 else self._render(messages[: index + 1])
            if not full.startswith(through):
                raise TemplateRefusal(f"it writes turn {index + 1} differently once more turns follow")
            start, end = self._start(index, full), len(through.rstrip())
            if end <= start:
                raise TemplateRefusal(f"it writes nothing for turn {index + 1}")
            said = full[start:end]
            for name, text in (("content", message.content), *message.extra):
                if name in ("content", *REASONING) and not _appears(text, said):
                    raise TemplateRefusal(_left_out(index + 1, message.role, True, name))
            if message.content and said.endswith((message.content.rstrip(), json.dumps(message.content))):
                raise TemplateRefusal(
                    f"it ends turn {index + 1} without an end-of-turn token, so nothing learns to stop"
                )
            spans.append((start, end))
        return Rendered(full, spans, list(_found(messages, full)))

    def _start(self, index: int, full: str) -> int:
        messages = self._conversation.messages
        prompt = self._render(messages[:index], add_generation_prompt=True)
        if full.startswith(prompt):
            return len(prompt)
        message = messages[index]
        content = message.content
        other = "\u2063" if content.lstrip()[:1] != "\u2063" else "\u2062"
        changed = [*messages[:index], Message("assistant", other + content, message.tool_calls, message.extra)]
        rendered = self._render([*changed, *messages[index + 1 :]])
        start = next((i for i, (a, b) in enumerate(zip(full, rendered, strict=False)) if a != b), None)
        # A template may strip the content's white space or leave it.
        if start is None or not content or not full.startswith((content.rstrip(), content.strip()), start):
            raise TemplateRefusal(f"where it puts the answer of turn {index + 1} cannot be proven")
        return start


def _found(messages: Sequence[Message], full: str) -> Iterator[Span]:
    """About where the texts of messages stand, in order: good enough to compare rows by, not to train on."""
    begin = 0
    for message in messages:
        text = message.content.strip()
        at = full.find(text, begin) if text and message.role != "system" else -1
        if at >= 0:
            begin = at + len(text)
            yield (at, begin)


def _appears(text: str, where: str) -> bool:
    """Whether a text came out, as it is or quoted as JSON, white space aside."""
    bare = "".join(where.split())
    return any("".join(form.split()) in bare for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]))
