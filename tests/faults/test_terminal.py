"""The terminal goes: an ssh connection breaks, or a person closes the window."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from finetune.runs.folder import RunFolder
from tests.test_pipeline import write_config


@pytest.mark.skipif(sys.platform != "linux", reason="controlling terminals as Linux has them")
@pytest.mark.fault("the terminal is closed", stage="training", outcome="saved at the end of the step, exit code 75")
def test_a_run_is_saved_when_its_terminal_goes(tmp_path: Path) -> None:
    write_config(tmp_path, max_steps=500)
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(2, termios.TIOCSCTTY, 0)
        # pytest may have been started by `nohup`, which is inherited.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.cli", "train", "tiny.yaml", "-s", "train.save_every=1000"],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=own_terminal,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    run = RunFolder(tmp_path / "runs" / "tiny")
    deadline = time.monotonic() + 120
    try:
        while not run.metrics.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            try:
                os.read(ours, 65536)
            except BlockingIOError:
                time.sleep(0.02)
    finally:
        os.close(ours)
    assert process.wait(60) == 75
    assert run.state == "interrupted"
    assert len(list(run.checkpoints.glob("checkpoint-*"))) == 1
