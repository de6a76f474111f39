"""What Ollama wants to know beside a GGUF file: a Modelfile, and a chat template in its own language.

Pure functions. The text of either was checked against Ollama's source and documentation, which each docstring names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.errors import ExportError

if TYPE_CHECKING:
    from finetune.data.conversation import Message
    from finetune.data.template import ChatTemplate

# -- Ollama: the Modelfile ----------------------------------------------------------------------------------------


def modelfile(
    gguf: str,
    *,
    stop: Sequence[str] = (),
    system: str | None = None,
    license_text: str | None = None,
    template: str | None = None,
) -> str:
    """The Modelfile that makes an Ollama model of a GGUF file in the same folder.

    gguf          the file's name
    stop          the tokens that end an answer, as text
    system        a system prompt for conversations that bring none
    license_text  the licence of the merged model; leave it out where it is not known
    template      `ollama_template`. Mostly left out: Ollama takes the chat template from the GGUF file if it knows it

    Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx. Raises ExportError for text it cannot hold.
    """
    return _modelfile([f"FROM ./{_line(gguf)}"], stop, system, license_text, template)


def adapter_modelfile(
    base: str,
    adapter: str,
    *,
    stop: Sequence[str] = (),
    system: str | None = None,
    template: str | None = None,
) -> str:
    """The Modelfile of a base with an adapter that stays apart.

    base     a model that Ollama has (`llama3.2:3b`) or a GGUF file (`./base.gguf`): the one that was trained on, since
             an adapter on another base is noise
    adapter  the name of the GGUF LoRA file in the same folder

    The rest is as in `modelfile`; without `stop` and `template`, what the base's model says stays in force. Ollama
    creates such a model of any architecture, but its own engine, which runs the newer ones, then answers "loras are not
    yet implemented" (runner/ollamarunner/runner.go): a merged file is the surer way.
    """
    return _modelfile([f"FROM {_line(base)}", f"ADAPTER ./{_line(adapter)}"], stop, system, None, template)


def _modelfile(
    lines: list[str], stop: Sequence[str], system: str | None, license_text: str | None, template: str | None
) -> str:
    lines = lines + [f"PARAMETER stop {_quoted(token)}" for token in stop]
    for word, text in (("TEMPLATE", template), ("SYSTEM", system), ("LICENSE", license_text)):
        if text:
            lines.append(f"{word} {_quoted(text)}")
    return "\n".join(lines) + "\n"


def _line(name: str) -> str:
    if not name or not name.isprintable() or name != name.strip():
        raise ExportError(f"a Modelfile cannot name this: {name!r}", hint="rename the file")
    return name


def _quoted(text: str) -> str:
    """A value in quotation marks. The format has no escapes: what stands between the marks is taken as it is."""
    if '"""' in text or text.endswith('"'):
        raise ExportError(f"a Modelfile cannot hold this text: {text[:60]!r}", hint='avoid """ and a closing "')
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


# -- Ollama: its own template language ----------------------------------------------------------------------------

_S, _U, _A, _V, _B, _W = "Sysxq", "Usexq", "Ansxq", "Vsexq", "Bnsxq", "Wsexq"
"""Texts that no template contains."""

_PROBES = ("One line", "Two\n\nparagraphs: a {{ b }}, <c> & `d`", "Grüße, 你好 🙂", "4 \\ 5 \"six\" 'seven'", "8")


