"""The cards: found by a name however it is written, by their memory, or on this machine."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from finetune.errors import ConfigError

TABLE = Path(__file__).with_name("gpus.yaml")
"""Its comments say what the numbers are and where they are from."""

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One kind of graphics card."""

    name: str
    called: tuple[str, ...]
    """Other names: what torch and nvidia-smi say, without the maker's."""
    gb: int
    """The memory that it is sold with."""
    memory: int
    """Bytes that CUDA reports."""
    bandwidth: float
    """Bytes a second between memory and chip."""
    rate: float
    """Floating point operations a second: dense 16-bit matrices, summed up in float32."""
    bf16: bool
    """Whether it computes in bfloat16; otherwise in float16, at the same rate."""
    watts: int
    price: float | None
    """US dollars an hour, or None where it is not for rent."""
    price_from: str | None
    """Where and when that was the price."""
    in_use: int = 0
    """Bytes that others use at this moment, on a card that is here."""

    @property
    def label(self) -> str:
        """The name, with the memory where the name does not say it."""
        return self.name if self.name.endswith("GB") else f"{self.name}, {self.gb} GB"


@cache
def cards() -> tuple[Card, ...]:
    """The table, in its order."""
    import yaml

    table = yaml.load(TABLE.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(
        Card(
            name=row["name"],
            called=tuple(row.get("called", ())),
            gb=row["gb"],
            memory=int(row["memory"] * GIB),
            bandwidth=row["bandwidth"] * 1e9,
            rate=row["tflops"] * 1e12,
            bf16=row["bf16"],
            watts=row["watts"],
            price=row["price"],
            price_from=table["prices"][row["from"]] if row["price"] is not None else None,
        )
        for row in table["cards"]
    )


def find_card(text: str) -> Card:
    """The card of a name: `rtx-4090`, `4090` and `NVIDIA GeForce RTX 4090` are one.

    Raises ConfigError for a name that the table does not have, with the nearest that it has.
    """
    found = _called(text)
    if found:
        return found[0]
    names = {_key(card.name): card.name for card in cards()}
    close = get_close_matches(_key(text), names, n=1, cutoff=0.5)
    raise ConfigError(
        f"--gpu {text}: this card is not in the table",
        hint=(f"did you mean {slug(names[close[0]])}? " if close else "")
        + "`ft plan CONFIG` lists all cards; `--vram 12GB` plans for any other",
    )


def card_of_vram(text: str) -> Card:
    """A card of so much memory (`12GB`, `12`): the slowest of the table that is sold with it, so that no time is
    promised that another would not keep. Of a size that none has, the next smaller one's speed.

    Raises ConfigError for what is no size, or too small for any.
    """
    found = re.fullmatch(r"\s*(\d{1,4})\s*(g|gb|gib)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"--vram {text}: not a size", hint="write it as on the box, for instance 12GB")
    gb = int(found[1])
    smaller = [card for card in cards() if card.gb <= gb]
    if not smaller:
        least = min(card.gb for card in cards())
        raise ConfigError(f"--vram {text}: the smallest card in the table has {least} GB", hint="use a smaller base")
    size = max(card.gb for card in smaller)
    slowest = min((card for card in smaller if card.gb == size), key=lambda card: (card.rate, card.bandwidth))
    return replace(
        slowest,
        name=f"a card of {gb} GB",
        called=(),
        gb=gb,
        memory=int(slowest.memory * gb / slowest.gb),
        price=None,
        price_from=None,
    )


def card_like(name: str, memory: int) -> Card:
    """The card that a driver calls so and says to have `memory` bytes. Of one that the table does not have, the speed
    of the largest with no more memory (of the smallest, if all have more). Never fails: this card is there."""
    known = _called(name)
    if known:
        like = min(known, key=lambda card: abs(card.memory - memory))
    else:
        smaller = [card for card in cards() if card.memory <= memory * 1.02]
        like = max(smaller or [min(cards(), key=lambda card: card.memory)], key=lambda card: (card.memory, -card.rate))
    price = (like.price, like.price_from) if known else (None, None)
    return replace(like, name=like.name if known else name, memory=memory, price=price[0], price_from=price[1])


def card_here(timeout: float = 2.0) -> Card | None:
    """The first card of this machine, with what is in use on it, as nvidia-smi says; None where that says nothing.

    Needs no torch: the driver's program answers in a few hundredths of a second.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=timeout, check=True).stdout
        name, total, used = (part.strip() for part in answer.splitlines()[0].rsplit(",", 2))
        memory, in_use = int(total) * 2**20, int(used) * 2**20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None
    known = card_like(name, memory)
    # What the driver reserves for itself is not among what nvidia-smi says is in use.
    table = [card for card in cards() if card.name == known.name]
    return replace(known, memory=min(memory, table[0].memory) if table else memory, in_use=in_use)


def slug(name: str) -> str:
    """A name as one types it: `RTX 4060 Ti 16 GB` → `rtx-4060-ti-16gb`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace(" gb", "gb")).strip("-")


def _called(text: str) -> list[Card]:
    """The cards of a name, those first whose own name it is."""
    key = _key(text)
    own = [card for card in cards() if key in (_key(card.name), _key(card.name).removeprefix("rtx"))]
    others = [card for card in cards() if card not in own and key in map(_key, card.called)]
    return own + others if key else []


def _key(name: str) -> str:
    """A name without the maker, the brand and everything that is written in different ways."""
    words = re.sub(r"nvidia|geforce|tesla|quadro|graphics|generation|\(r\)|\(tm\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)
