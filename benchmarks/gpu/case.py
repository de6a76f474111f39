"""What a case of the GPU suite is: a name, what it measures, when it is its turn, and what it finds around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import Device


class Turn(IntEnum):
    """What is measured before what, through all chunks: whatever is cut off was the least important."""

    CORRECT = 1
    """Every faster way equals the plain one: without that no speed means anything."""
    TELLING = 2
    """ft beside TRL, each with all it has and with nothing."""
    PLAN = 3
    CARDS = 4
    MEMORY = 5
    """ft in as little memory as TRL takes, on the other models; the first pair for the second time."""
    SWITCHES = 6
    OTHERS = 7
    """Other trainers than TRL."""
    REST = 8
    """Good to have; no target waits for it."""


@dataclass(frozen=True)
class Context:
    """Where a case is measured."""

    device: Device
    folder: Path
    """Empty, for this case alone."""
    done: Mapping[str, dict[str, Any]]
    """What the cases of this chunk that came before have found, those left out that failed."""


@dataclass(frozen=True)
class Case:
    name: str
    measure: Callable[[Context], dict[str, Any]]
    """Its result is JSON. It raises whatever it likes: that is recorded in the result's place."""
    seconds: float = 60
    """It is not begun where less time is left than this: a guess (guess.py), on the generous side."""
    turn: Turn = Turn.REST
    process: str = "ours"
    """Cases with the same word here may share a process, one after the other. TRL's and unsloth's ways change libraries
    for good and stay among themselves; a word that no other case has is a process of its own."""
    needs: str = ""
    """A module without which it is passed over, and nothing is recorded: it may be there in a later call."""
