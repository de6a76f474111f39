"""The fork server, once for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import seccomp
from tests.faults.harness import FaultServer


@pytest.fixture(scope="session")
def server() -> Iterator[FaultServer]:
    """`ft` with faults; tests that need it are skipped where the system does not let system calls be watched."""
    if reason := seccomp.missing():
        pytest.skip(reason)
    with FaultServer() as running:
        yield running
