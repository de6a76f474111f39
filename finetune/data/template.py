"""Chat templates: messages → text. Which characters of it the model is to learn is found in `answers.py`.

A template is a program that came with a model, so it runs in Jinja's sandbox.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.conversation import Message
from finetune.data.jinja import TemplateRefusal
from finetune.data.limits import bounded, check_length
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


LONGEST = 2**20
"""Characters of a template. The longest of 70 real ones has 17,000."""


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
        from finetune.data.jinja import ChatEnvironment

        return self.compiled_in(ChatEnvironment(self.today))

    def compiled_in(self, environment: jinja2.Environment) -> jinja2.Template:
        """Raises BaseError for a template that is not Jinja, or too much of it."""
        import jinja2

        if len(self.source) > LONGEST:
            raise BaseError(
                f"the chat template has {len(self.source):,} characters; {LONGEST:,} are the most that is read",
                place=self.origin,
                hint="give another with `chat_template: chatml | plain | path.jinja`",
            )
        try:
            # Within bounds, because Jinja works out what is constant while it compiles.
            return bounded(self.origin, lambda: environment.from_string(self.source))
        except (BaseError, MemoryError):
            raise
        except Exception as error:  # Jinja's own errors, and what Python's compiler says to the code it made
            line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
            raise BaseError(
                f"the chat template is not valid Jinja: {_reason(error)}",
                place=f"{self.origin}:{line}" if line else self.origin,
                hint="give another with `chat_template: chatml | plain | path.jinja`",
            ) from error

    @cached_property
    def text_arguments(self) -> bool:
        """Whether it wants the arguments of a tool call as JSON text. Most want the object, and quote a text twice."""
        call = {"type": "function", "function": {"name": "f", "arguments": {"needle": "a"}}, "id": "abcdefghi"}
        messages = [Message("user", "a"), Message("assistant", "", (call,))]
        for as_text in (False, True):
            given = [message.as_dict(text_arguments=as_text) for message in messages]
            with contextlib.suppress(TemplateRefusal):
                if re.search(r"[^\\]\"?needle", self.render_dicts(self._compiled, given, (), False)):
                    return as_text
        return False

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation. Raises TemplateRefusal where the template refuses it."""
        return self.render_dicts(self._compiled, self.as_dicts(messages), tools, add_generation_prompt)

    def as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages in the form that this template reads."""
        as_text = any(message.tool_calls for message in messages) and self.text_arguments
        return [message.as_dict(text_arguments=as_text) for message in messages]

    def render_dicts(
        self,
        compiled: jinja2.Template,
        messages: list[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
    ) -> str:
        """Like `render`, of messages that are dicts already, in any environment (`compiled_in`).

        Raises BaseError, which ends the preparation, for a template that goes beyond `limits.py`.
        """
        from finetune.data.symbolic import Untracked

        def rendered() -> str:
            return compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) or None,
                documents=None,
                **self.special,
            )

        try:
            text = bounded(self.origin, rendered)
        except (BaseError, Untracked, MemoryError):
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            raise TemplateRefusal(_reason(error)) from error
        check_length(str.__len__(text), self.origin)  # of a symbol, its placeholder's
        return text


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


def training_version(template: ChatTemplate) -> ChatTemplate | None:
    """TRL's version of a template for training, if the template is, letter by letter, one that TRL has one of.

    TRL keeps them as `<name>.jinja` and `<name>_training.jinja`; they write every turn as the model is to write it,
    where its own template leaves out of earlier turns what a runtime does (Qwen3's and DeepSeek-R1's thinking).
    """
    found = importlib.util.find_spec("trl")  # finds it without importing it, which would load torch
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "chat_templates"
    for path in sorted(folder.glob("*_training.jinja")):
        own = path.with_name(path.name.replace("_training", ""))
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if own.read_text("utf-8").strip() == template.source.strip():
                origin = f"TRL's {path.name}"
                return ChatTemplate(path.read_text("utf-8"), template.special, origin, template.today)
    return None


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


def end_of_turn(template: ChatTemplate | None, tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """What ends an answer: ids to stop at, and the same as text (for runtimes that stop at strings).

    The end-of-turn text is the marker that the template writes after an answer, or, if it ends the last turn with
    nothing, before the next. The tokenizer's eos is always among the ids, since a base may fall back to it.
    """
    ids: list[int] = []
    texts: list[str] = []
    if template is not None:
        answer = "\u2063"
        said = [Message("user", "a"), Message("assistant", answer)]
        try:
            ending = template.render(said).rpartition(answer)[2].strip()
            if not ending:
                ending = _marker(template.render([*said, Message("user", "b")]).rpartition(answer)[2])
        except TemplateRefusal as reason:
            raise BaseError(
                f"the chat template refuses a plain question and answer: {reason}", place=template.origin
            ) from reason
        # Some write more after the last answer of all (Phi-3 an eos): the first marker ends the turn.
        for text in dict.fromkeys((_marker(ending), ending)):
            encoded = tokenizer.encode(text, special=False) if text else []
            if len(encoded) == 1:
                ids.append(encoded[0])
                texts.append(text)
                break
        else:
            texts += [ending] if ending else []
    eos = tokenizer.special.get("eos_token")
    eos_id = tokenizer.token_id(eos) if eos else None
    if eos and eos_id is not None and eos_id not in ids:
        ids.append(eos_id)
        texts.append(eos)
    return ids, texts


MARKER = re.compile(r"\s*([<\[][^<>\[\]]*[>\]])")
"""What ends a turn in chat templates: <|im_end|>, </s>, [/INST] and their like."""


def _marker(text: str) -> str:
    found = MARKER.match(text)
    return found[1] if found else ""
