"""Pages that are made from something are as it says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ALL_ITEMS
from tests.reliability import faults, page

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_faults_is_that_of_the_tests(request: pytest.FixtureRequest) -> None:
    if request.config.invocation_params.args and any(
        not str(argument).startswith("-") and Path(str(argument)).exists()
        for argument in request.config.invocation_params.args
    ):
        pytest.skip("only some of the tests were asked for")
    found = faults(request.config.stash[ALL_ITEMS])
    assert (DOCS / "reliability.md").read_text("utf-8") == page(found), "`make docs` writes it anew"
