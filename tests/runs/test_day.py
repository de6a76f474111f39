"""The day that chat templates are told: a run keeps the one on which it began."""

from __future__ import annotations

import datetime
import time

import pytest

from finetune.runs.manifest import day_of, today

FIRST = datetime.datetime(2026, 3, 1)


@pytest.mark.fault(
    "midnight passes before a run goes on", stage="preparing data", outcome="templates write the first day"
)
def test_a_run_keeps_its_day() -> None:
    assert day_of({"day": "2026-03-01", "started": "2026-03-04T08:00:00Z"}) == FIRST
    assert day_of({"started": "2026-03-01T23:59:59Z"}) == FIRST


@pytest.mark.parametrize(
    "manifest", [{}, {"day": None}, {"day": 7, "started": []}, {"day": "2026-13-01", "started": "yesterday"}]
)
def test_a_manifest_that_does_not_say(manifest: dict[str, object]) -> None:
    before = today()
    assert day_of(manifest) in (before, before + datetime.timedelta(days=1))


def test_the_day_is_utcs_and_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is the same on the next machine, wherever that is, and all day long."""
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        utc = datetime.datetime.now(datetime.UTC)
        assert abs(today() - utc.replace(tzinfo=None)) < datetime.timedelta(days=1, minutes=1)
        assert today().time() == datetime.time()
    monkeypatch.undo()
    time.tzset()