@dataclass(frozen=True)
class _Shape:
    """The texts between the messages. What ChatML, Llama 2 and 3, Mistral, Gemma, Phi-3, Zephyr and their like have in
    common: each stays the same wherever it stands."""

    opening: str
    """Before the first question, if there is no system message. Often holds a default one."""
    before_system: str
    after_system: str
    """From the system message to the first question."""
    middle: str
    """From a question to its answer."""
    following: str
    """From an answer to the next question."""
    closing: str
    """From the last question to where the model goes on."""

    def go(self) -> str:
        """As a Go template (https://pkg.go.dev/text/template). Ollama gives `.System`, all system messages as one
        text, and `.Messages` with `.Role` and `.Content` (template/template.go, `Execute`)."""
        start = f"{_literal(self.before_system)}{{{{ .System }}}}{_literal(self.after_system)}"
        answer = f"{_literal(self.middle)}{{{{ .Content }}}}{_literal(self.following)}"
        return (
            f"{{{{ if .System }}}}{start}{{{{ else }}}}{_literal(self.opening)}{{{{ end }}}}"
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}{_literal(self.closing)}'
        )

    def text(self, messages: Sequence[Message]) -> str:
        """What that Go template gives for a conversation that ends with a question."""
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        parts = [f"{self.before_system}{system}{self.after_system}" if system else self.opening]
        for message in messages:
            if message.role == "user":
                parts.append(message.content)
            elif message.role == "assistant":
                parts.append(f"{self.middle}{message.content}{self.following}")
        return "".join(parts) + self.closing


def ollama_template(template: ChatTemplate, *, adds_bos: bool) -> str:
    """The Go template that gives the text which the chat template gives, for `ollama create`.

    adds_bos  whether the GGUF file has runtimes put the BOS before every text (`tokenizer.ggml.add_bos_token`)

    It is made from what the chat template writes around messages, and compared with it on conversations with and
    without a system message. What it does not do: trim the spaces around a message, show tools, take thoughts out of
    earlier answers, go on with an answer that was begun. To a chat template that refuses system messages, one becomes
    the beginning of the first question, as Gemma 3's own template has it.

    Raises ExportError where no such template gives the same text, BaseError where the chat template refuses a plain
    conversation.
    """
    from finetune.data.jinja import TemplateRefusal

    bos = template.special.get("bos_token", "") if adds_bos else ""

    def render(messages: Sequence[Message]) -> str:
        return template.render(messages, add_generation_prompt=True).removeprefix(bos)

    asked = render(_turns(_U, _A, _V, _B, _W))
    try:
        told = render(_turns(_U, system=_S))
    except TemplateRefusal:
        told = None
    shape = _learn(asked, told)
    compared = [messages for messages in _conversations(_PROBES) if told is not None or messages[0].role == "user"]
    if shape is None or any(shape.text(messages) != render(messages) for messages in compared):
        raise ExportError(
            "no template in Ollama's language gives the text of this chat template",
            place=template.origin,
            hint="leave --ollama-template out: Ollama then takes the template from the GGUF file if it knows it",
        )
    return shape.go()


def _learn(asked: str, with_system: str | None) -> _Shape | None:
    """The shape of a template from what it makes of two and a half exchanges, and of a question with a system message.

    None if messages are missing, or if the texts between them are not the same everywhere.
    """
    pieces = _between(asked, (_U, _A, _V, _B, _W))
    if pieces is None:
        return None
    opening, middle, following, middle_again, following_again, closing = pieces
    if (middle, following) != (middle_again, following_again):
        return None
    before, after = opening, "\n\n"
    if with_system is not None:
        found = _between(with_system, (_S, _U))
        if found is None or found[2] != closing:
            return None
        before, after = found[0], found[1]
    return _Shape(opening, before, after, middle, following, closing)


def _between(text: str, marks: Sequence[str]) -> list[str] | None:
    """What stands before, between and after marks, each of which must be there once, in this order."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _turns(*texts: str, system: str | None = None) -> list[Message]:
    """Questions and answers in turn, after a system message if there is one."""
    from finetune.data.conversation import Message

    first = [Message("system", system)] if system is not None else []
    return first + [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]


def _conversations(texts: Sequence[str]) -> Iterator[list[Message]]:
    """Conversations of one to three questions, each with and without a system message."""
    for count in range(1, len(texts) + 1, 2):
        yield _turns(*texts[:count])
        yield _turns(*texts[-count:], system=f"Be kind.\n{texts[count - 1]}")


def _literal(text: str) -> str:
    """A text in a Go template. What would open an action is written as a string in one."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{" in text else text
