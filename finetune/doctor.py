"""`ft doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.console import Console, size
from finetune.runs.log import quiet_environment
from finetune.runs.manifest import LIBRARIES

EXTRAS = {
    "gguf": ("gguf", "GGUF export", 'pip install "finetune[gguf]"'),
    "xllamacpp": ("xllamacpp", "answering from a GGUF file", 'pip install "finetune[gguf]"'),
    "liger_kernel": ("liger_kernel", "fused kernels for a GPU (speed.fused)", 'pip install "finetune[fast]"'),
    "wandb": ("wandb", "tracking: wandb", 'pip install "finetune[wandb]"'),
}


def examine(console: Console) -> bool:
    """Print one line per finding; False when something that every run needs is missing."""
    quiet_environment()
    healthy = True
    for good, what, advice in findings():
        mark = console.style("ok  ", "green") if good else console.style("MISS" if good is False else "note", "yellow")
        console.say(f"{mark} {what}")
        if advice:
            console.say(f"     hint: {advice}")
        healthy = healthy and good is not False
    return healthy


def findings() -> Iterator[tuple[bool | None, str, str | None]]:
    """(True fine, None worth knowing, False broken), what was found, what to do."""
    yield True, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}", None
    missing = []
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield True, ", ".join(found), None
    if missing:
        yield False, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}"
        return
    from finetune.model.hardware import detect, total_ram, usable_cores

    hardware = detect()
    if hardware.device == "cuda":
        yield True, f"GPU {hardware.name}, {size(hardware.memory)}; computes in {hardware.dtype_reason}", None
    else:
        yield (
            None,
            "no CUDA GPU: training runs on the CPU, which suits models of a few million parameters",
            "if there is a card, check `nvidia-smi` and that torch is a CUDA build",
        )
    yield True, f"{usable_cores()} CPU cores, {size(total_ram())} RAM", None
    free = shutil.disk_usage(Path.cwd()).free
    # An 8B model in 16 bit is 16 GB; merging it writes as much again.
    roomy = free > 20 * 2**30
    yield (
        (True if roomy else None),
        f"{size(free)} free on this disk",
        None if roomy else "an 8B model needs 20 GB and more",
    )
    for package, what, how in EXTRAS.values():
        installed = importlib.util.find_spec(package) is not None
        yield (
            (True if installed else None),
            f"{what}: {'installed' if installed else 'not installed'}",
            None if installed else how,
        )
    token = bool(os.environ.get("HF_TOKEN")) or (Path.home() / ".cache" / "huggingface" / "token").is_file()
    yield (
        (True if token else None),
        "logged in to the Hugging Face Hub" if token else "not logged in to the Hugging Face Hub",
        None if token else "`hf auth login`, if you want gated models such as Llama",
    )
