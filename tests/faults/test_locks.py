"""A run belongs to one process at a time, and to nobody once that process is gone, however it went."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.runs.folder import RunFolder
from tests.faults.harness import ROOT, FaultServer
from tests.faults.test_kill import CONFIG, SAMPLES
from tests.faults.watch import Kill

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from finetune.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, flush=True)
    time.sleep(60)
"""
"""A process that works in a run, with a child that outlives it (as llama.cpp might)."""


@contextlib.contextmanager
def working_in(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run's lock. Its child is there until the end."""
    run.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            yield holder
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def config(folder: Path, rows: list[str]) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(base=SAMPLES / "quickstart-base", rows=folder / "rows.jsonl"), "utf-8")
    return path


@pytest.mark.fault("two commands in one run", stage="training", outcome="the second names the first, at once")
def test_a_second_command_says_at_once_which_process_is_there(tmp_path: Path) -> None:
    path = config(tmp_path, (SAMPLES / "contract-clauses.jsonl").read_text("utf-8").splitlines()[:24])
    with working_in(tmp_path / "runs" / "tiny") as holder:
        command = [sys.executable, "-m", "finetune.cli", "train", str(path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr is not None
            said = second.stderr.read()
            _, status, used = os.wait4(second.pid, 0)
            second.returncode = os.waitstatus_to_exitcode(status)
    assert second.returncode == 1
    assert f"in use by process {holder.pid}" in said
    # What it computes, since the machine may be busy with something else.
    assert used.ru_utime + used.ru_stime < 2


@pytest.mark.fault("kill -9", stage="any", outcome="the run is free at once, even while a child lives on")
def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    with working_in(tmp_path / "run") as holder:
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path / "run").lock():
            pass


@pytest.mark.fault("kill -9", stage="tokenising on several cores", outcome="no process is left behind")
def test_a_killed_command_leaves_no_processes(server: FaultServer, tmp_path: Path) -> None:
    """Forked workers hold everything that their parent had open, its lock too. (The harness waits for them.)"""
    texts = (f"Clause {number}: rent falls due on day {number * 7919 % 9973}." for number in range(4000))
    rows = [json.dumps({"prompt": text, "completion": str(len(text))}) for text in texts]
    path = config(tmp_path, rows)
    undisturbed = server.run("data", path, cwd=tmp_path)
    assert undisturbed.code == 0, undisturbed
    tokens = [number for number, event in enumerate(undisturbed.events) if event.size and "ids.bin" in event.path]
    shutil.rmtree(tmp_path / "runs")
    killed = server.run("data", path, cwd=tmp_path, fault=Kill(tokens[0]))
    assert killed.signal == signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="limits on files as POSIX has them")
def test_a_disk_without_a_byte_does_not_keep_a_run_from_being_held(tmp_path: Path) -> None:
    """`ft clean` has to hold the run that it makes room in."""
    code = f"""
import resource, signal
from pathlib import Path
from finetune.runs.folder import RunFolder
run = RunFolder(Path({str(tmp_path / "run")!r}))
run.create()
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
with run.lock():
    print("held")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("held\n", "", 0)
