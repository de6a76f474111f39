"""Chat templates: messages → text, and which characters of it the model is to learn.

A template is a program that came with a model, so it runs in Jinja's sandbox. Which part of its output is an answer is
found from the template itself, by rendering the conversation up to the answer and proving that this is a prefix of the
whole; never by searching for strings that a user could also have typed. What cannot be proven is an error.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.formats import Message
from finetune.data.tokenizer import Tokenizer
from finetune.errors import BaseError, DataError

if TYPE_CHECKING:
    import jinja2

CHATML = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)

PLAIN = (
    "{%- for message in messages -%}\n"
    "{%- if message['role'] == 'system' -%}\n"
    "{{- message['content'] + '\\n\\n' -}}\n"
    "{%- elif message['role'] == 'user' -%}\n"
    "{{- '### User:\\n' + message['content'] + '\\n\\n' -}}\n"
    "{%- else -%}\n"
    "{{- '### Assistant:\\n' + message['content'] + eos_token + '\\n\\n' -}}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '### Assistant:\\n' -}}\n"
    "{%- endif -%}\n"
)

Span = tuple[int, int]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may write."""

    source: str
    special: dict[str, str]
    origin: str
    """Where it came from, for messages: a path, `chatml`, `plain`."""
    today: datetime.datetime
    """What `strftime_now` tells a template: frozen, so that every row of a run is rendered on the same day."""

    @cached_property
    def _compiled(self) -> jinja2.Template:
        import jinja2

        try:
            return _environment(self.today).from_string(self.source)
        except Exception as error:  # Jinja's own errors, and what Python's compiler says to the code it made
            line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
            raise BaseError(
                f"the chat template is not valid Jinja: {_reason(error)}",
                place=f"{self.origin}:{line}" if line else self.origin,
                hint="give another with `chat_template: chatml | plain | path.jinja`",
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises TemplateRefusal where the template refuses it."""
        return self._render([message.as_dict() for message in messages], add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special,
            )
        except BaseError:
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            raise TemplateRefusal(_reason(error)) from error

    def render_whole(self, messages: Sequence[Message]) -> str:
        """The text to train on. Some templates leave out a system message without a word: what is lost is refused."""
        whole = self.render(messages)
        for number, message in enumerate(messages, 1):
            if message.role != "assistant" and message.content.strip() not in whole:
                raise TemplateRefusal(f"it leaves out or changes turn {number}, the {message.role}'s")
        return whole

    def render_with_answers(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text, and the span of characters of each assistant turn in it, its end-of-turn token included.

        A turn begins where the generation prompt ends, because from there on the model writes. Where a template's
        generation prompt says more than the turn does (some open a thinking block), it begins with the content, found
        by rendering the same conversation with another content. A turn ends where the conversation up to it ends, less
        the white space after the end-of-turn token, which nobody waits for.
        """
        whole = self.render_whole(messages)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            last = index == len(messages) - 1
            through = whole if last else self.render(messages[: index + 1])
            if not whole.startswith(through):
                raise TemplateRefusal(f"it writes turn {index + 1} differently once more turns follow")
            start = self._answer_start(messages, index, whole)
            end = len(through.rstrip())
            if end <= start:
                raise TemplateRefusal(f"it writes nothing for turn {index + 1}")
            if through[start:end].endswith(message.content.rstrip()):
                raise TemplateRefusal(
                    f"it ends turn {index + 1} without an end-of-turn token, so nothing learns to stop"
                )
            spans.append((start, end))
        return whole, spans

    def _answer_start(self, messages: Sequence[Message], index: int, whole: str) -> int:
        prompt = self.render(messages[:index], add_generation_prompt=True)
        if whole.startswith(prompt):
            return len(prompt)
        content = messages[index].content
        other = "\u2063" if content.lstrip()[:1] != "\u2063" else "\u2062"
        changed = [*messages[:index], Message("assistant", other + content), *messages[index + 1 :]]
        rendered = self.render(changed)
        start = next((i for i, (a, b) in enumerate(zip(whole, rendered, strict=False)) if a != b), None)
        # A template may strip the content's white space or leave it.
        if start is None or not whole.startswith((content.rstrip(), content.strip()), start):
            raise TemplateRefusal(f"where it puts the answer of turn {index + 1} cannot be proven")
        return start


class TemplateRefusal(BaseError):
    """Why a template cannot be used for a conversation; turned into a DataError where the row's place is known."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, hint="the chat template says so: change the conversation, or give another template")


def _reason(error: Exception) -> str:
    """What went wrong in a template, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def refusal(template: ChatTemplate, reason: TemplateRefusal, place: str) -> DataError:
    return DataError(
        f"the chat template ({template.origin}) refuses this conversation: {reason}",
        place=place,
        hint="change the row, or give another template with `chat_template: chatml | plain | path.jinja`",
    )


def choose_template(name: str | None, tokenizer: Tokenizer, today: datetime.datetime) -> ChatTemplate:
    """The template that a config names, or the base's own.

    Raises BaseError when the base has none and none is named, and when `chatml` is named for a base whose vocabulary
    lacks ChatML's tokens: it would be spelled out letter by letter, and generation would never stop.
    """
    origin = name or f"of {tokenizer.folder.name}"
    if name is None:
        if tokenizer.chat_template is None:
            raise BaseError(
                "the base has no chat template", place=str(tokenizer.folder), hint=_template_hint(tokenizer)
            )
        return ChatTemplate(tokenizer.chat_template, tokenizer.special, origin, today)
    if name == "chatml":
        if not _has_chatml(tokenizer):
            raise BaseError(
                "chat_template: chatml needs the tokens <|im_start|> and <|im_end|>, which this base does not have",
                place=str(tokenizer.folder),
                hint="use `chat_template: plain`",
            )
        return ChatTemplate(_with_bos(CHATML, tokenizer), tokenizer.special, origin, today)
    if name == "plain":
        if "eos_token" not in tokenizer.special:
            raise BaseError(
                "chat_template: plain needs the base to name an eos_token",
                place=str(tokenizer.folder),
                hint="give a template of your own: `chat_template: path.jinja`",
            )
        return ChatTemplate(_with_bos(PLAIN, tokenizer), tokenizer.special, origin, today)
    try:
        return ChatTemplate(Path(name).read_text("utf-8"), tokenizer.special, origin, today)
    except (OSError, UnicodeDecodeError) as error:
        raise BaseError("the chat template cannot be read", place=name, hint="it must be a text file") from error


def _template_hint(tokenizer: Tokenizer) -> str:
    if _has_chatml(tokenizer):
        return "add `chat_template: chatml` to the config: this base has its tokens"
    return "add `chat_template: plain` to the config (chatml needs tokens that this base does not have)"


def _has_chatml(tokenizer: Tokenizer) -> bool:
    return all(tokenizer.token_id(token) is not None for token in ("<|im_start|>", "<|im_end|>"))


def _with_bos(source: str, tokenizer: Tokenizer) -> str:
    """Begin with a BOS where the tokenizer puts one before every text."""
    bos = tokenizer.special.get("bos_token")
    puts_one = bos is not None and tokenizer.encode("a", special=True)[:1] == [tokenizer.token_id(bos)]
    return "{{- bos_token -}}\n" + source if puts_one else source


def _environment(today: datetime.datetime) -> jinja2.Environment:
    """Jinja as chat templates expect it (transformers' documentation: "Chat templates", advanced usage), sandboxed."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
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

    def raise_exception(message: Any = "") -> None:
        raise TemplateRefusal(" ".join(str(message).split()) or "it gives no reason")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    strftime_now: Callable[[str], str] = today.strftime
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def end_of_turn(template: ChatTemplate | None, tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """What ends an answer: ids to stop at, and the same as text (for runtimes that stop at strings).

    The end-of-turn text is what the template writes after an answer. The tokenizer's eos is always among the ids,
    since a base may fall back to it.
    """
    ids: list[int] = []
    texts: list[str] = []
    if template is not None:
        answer = "\u2063"
        try:
            whole = template.render([Message("user", "a"), Message("assistant", answer)])
        except TemplateRefusal as reason:
            raise BaseError(
                f"the chat template refuses a plain question and answer: {reason}", place=template.origin
            ) from reason
        ending = whole.rpartition(answer)[2].strip()
        if ending:
            texts.append(ending)
            encoded = tokenizer.encode(ending, special=False)
            if len(encoded) == 1:
                ids += encoded
    eos = tokenizer.special.get("eos_token")
    eos_id = tokenizer.token_id(eos) if eos else None
    if eos and eos_id is not None and eos_id not in ids:
        ids.append(eos_id)
        texts.append(eos)
    return ids, texts
