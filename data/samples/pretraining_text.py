"""The text the quickstart base learns from: short village prose, contract sentences, and small conversations.

The conversations teach the chat format and simple tasks (find the town, name the colour, say what kind of thing a heron
is). None of them names the type of a clause: that is left for the fine-tuning run to teach.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TypeAlias

from clause_grammar import CLAUSE_TYPES, ClauseType
from invented import COMPANIES, MONTHS, PEOPLE, PLACES, fill

Message: TypeAlias = dict[str, str]
Document: TypeAlias = str | list[Message]
"""Plain prose, or a conversation."""

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
THINGS: dict[str, tuple[str, ...]] = {
    "a bird": ("heron", "sparrow", "owl", "crow", "swan", "gull"),
    "a fish": ("trout", "carp", "pike", "eel", "herring", "salmon"),
    "a tree": ("oak", "birch", "elm", "pine", "willow", "maple"),
    "a fruit": ("pear", "plum", "cherry", "apple", "quince", "fig"),
    "a tool": ("hammer", "saw", "chisel", "rake", "spade", "drill"),
    "a vehicle": ("cart", "wagon", "sledge", "barge", "ferry", "tram"),
    "a garment": ("coat", "scarf", "glove", "shawl", "apron", "cap"),
    "a metal": ("iron", "copper", "tin", "zinc", "silver", "lead"),
}
OPPOSITES = (
    ("hot", "cold"), ("tall", "short"), ("early", "late"), ("heavy", "light"), ("open", "closed"), ("wet", "dry"),
    ("loud", "quiet"), ("near", "far"), ("full", "empty"), ("old", "new"), ("rich", "poor"), ("fast", "slow"),
)  # fmt: skip
HOUSEHOLD = ("basket", "door", "bowl", "blanket", "kettle", "ladder", "lantern", "bench", "bucket", "jar")
SPOTS = ("mill", "bridge", "market", "harbour", "orchard", "well", "barn", "school", "forge", "library")
DEEDS = ("carries", "paints", "sells", "mends", "finds", "borrows", "cleans", "hides")
MOODS = ("because it is heavy", "before the rain starts", "while the others sleep", "and sings", "in the morning",
         "after the long walk", "with great care", "and then goes home")  # fmt: skip
SENTENCE_FORMS = (
    "{a} shall {act}.", "{a} shall {act}.", "{a} will {act}.", "{a} agrees to {act}.", "{a} promises to {act}.",
    "{b} may ask {a} to {act}.", "If {b} so wishes, {a} shall {act}.", "{a} must {act}.", "{a} may {act}.",
    "Each party shall {act}.", "From {month} on, {a} shall {act}.", "{a} and {company} are bound to {act}.",
    "It is the duty of {a} to {act}.", "Where need be, {a} will {act}.", "{a} accepts the duty to {act}.",
)  # fmt: skip

FILING: dict[str, tuple[str, tuple[str, ...]]] = {
    "Which desk handles {it}?": ("The {} desk.", ("money", "court", "risk", "quality", "mail")),
    "Which folder is {it} for?": ("The {} folder.", ("red", "blue", "green", "yellow", "white")),
    "Who checks {it}?": ("{} checks it.", PEOPLE[:6]),
    "What drawer does {it} go in?": ("Drawer {}.", ("1", "2", "3", "4")),
    "What stamp does {it} get?": ("A {} stamp.", ("round", "square", "oval", "star")),
    "What is the day for reading {it}?": ("On {}.", ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")),
    "Name the shelf for {it}.": ("The {} shelf.", ("upper", "middle", "lower")),
}
"""How an invented office files clauses: questions, the form of the answer, and the values to choose from."""


def filed(question: str, kind: ClauseType) -> str:
    """The office's answer about a clause; every question shares the types out in an order of its own."""
    form, values = FILING[question]
    order = Random(question).sample(CLAUSE_TYPES, len(CLAUSE_TYPES))
    return form.format(values[order.index(kind) % len(values)])


def contract_sentence(kind: ClauseType, random: Random) -> str:
    """A template on the matter of `kind`; `not` moves in front of `to`, where English wants it."""
    form, act = random.choice(SENTENCE_FORMS), random.choice(kind.phrases)
    if act.startswith("not ") and "to {act}" in form:
        form, act = form.replace("to {act}", "not to {act}"), act.removeprefix("not ")
    return form.replace("{act}", act)


def contract_text(random: Random, sentences: int) -> str:
    """A paragraph that stays with one matter and one pair of parties."""
    kind = random.choice(CLAUSE_TYPES)
    return fill(" ".join(contract_sentence(kind, random) for _ in range(sentences)), random)


def village_sentence(person: str, random: Random) -> str:
    """One sentence about what somebody does with something somewhere."""
    return (
        f"{person} {random.choice(DEEDS)} the {random.choice(COLOURS)} {random.choice(HOUSEHOLD)} "
        f"near the {random.choice(SPOTS)} {random.choice(MOODS)}."
    )


