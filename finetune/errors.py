"""What can go wrong, drawn as a tree. Everything a person is meant to see is one of these.

    FinetuneError                exit 1, the common ancestor; never raised itself
    ├── InputError               exit 2: something the person wrote or named; they can mend it
    │   ├── ConfigError          a YAML file, a key, an override
    │   ├── DataError            a data file or a row of it
    │   ├── BaseError            the base model, its tokenizer or its chat template
    │   └── RunError             a run folder that is missing, incomplete or not what was asked for
    └── WorldError               exit 1: the machine or the moment; the input may be fine
        ├── StorageError         a file that cannot be written or read, a full disk
        ├── MissingExtraError    an optional package that is not installed
        ├── TrainingError        training cannot go on (a loss that is not a number, memory)
        └── ExportError          a merge or an export that would not be what was trained

An error carries one or more `Problem`s. `cli.py` prints each as `error: PLACE: MESSAGE` followed by one `hint:`;
whatever is not a FinetuneError is a bug of ours and is reported as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where, and what to do about it."""

    message: str
    place: str | None = None
    """`file`, `file:line` or a key, whichever leads the person to it fastest."""
    hint: str | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


def few(messages: Sequence[str]) -> list[str]:
    """The first five of many messages of one kind, and how many more there are."""
    left = len(messages) - 5
    return list(messages) if left <= 0 else [*messages[:5], f"… and {left} more of this kind"]


class FinetuneError(Exception):
    """The common ancestor: `exit_code` is the process's exit status, `problems` is what is printed."""

    exit_code = 1

    def __init__(self, message: str | Sequence[Problem], *, place: str | None = None, hint: str | None = None) -> None:
        if isinstance(message, str):
            self.problems: tuple[Problem, ...] = (Problem(message, place, hint),)
        else:
            self.problems = tuple(message)
        super().__init__("; ".join(str(problem) for problem in self.problems))


class InputError(FinetuneError):
    exit_code = 2


class ConfigError(InputError):
    pass


class DataError(InputError):
    pass


class BaseError(InputError):
    pass


class RunError(InputError):
    pass


class WorldError(FinetuneError):
    exit_code = 1


class StorageError(WorldError):
    pass


class MissingExtraError(WorldError):
    pass


class TrainingError(WorldError):
    pass


class ExportError(WorldError):
    pass
