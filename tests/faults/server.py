"""A process that has imported everything once and becomes `ft` again and again: a fork takes 20 ms, the imports 10 s.

It is asked over a socket (descriptor in argv[1]). A request is a line of JSON with four open files: the output's two,
where to send the descriptor that a watched command's system calls are announced on, and nothing else. It answers with
two lines: the process's number, and how it ended. Nothing here may start threads: a fork would lose them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from finetune.runs.log import quiet_environment
from tests.faults import seccomp

BASE = Path(__file__).parents[2] / "data" / "samples" / "quickstart-base"


def main() -> None:
    _end_with_parent()
    asked = socket.socket(fileno=int(sys.argv[1]))
    asked.set_inheritable(False)
    _import_everything()
    _warm_up()
    assert not _other_threads(), f"a fork would lose threads: {_other_threads()}"
    gc.collect()
    gc.freeze()  # pages that the collector never touches stay shared
    asked.sendall(b'{"ready": true}\n')
    while True:
        data, descriptors, _, _ = socket.recv_fds(asked, 2**16, 3)
        if not data:
            return
        request = json.loads(data)
        child = os.fork()
        if child == 0:
            asked.close()
            _become(request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        asked.sendall(json.dumps({"process": child}).encode() + b"\n")
        asked.sendall(json.dumps({"status": os.waitpid(child, 0)[1]}).encode() + b"\n")


def _end_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _import_everything() -> None:
    """What commands import, but for `finetune.cli`: it holds on to the streams that are there when it is imported."""
    quiet_environment()
    import bitsandbytes
    import datasets
    import gguf
    import peft
    import torch
    import transformers
    import trl
    import typer
    import xllamacpp

    import finetune.delivery
    import finetune.evaluate.compare
    import finetune.export.gguf
    import finetune.export.merge
    import finetune.export.verify.proof
    import finetune.proving
    import finetune.train.sft

    assert all((bitsandbytes, datasets, gguf, peft, torch, transformers, trl, typer, xllamacpp))
    assert finetune.train.sft is not None


def _warm_up() -> None:
    """Load a model in 4 bit and put a LoRA on it, once: half of what a short command does is done once per process."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    AutoTokenizer.from_pretrained(BASE)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=quantised)
        get_peft_model(model, LoraConfig(target_modules="all-linear"))


def _other_threads() -> list[str]:
    """Threads that a fork would lose. (jemalloc, in pyarrow, has one, which it starts anew by itself.)"""
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    names = [(task / "comm").read_text().strip() for task in others]
    return [name for name in names if name != "jemalloc_bg_thd"]


def _become(request: dict[str, Any], stdout: int, stderr: int, control: int | None = None) -> NoReturn:
    """Run `ft` in this process, as if it had just been started, and exit as it does."""
    status = 70
    try:
        _end_with_parent()
        os.setsid()  # all that it starts can be ended with it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for descriptor in (stdout, stderr):
            os.close(descriptor)
        sys.argv = ["ft", *request["arguments"]]
        if control is not None:
            with socket.socket(fileno=control) as sender:
                listener = seccomp.install()
                socket.send_fds(sender, [b"\0"], [listener])
                os.close(listener)
        from finetune.cli import main as ft

        ft()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # As an interpreter that ends would wait for threads that are still at work, and no longer.
        import threading

        threading._shutdown()  # type: ignore[attr-defined]
        os._exit(status)


if __name__ == "__main__":
    main()
