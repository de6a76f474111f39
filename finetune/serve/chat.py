"""`ft chat`: a conversation with a run's newest artifact. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from finetune.console import Console
from finetune.data.conversation import Message
from finetune.data.jinja import TemplateRefusal
from finetune.errors import ExportError, RunError, StorageError
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged
from finetune.serve.answers import Answer, Style, open_answers
from finetune.serve.artifact import newest_artifact, warn_of_another
from finetune.serve.checks import check_artifact

COMMANDS = {
    "/reset": "forget the conversation, keep the system message",
    "/system TEXT": "replace the system message; without a text there is none",
    "/help": "this list",
    "/quit": "end (so does Ctrl-D)",
}
HELP = (
    *(f"  {command:<14}{what}" for command, what in COMMANDS.items()),
    "A line that ends with \\ goes on with the next. A space before it makes a /word text for the model.",
    "Ctrl-C stops an answer; what was said of it stays in the conversation.",
)

_COMMAND = re.compile(r"(/\w*)(?:\s+(.*))?", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What moves a terminal's cursor, names its window, fills its clipboard: all but the tab and the end of a line."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Settings:
    using: str
    system: str | None
    max_tokens: int
    temperature: float


def talk(run: RunFolder, settings: Settings, prompt: str | None, console: Console) -> None:
    """Answer one prompt (`-`: what stdin holds), or converse until the input ends.

    Bytes of the input that are no text count as U+FFFD. Raises RunError for settings that cannot be, StorageError when
    an answer cannot be written to where stdout leads.
    """
    if not math.isfinite(settings.temperature):
        raise RunError(
            f"{settings.temperature} is no temperature", place="--temperature", hint="0 is sober, 1 is lively"
        )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    if prompt == "":
        raise RunError("the prompt is empty", place="--prompt", hint="give a text, or `-` and a text on stdin")
    artifact = newest_artifact(run, settings.using, "chat")
    check_artifact(run, artifact)
    warn_of_another(run, artifact, console)
    style = Style(settings.max_tokens, settings.temperature)
    with ExitStack() as stack:
        with logged(run.log):
            console.say(f"loading {artifact.path}")
            answer = open_answers(run, artifact, style, stack)
        conversation = Conversation(answer, _text(settings.system) if settings.system else None, console)
        if prompt is not None:
            conversation.ask(_text(prompt))
            return
        for line in _lines(console):
            if not conversation.take(line):
                return


class Conversation:
    """What has been said, and what a line of input does to it."""

    def __init__(self, answer: Answer, system: str | None, console: Console) -> None:
        self._answer, self._console = answer, console
        self._system = system
        self.turns: list[Message] = []

    def take(self, line: str) -> bool:
        """A command or a question. False ends the conversation."""
        command = _COMMAND.fullmatch(line)
        if command is None:
            self._try(line.strip())
            return True
        name, text = command[1], (command[2] or "").strip()
        if name == "/quit":
            return False
        if name == "/reset":
            self.turns.clear()
            self._console.say("forgotten")
        elif name == "/system":
            self._system = text or None
            self._console.say("the system message is replaced" if text else "there is no system message any more")
        elif name == "/help":
            for row in HELP:
                self._console.say(row)
        else:
            self._console.say(f"there is no command {name}; /help lists them (a space before it sends it as text)")
        return True

    def ask(self, text: str) -> None:
        """Send a question, show the answer as it comes, and remember both. Ctrl-C ends the answer alone."""
        system = [Message("system", self._system)] if self._system else []
        question = Message("user", text)
        said = ""
        try:
            with contextlib.closing(self._answer([*system, *self.turns, question])) as pieces:
                for piece in pieces:
                    said += piece
                    _show(piece)
        except KeyboardInterrupt:
            self._console.say()
            self._console.say("stopped")
        else:
            _show("\n")
        if said:
            self.turns += [question, Message("assistant", said)]

    def _try(self, text: str) -> None:
        """In a conversation, a question that cannot be answered (too long, refused by the template) is not the end."""
        if not text:
            return
        try:
            self.ask(text)
        except (ExportError, TemplateRefusal) as error:
            self._console.error(error)
            self._console.say("this question is left out of the conversation; /reset makes room for a long one")


def _text(argument: str) -> str:
    """An argument of the command line, without what Python makes of bytes that are no UTF-8."""
    return _SURROGATE.sub("\ufffd", argument)


def _show(piece: str) -> None:
    """Write to stdout. On a terminal, control characters are spelt out: a model must not command it."""
    if sys.stdout.isatty():
        piece = _CONTROL.sub(lambda found: repr(found[0])[1:-1], piece)
    try:
        sys.stdout.write(piece)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader has left; `main` knows what to do
    except OSError as error:
        raise StorageError(f"the answer cannot be written: {error.strerror}", place="stdout") from error


def _lines(console: Console) -> Iterator[str]:
    """What the person enters, with lines that end in a backslash joined to the next. Ends with the input or Ctrl-C."""
    parts: list[str] = []
    while True:
        if sys.stdin.isatty():
            sys.stderr.write(console.style("  … " if parts else "you › ", "cyan"))
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            console.say()
            return
        text = line.rstrip("\r\n")
        if line and text.endswith("\\"):
            parts.append(text[:-1])
            continue
        if line or parts:
            yield "\n".join([*parts, text])
        if not line:
            return
        parts.clear()
