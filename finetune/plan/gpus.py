"""The cards: found by a name however it is written, or by their memory. Which of them is here: `here.py`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from finetune.errors import ConfigError

TABLE = Path(__file__).with_name("gpus.yaml")
"""Its comments say what the numbers are and where they are from."""

GIB = 2**30

Capability = tuple[int, int]
"""NVIDIA's compute capability, such as (8, 9) for Ada: the generation of the chip."""


@dataclass(frozen=True)
class Card:
    """One kind of graphics card."""

    name: str
    called: tuple[str, ...]
    """Other names: what torch and nvidia-smi say, without the maker's."""
    gb: float
    """The memory that it is sold with."""
    memory: int
    """Bytes that CUDA reports."""
    bandwidth: float
    """Bytes a second between memory and chip."""
    rate: float
    """Floating point operations a second: dense 16-bit matrices, summed up in float32."""
    capability: Capability
    watts: int
    price: float | None
    """US dollars an hour, or None where it is not for rent."""
    price_from: str | None
    """Where and when that was the price."""
    in_use: int = 0
    """Bytes that others use at this moment, on a card that is here."""
    note: str | None = None
    """Why it is this card that is planned for, where several are here."""

    @property
    def bf16(self) -> bool:
        """Whether it computes in bfloat16; otherwise in float16, at the same rate."""
        return self.capability >= (8, 0)

    @property
    def label(self) -> str:
        """The name, with the memory where the name does not say it."""
        return self.name if self.name.endswith("GB") else f"{self.name}, {self.gb:g} GB"


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
            capability=(row["capability"][0], row["capability"][1]),
            watts=row["watts"],
            price=row["price"],
            price_from=table["prices"][row["from"]] if row["price"] is not None else None,
        )
        for row in table["cards"]
    )


def find_card(text: str) -> Card:
    """The card of a name: `rtx-4090`, `4090`, `NVIDIA GeForce RTX 4090` and `RTX 4090, 24 GB` are one.

    Raises ConfigError for a name that the table does not have, with the nearest that it has.
    """
    if not _key(text):
        raise ConfigError("--gpu: no name of a card", hint="`ft plan CONFIG` lists all cards that are known")
    found = _called(text) or _called_with_size(text)
    if found:
        return found[0]
    names = {_key(card.name): card.name for card in cards()}
    close = get_close_matches(_key(text), names, n=1, cutoff=0.5)
    raise ConfigError(
        f"--gpu {text}: this card is not in the table",
        hint=(f"did you mean {slug(names[close[0]])}? " if close else "")
        + "`ft plan CONFIG` lists all cards; `--vram 12GB` plans for any other",
    )


LARGEST_SIZE = 1024
"""GB: more than any card has, so that a typing error is not planned for."""

_UNITS = {"": 1.0, "g": 1.0, "gb": 1.0, "gib": 1.0, "m": 1000.0, "mb": 1000.0, "mib": 1024.0}
"""So many of the unit are one GB. What is sold as a GB is 2**30 bytes, so that GB and GiB are the same here."""


def card_of_vram(text: str) -> Card:
    """Any card of so much memory (`12GB`, `7.5GB`, `12000MB`, `12`): of all in the table that are sold with it the
    least memory, the least speed and the oldest chip, each for itself, so that nothing is promised that one of them
    would not keep. Of a size that none has, those of the next smaller one.

    Raises ConfigError for what is no size, too small for any, or larger than any.
    """
    found = re.fullmatch(r"\s*(\d{1,7}(?:\.\d{1,3})?)\s*([gm]i?b?)?\s*", text, re.IGNORECASE | re.ASCII)
    unit = (found[2] or "").lower() if found else None
    if found is None or unit not in _UNITS:
        raise ConfigError(f"--vram {text}: not a size", hint="write it as on the box, for instance 12GB")
    gb = float(found[1]) / _UNITS[unit]
    if gb > LARGEST_SIZE:
        raise ConfigError(f"--vram {text}: no card has so much", hint="write it as on the box, for instance 12GB")
    smaller = [card for card in cards() if card.gb <= gb]
    if not smaller:
        least = min(card.gb for card in cards())
        raise ConfigError(f"--vram {text}: the smallest card in the table has {least:g} GB", hint="use a smaller base")
    same = [card for card in smaller if card.gb == max(card.gb for card in smaller)]
    rate = min(card.rate for card in same)
    return Card(
        name=f"a card of {gb:g} GB",
        called=(),
        gb=gb,
        memory=int(min(card.memory / card.gb for card in same) * gb),
        bandwidth=min(card.bandwidth for card in same),
        rate=rate,
        capability=min(card.capability for card in same),
        # At the least rate, what takes as much energy as the card that needs most of it for an operation.
        watts=round(rate * max(card.watts / card.rate for card in same)),
        price=None,
        price_from=None,
    )


def card_like(name: str, memory: int, capability: Capability | None = None) -> Card:
    """The card that a driver calls so and says to have `memory` bytes. Never fails: this card is there.

    One that the table does not have keeps its name, memory and capability. Its speed is taken from the largest card
    with no more memory (from the smallest, if all have more) among those of its capability; where the table has none,
    among those of the newest capability before it.
    """
    known = _called(name)
    if known:
        like = min(known, key=lambda card: abs(card.memory - memory))
        return replace(like, memory=memory)
    kind = _of_capability(capability)
    smaller = [card for card in kind if card.memory <= memory * 1.02]
    like = max(smaller or [min(kind, key=lambda card: card.memory)], key=lambda card: (card.memory, -card.rate))
    return replace(
        like,
        name=name,
        called=(),
        gb=max(1, round(memory / GIB)),
        memory=memory,
        capability=capability or like.capability,
        price=None,
        price_from=None,
    )


def _of_capability(capability: Capability | None) -> Sequence[Card]:
    """The cards of a capability, or of the newest before it; the oldest, if it is older than all."""
    if capability is None:
        return cards()
    before = [card.capability for card in cards() if card.capability <= capability]
    nearest = max(before) if before else min(card.capability for card in cards())
    return [card for card in cards() if card.capability == nearest]


def slug(name: str) -> str:
    """A name as one types it: `RTX 4060 Ti 16 GB` → `rtx-4060-ti-16gb`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace(" gb", "gb")).strip("-")


def _called(text: str) -> list[Card]:
    """The cards of a name, those first whose own name it is."""
    key = _key(text)
    own = [card for card in cards() if key in (_key(card.name), _key(card.name).removeprefix("rtx"))]
    others = [card for card in cards() if card not in own and key in map(_key, card.called)]
    return own + others if key else []


def _called_with_size(text: str) -> list[Card]:
    """The cards of a name with the memory behind it, as labels have it: `T4, 16 GB`, `H100 80GB`."""
    found = re.fullmatch(r"(.*?)[\s,_-]*(\d{1,4})[\s_-]*gi?b\s*", text[:200], re.IGNORECASE | re.ASCII)
    return [card for card in _called(found[1]) if card.gb == int(found[2])] if found else []


def _key(name: str) -> str:
    """A name without the maker, the brand and everything that is written in different ways."""
    words = re.sub(r"nvidia|geforce|tesla|quadro|graphics|generation|\(r\)|\(tm\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)
