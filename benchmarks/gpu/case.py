"""What a case of the GPU suite is: a name, what it measures, and what it finds around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import Device


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
    seconds: int = 60
    """It is not begun where less time is left than this: a guess, on the generous side."""
