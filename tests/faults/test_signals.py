"""Asked to stop, wherever it is: one exit code, never "done", and the same command makes what it would have made."""

from __future__ import annotations

import signal

import pytest

from tests.faults.harness import FaultServer
from tests.faults.test_kill import COMMANDS, Bench, Moment, content, differences
from tests.faults.watch import Kill

STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: try the same again."""

MOMENTS = {
    "tokenising": (Moment("train", r"^write runs/\.data/", 0.5), signal.SIGTERM),
    "before the model is loaded": (Moment("train", r"^open .*/log\.txt"), signal.SIGHUP),
    "a training step": (Moment("train", r"^write .*/metrics\.jsonl", 0.5), signal.SIGINT),
    "a checkpoint is saved": (Moment("train", r"^write\S* \S*checkpoint-2\S*optimizer", 0.5), signal.SIGTERM),
    "the adapter is saved": (Moment("train", r"^write\S* runs/tiny/adapter\.partial", 0.5), signal.SIGINT),
    "after the evaluation": (Moment("train", r"^open .*/evaluation\.json"), signal.SIGHUP),
    "merging": (Moment("merge, unproven", r"^pwrite .*model\.safetensors", 0.5), signal.SIGINT),
    "writing GGUF": (Moment("gguf, unproven", r"^write .*\.gguf", 0.5), signal.SIGTERM),
    "the proof is written down": (Moment("gguf", r"^open .*/verification\.json"), signal.SIGTERM),
}


@pytest.fixture(scope="module")
def bench(server: FaultServer, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(server, tmp_path_factory.mktemp("signals"))


@pytest.mark.fault("SIGTERM, SIGINT, SIGHUP", stage="every stage", outcome="exit code 75; the same command finishes")
@pytest.mark.parametrize("name", MOMENTS)
def test_a_signal_stops_in_good_order_and_the_same_command_goes_on(
    bench: Bench, server: FaultServer, name: str
) -> None:
    moment, number = MOMENTS[name]
    reference = bench.reference(moment.stage)
    bench.restore(reference.before)
    kill = moment.kill(reference.events)
    stopped = server.run(*COMMANDS[moment.stage], cwd=bench.work, fault=Kill(kill.at, signal=number))
    assert stopped.code == STOPPED, stopped
    assert stopped.stderr.splitlines()[-1] == f"stopped ({number.name}): the same command goes on"
    assert "done:" not in stopped.stderr
    assert "Traceback" not in stopped.stderr
    again = server.run(*COMMANDS[moment.stage], cwd=bench.work)
    assert again.code == 0, again
    assert differences(reference.after, content(bench.work)) == []
