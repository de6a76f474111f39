"""Signals: where they arrive, or held until they suit; a second one does not wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from finetune.stopping import Stopped, Stopper, stoppable


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_raises_where_it_arrives(name: str) -> None:
    before = signal.getsignal(getattr(signal, name))
    with stoppable() as stopper, pytest.raises(Stopped, match=name):
        signal.raise_signal(getattr(signal, name))
    assert stopper.asked == name
    assert signal.getsignal(getattr(signal, name)) is before


def test_what_is_held_is_only_noted_until_somebody_looks() -> None:
    with stoppable() as stopper:
        with stopper.held():
            signal.raise_signal(signal.SIGTERM)
        assert stopper.asked == "SIGTERM"
        with pytest.raises(Stopped, match="SIGTERM"):
            stopper.stop_if_asked()


def test_without_a_signal_nobody_stops() -> None:
    with stoppable() as stopper:
        stopper.stop_if_asked()
    assert Stopper().asked is None


HELD = """
import time
from finetune.stopping import stoppable
with stoppable() as stopper, stopper.held():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


@pytest.mark.fault("a second Ctrl-C", stage="any", outcome="ends at once")
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_on_the_spot(second: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(second)
    assert process.wait(5) == -second


def test_what_was_ignored_stays_ignored() -> None:
    """`nohup ft train …`: the terminal goes, the run does not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as stopper:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stopper.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_change_nothing() -> None:
    found: list[object] = []

    def work() -> None:
        with stoppable():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
