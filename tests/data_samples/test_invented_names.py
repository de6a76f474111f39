"""Every name in the samples is one of those coined for them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
INVENTED = runpy.run_path(str(SAMPLES / "invented.py"))

COINED = {
    word
    for name in (*INVENTED["PEOPLE"], *INVENTED["COMPANIES"], *INVENTED["PLACES"], *INVENTED["BOATS"], INVENTED["SHOP"])
    for word in name.split()
}
ORDINARY = {
    *INVENTED["MONTHS"], *(role.split()[1].capitalize() for pair in INVENTED["ROLES"] for role in pair),
    "Friday", "Monday", "I", "Python", "Clause",
}  # fmt: skip
"""Capitalised words that name nobody: months, the roles of a contract."""
SAMPLE_FILES = sorted(path for path in SAMPLES.iterdir() if path.suffix in (".jsonl", ".csv"))


def names_in(text: str) -> set[str]:
    """Capitalised words that do not begin a sentence, a line or a quotation."""
    return set(re.findall(r"(?<=[a-z0-9,;)] )[A-Z][A-Za-z]+", text))


def test_the_scan_sees_a_name() -> None:
    assert names_in("The letter is for Ada, and then for Bob. Now she reads.") == {"Ada", "Bob"}


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=lambda path: str(path.name))
def test_only_coined_names_appear(path: Path) -> None:
    assert names_in(path.read_text(encoding="utf-8")) - COINED - ORDINARY == set()
