"""The card of this machine that a training will use, as nvidia-smi describes it. No torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finetune.plan.gpus import GIB, Capability, Card, card_like, cards

FIELDS = ("index", "uuid", "memory.total", "memory.used", "compute_cap", "name")
"""What is asked of the driver; the name last, because it may hold a comma."""


@dataclass(frozen=True)
class _Found:
    """One line of nvidia-smi."""

    index: str
    uuid: str
    name: str
    card: Card


def card_here(timeout: float = 2.0) -> Card | None:
    """The card that CUDA numbers 0, which is the one that `ft train` takes, with what is in use on it. None where there
    is none, or nvidia-smi does not say.

    Needs no torch: the driver's program answers in a few hundredths of a second.
    """
    found = _visible(_ask(timeout), os.environ)
    if not found:
        return None
    first, *others = found
    if not others:
        return first.card
    named = "they are all alike" if len({one.name for one in found}) == 1 else "the one that CUDA numbers 0"
    note = f"{first.name} (GPU {first.index} of nvidia-smi), of {len(found)} that are here: {named}"
    return replace(first.card, note=f"{note}; CUDA_VISIBLE_DEVICES chooses another")


def _visible(found: Sequence[_Found], environment: Mapping[str, str]) -> list[_Found]:
    """The cards in CUDA's order, as far as it shows them (CUDA C++ programming guide, environment variables).

    The fastest first (by our table; CUDA's own measure is not published), unless CUDA_DEVICE_ORDER is PCI_BUS_ID.
    CUDA_VISIBLE_DEVICES lists numbers in that order or beginnings of UUIDs; whatever is not there ends the list.
    """
    ordered = list(found)
    if environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        ordered.sort(key=lambda one: -one.card.rate)
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return ordered
    shown: list[_Found] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.isascii() and entry.isdigit():
            named = ordered[int(entry) :][:1] if len(entry) < 5 else []
        else:
            named = [one for one in ordered if len(entry) > len("GPU-") and one.uuid.startswith(entry)]
        if len(named) != 1 or named[0] in shown:
            break
        shown += named
    return shown


def _ask(timeout: float) -> list[_Found]:
    """What nvidia-smi says of each card, in the order of the bus; nothing where it is not there or says nothing useful.

    Drivers before 2021 do not know compute capabilities and refuse the question: they are asked without.
    """
    for fields in (FIELDS, tuple(field for field in FIELDS if field != "compute_cap")):
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=timeout, check=True).stdout
        except subprocess.CalledProcessError:
            continue
        except (OSError, ValueError, subprocess.SubprocessError):
            return []
        return [one for line in answer.splitlines() if (one := _read(line, fields)) is not None]
    return []


def _read(line: str, fields: Sequence[str]) -> _Found | None:
    values = dict(zip(fields, (part.strip() for part in line.split(",", len(fields) - 1)), strict=False))
    try:
        name, memory, in_use = values["name"], int(values["memory.total"]) * 2**20, int(values["memory.used"]) * 2**20
        major, _, minor = values.get("compute_cap", "").partition(".")
        capability: Capability | None = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
        card = card_like(name, memory, capability)
    except (ValueError, KeyError):
        return None
    # What the driver reserves for itself is not among what nvidia-smi says is in use.
    known = [one.memory for one in cards() if one.name == card.name]
    share = min(one.memory / (one.gb * GIB) for one in cards() if one.rate == card.rate)
    usable = min(memory, known[0] if known else int(memory * share))
    return _Found(values["index"], values["uuid"], name, replace(card, memory=usable, in_use=in_use))
