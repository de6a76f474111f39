"""Try every chat template on conversations of all kinds, and write docs/chat-templates.md.

    .venv/bin/python scripts/chat_templates.py ../shared/assets/chat_templates

The folder holds templates as models ship them, one `.jinja` file each; TRL's own folder is added. For each conversation
the answers are found as training finds them, and what carries loss must hold each answer whole and an end of turn.
"""

from __future__ import annotations

import datetime
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from finetune.data.answers import AnswerFinder
from finetune.data.conversation import Conversation, Message
from finetune.data.jinja import TemplateRefusal
from finetune.data.template import ChatTemplate, training_version

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TODAY = datetime.datetime(2026, 1, 2)

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}, "id": "abcdefghi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says how the weather is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
ASKED = (Message("user", "Where is Paris?"), Message("assistant", "In France."))
AGAIN = (*ASKED, Message("user", "And Rome?"), Message("assistant", "In Italy."))


def thinking(key: str | None) -> Conversation:
    """One exchange with what the model thought: in a field of its own, or in the answer."""
    if key is None:
        said = Message("assistant", "<think>\nA capital.\n</think>\n\nIn France.")
    else:
        said = Message("assistant", "In France.", extra=((key, "A capital."),))
    return Conversation((ASKED[0], said), key or "text")


CONVERSATIONS = {
    "one exchange": (Conversation(ASKED, "one"),),
    "several": (Conversation(AGAIN, "several"),),
    "system message": (Conversation((Message("system", "Be brief."), *AGAIN), "system"),),
    # However a template reads it.
    "thinking": (thinking("reasoning_content"), thinking("thinking"), thinking("reasoning"), thinking(None)),
    "tool calls": (
        Conversation(
            (
                Message("user", "How is it?"),
                Message("assistant", "", (CALL,)),
                Message("tool", "Sunny.", extra=(("name", "weather"), ("tool_call_id", "abcdefghi"))),
                Message("assistant", "It is sunny."),
            ),
            "tools",
            tools=(TOOL,),
        ),
    ),
}

HEAD = """# Chat templates

Which chat templates can be trained on, tried on conversations of five kinds. In each, the tokens with loss are checked
to hold every answer of the assistant whole, with the token that ends it, and nothing of anybody else's.
{counts}

- **yes**: with the template as it is.
- **TRL**: with TRL's version of it for training. The template itself leaves out something that is to be learnt, or
  writes earlier turns as the model would not. `ft` takes that version by itself where a base has exactly this template.
- **as written**: the template writes an answer differently once others follow it (an empty thinking block is left out,
  for instance); such an answer is trained on as it is written there.
- **closed**: the template ends a turn only when another follows. What it then writes is added to the last turn.
- Anything else is the reason why it is refused: an error that names the row, before anything is trained.

This page is made by `scripts/chat_templates.py`; a test checks that it is current. The first part are templates as
models ship them (from llama.cpp's collection), the second is TRL's folder.
"""


def trl_folder() -> Path:
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "chat_templates"


def attempt(finder: AnswerFinder, conversation: Conversation) -> str:
    """'' where the answers are found and right, otherwise why not."""
    trained = conversation.trained("assistant")
    try:
        rendered = finder.render(conversation, trained)
    except TemplateRefusal as reason:
        return str(reason)
    whole = finder.template.render(conversation.messages, tools=conversation.tools)
    assert rendered.text.startswith(whole), "the ids are those of apply_chat_template"
    for index, (begin, end) in zip(trained, rendered.spans, strict=True):
        message, said = conversation.messages[index], rendered.text[begin:end]
        # A thinking block may be opened by the generation prompt, before the span.
        answer = message.content.rpartition("</think>")[2].strip()
        assert answer in said, f"{said!r} does not hold {answer!r}"
        assert not said.endswith(answer) or not answer, f"{said!r} has no end"
        others = [other.content for other in conversation.messages if other is not message and other.content]
        assert not any(other in said for other in others), f"{said!r} holds somebody else's words"
    return "closed" if rendered.text != whole else ""


def outcome(
    strict: AnswerFinder,
    training: AnswerFinder | None,
    lenient_one: AnswerFinder,
    conversations: tuple[Conversation, ...],
) -> str:
    """How a template does on a kind of conversation: on any of these that it can do."""
    refusals = []
    for conversation in conversations:
        refused = attempt(strict, conversation)
        if not refused:
            return "yes"
        if training is not None and not attempt(training, conversation):
            return "TRL"
        lenient = attempt(lenient_one, conversation)
        if lenient in ("", "closed"):
            return lenient or "as written"
        refusals.append(lenient)
    return refusals[0].partition(" (")[0][:100]


def rows(folder: Path) -> Iterator[list[str]]:
    for path in sorted(folder.glob("*.jinja")):
        own = ChatTemplate(path.read_text("utf-8"), SPECIAL, path.name, TODAY)
        known = training_version(own)
        ways = (AnswerFinder(own), AnswerFinder(known) if known else None, AnswerFinder(own, lenient=True))
        yield [path.stem, *(outcome(*ways, tried) for tried in CONVERSATIONS.values())]


def page(folder: Path) -> str:
    """The whole document."""
    tables = [list(rows(folder)), list(rows(trl_folder()))]
    ways = ("yes", "TRL", "as written", "closed")
    counts = [
        f"{kind}: {sum(row[number] in ways for table in tables for row in table)}"
        for number, kind in enumerate(CONVERSATIONS, 1)
    ]
    total = sum(map(len, tables))
    parts = [HEAD.format(counts=f"Of {total} templates: " + ", ".join(counts) + ".")]
    for table in tables:
        parts.append("| template | " + " | ".join(CONVERSATIONS) + " |")
        parts.append("|---" * (len(CONVERSATIONS) + 1) + "|")
        parts += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "docs" / "chat-templates.md"
    target.write_text(page(Path(sys.argv[1])), "utf-8")