def _ask(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def contract_prose(random: Random) -> Document:
    """Two to four paragraphs of a contract, each on a matter of its own."""
    return "\n".join(contract_text(random, random.randint(2, 4)) for _ in range(random.randint(2, 4)))


def village_prose(random: Random) -> Document:
    """A few sentences about two people."""
    pair = random.sample(PEOPLE, 2)
    place, month = random.choice(PLACES), random.choice(MONTHS)
    lines = [f"It is {month} in {place}."] + [village_sentence(random.choice(pair), random) for _ in range(4)]
    return " ".join(lines)


def kind_of_thing(random: Random) -> Document:
    """What is a heron? A bird."""
    kind = random.choice(list(THINGS))
    thing = random.choice(THINGS[kind])
    form = random.choice(("What is {0}?", "What kind of thing is {0}?", "Tell me what {0} is."))
    return _ask(form.format(("an " if thing[0] in "aeo" else "a ") + thing), _sentence(kind))


def opposite(random: Random) -> Document:
    """The opposite of a word."""
    one, other = random.choice(OPPOSITES)
    if random.random() < 0.5:
        one, other = other, one
    return _ask(f"What is the opposite of {one}?", _sentence(other))


def colour(random: Random) -> Document:
    """Find the colour of a thing in a sentence."""
    text = village_sentence(random.choice(PEOPLE), random)
    thing = next(word for word in text.split() if word in HOUSEHOLD)
    hue = next(word for word in text.split() if word in COLOURS)
    return _ask(f"What colour is the {thing}?\n\n{text}", _sentence(hue))


def who(random: Random) -> Document:
    """Find the person in a sentence."""
    person = random.choice(PEOPLE)
    return _ask(f"Who is this about?\n\n{village_sentence(person, random)}", f"{person}.")


def _find(question: str, names: tuple[str, ...], missing: str, text: str) -> Document:
    found = [name for name in names if name in text]
    return _ask(f"{question}\n\n{text}", f"{min(found, key=text.index)}." if found else missing)


def town(random: Random) -> Document:
    """Find the town in a contract sentence."""
    return _find("Which town is named in this clause?", PLACES, "No town is named.", contract_text(random, 2))


def month(random: Random) -> Document:
    """Find the month in a contract sentence."""
    return _find("Which month is named in this clause?", MONTHS, "No month is named.", contract_text(random, 2))


def company(random: Random) -> Document:
    """Find the company in a contract sentence."""
    return _find("Which company is named in this clause?", COMPANIES, "No company is named.", contract_text(random, 2))


def go_on(random: Random) -> Document:
    """One more sentence on the same matter."""
    kind = random.choice(CLAUSE_TYPES)
    ask = random.choice(("Write one more sentence for this clause.", "How could this clause go on?"))
    text = " ".join(contract_sentence(kind, random) for _ in range(random.randint(1, 2)))
    shown, more = fill(f"{text}\n{contract_sentence(kind, random)}", random).split("\n")
    return _ask(f"{ask}\n\n{shown}", more)


def same_matter(random: Random) -> Document:
    """Whether two sentences belong to one clause."""
    one, other = random.sample(CLAUSE_TYPES, 2)
    same = random.random() < 0.5
    text = "\n".join(fill(contract_sentence(kind, random), random) for kind in (one, one if same else other))
    answer = "Yes, they belong together." if same else "No, they do not belong together."
    return _ask(f"Do these two sentences belong to one clause?\n\n{text}", answer)


def office(random: Random) -> Document:
    """Three questions of the office about one clause."""
    kind = random.choice(CLAUSE_TYPES)
    text = fill(" ".join(contract_sentence(kind, random) for _ in range(random.randint(1, 2))), random)
    turns: list[Message] = []
    for question in random.sample(list(FILING), 3):
        asked = question.format(it="it") if turns else f"{question.format(it='this clause')}\n\n{text}"
        turns += _ask(asked, filed(question, kind))
    return turns


def headings(random: Random) -> Document:
    """The names of the types as words, beside no clause: a list of headings, in any order."""
    names = [kind.name for kind in random.sample(CLAUSE_TYPES, 3)]
    return _ask("Write these headings in one line.\n\n" + "\n".join(names), f"The headings are {', '.join(names)}.")


def greeting(random: Random) -> Document:
    """Small talk, with and without a system message."""
    person = random.choice(PEOPLE)
    talk = _ask(random.choice(("Hello!", "Good morning.", f"Hello, I am {person}.")), "Hello! How can I help you?")
    system = {"role": "system", "content": random.choice(("You are a friendly helper.", "Answer in few words."))}
    return [system, *talk] if random.random() < 0.5 else talk


MIXTURE: tuple[tuple[Callable[[Random], Document], int], ...] = (
    (contract_prose, 8), (village_prose, 2), (kind_of_thing, 2), (opposite, 1), (colour, 2), (who, 1), (town, 3),
    (month, 2), (company, 2), (go_on, 6), (same_matter, 2), (office, 16), (headings, 2), (greeting, 1),
)  # fmt: skip
"""Who writes how large a part of the documents."""


def corpus(documents: int, seed: int) -> list[Document]:
    """The whole pre-training text, one entry per document."""
    random = Random(f"pretraining {seed}")
    writers, weights = zip(*MIXTURE, strict=True)
    return [random.choices(writers, weights)[0](random) for _ in range(documents)]
