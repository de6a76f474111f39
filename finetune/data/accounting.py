"""Where every row went, and what was found on the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.errors import DataError, Problem

MAX_PROBLEMS = 10
"""Kinds of wrong rows that an error lists. A person mends some and runs it again; more would only scroll away."""


@dataclass
class Overlong:
    """Rows longer than `train.sequence_length`, and what each policy would lose of them."""

    rows: int = 0
    first: str = ""
    longest: int = 0
    longest_place: str = ""
    truncate_tokens: int = 0
    """Tokens with loss that `truncate` would cut."""
    truncate_rows: int = 0
    """Rows that would have no token with loss left."""
    split_tokens: int = 0
    drop_tokens: int = 0

    def add(self, length: int, place: str, *, truncate: int, emptied: bool, split: int, drop: int) -> None:
        if not self.rows:
            self.first = place
        self.rows += 1
        if length > self.longest:
            self.longest, self.longest_place = length, place
        self.truncate_tokens += truncate
        self.truncate_rows += emptied
        self.split_tokens += split
        self.drop_tokens += drop

    def merge(self, other: Overlong) -> None:
        """`other` comes later in the data."""
        if other.rows:
            self.first = self.first or other.first
            if other.longest > self.longest:
                self.longest, self.longest_place = other.longest, other.longest_place
            for name in ("rows", "truncate_tokens", "truncate_rows", "split_tokens", "drop_tokens"):
                setattr(self, name, getattr(self, name) + getattr(other, name))

    def error(self, limit: int, total: int, section: str) -> DataError:
        """`section`: of the config, where the policy for these rows is set."""
        return DataError(
            f"{self.rows:,} of {total:,} rows are longer than train.sequence_length {limit:,}; the first is here, the "
            f"longest has {self.longest:,} tokens ({self.longest_place})",
            place=self.first,
            hint=f"raise train.sequence_length to {self.longest}, or set in {section} `on_overlong: truncate` (loses "
            f"{self.truncate_tokens:,} tokens with loss, {self.truncate_rows:,} rows whole), `on_overlong: split` "
            f"(loses {self.split_tokens:,}) or `on_overlong: drop` (loses {self.drop_tokens:,} in {self.rows:,} rows)",
        )


@dataclass
class Wrong:
    """Rows that something is wrong with: how many, and the first of each kind."""

    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)
    """What is wrong → the first row with it."""

    def add(self, error: DataError) -> None:
        problem = error.problems[0]
        self.rows += 1
        self.kinds[problem.message] = self.kinds.get(problem.message, 0) + 1
        self.problems.setdefault(problem.message, problem)

    def merge(self, other: Wrong) -> None:
        """`other` comes later in the data."""
        self.rows += other.rows
        for message, count in other.kinds.items():
            self.kinds[message] = self.kinds.get(message, 0) + count
            self.problems.setdefault(message, other.problems[message])

    def error(self, allowed: int, more: bool) -> DataError:
        """All kinds of what is wrong in one error. `more`: the reading stopped before the end."""
        problems = []
        for message, problem in list(self.problems.items())[:MAX_PROBLEMS]:
            others = self.kinds[message] - 1
            also = f" (and {others:,} more row{'s' if others > 1 else ''} like it)" if others else ""
            problems.append(Problem(message + also, problem.place, problem.hint))
        left = len(self.problems) - len(problems)
        if len(problems) > 1:
            counted = f"{self.rows:,} rows{' so far' if more else ''} have something wrong"
            allowance = f", where data.max_dropped allows {allowed:,}" if allowed else ""
            kinds = f"; {left:,} further kinds are not shown" if left else ""
            hint = "mend them, or allow so many to be left out with `max_dropped:` in data"
            problems.append(Problem(counted + allowance + kinds, None, hint))
        return DataError(problems)


@dataclass
class Accounting:
    """Where every row went: read = used + held out + the sum of dropped."""

    read: int = 0
    used: int = 0
    held_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason → place of the first row dropped for it."""
    truncated: int = 0
    """Of the rows used or held out, how many were cut."""
    split: int = 0
    """How many were split; each counts as one row here."""
    lost_supervised_tokens: int = 0
    """What the cuts took from them."""
    formats: dict[str, str] = field(default_factory=dict)
    """Source → format."""
    template: str | None = None
    """Which chat template rendered the rows, and why if it is not the one that was asked for."""
    exact_duplicates: int = 0
    near_duplicates: int = 0
    first_duplicate: str = ""
    leaked: int = 0
    """Held-out rows that are also trained on, where that was allowed."""
    found: dict[str, int] = field(default_factory=dict)
    """What was found in the texts, by kind → in how many rows."""
    first_found: dict[str, str] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    """Of a sample of the rows."""
    outliers: int = 0
    """Rows far longer than the rest."""
    first_outlier: str = ""

    def drop(self, reason: str, place: str, count: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.first_dropped.setdefault(reason, place)

    def find(self, kind: str, place: str, count: int) -> None:
        self.found[kind] = self.found.get(kind, 0) + count
        self.first_found.setdefault(kind, place)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
