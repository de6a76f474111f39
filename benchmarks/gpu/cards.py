"""Smaller cards, stood for by a cap on what this process may take: does `fit: auto` train there, and how fast?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import measuring
from benchmarks.gpu import rows as rows_
from benchmarks.gpu import ways
from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.models import Device
from benchmarks.gpu.rows import Rows
from benchmarks.measuring import Failed

CARDS: dict[int, list[tuple[str, int]]] = {
    12: [("llama3-8b", 2048), ("mistral-7b", 2048), ("qwen2.5-7b", 1024)],
    16: [("llama3-8b", 2048), ("llama3-8b", 4096), ("qwen2.5-7b", 2048)],
    8: [("llama3.2-1b", 2048), ("llama3.2-3b", 2048)],
    24: [("llama3-8b", 8192), ("mistral-7b", 8192), ("qwen2.5-7b", 4096)],
}
"""Memory of a card in GiB → models, and the length of their sequences in tokens. 16 sequences make a step."""


def cases(tiny: bool) -> list[Case]:
    wanted = [(8, "tiny", 64)] if tiny else [(size, *one) for size, models in CARDS.items() for one in models]
    return [
        Case(f"{size} GB, {model}, {length} tokens", partial(measure, size, model, length), seconds=10 if tiny else 120)
        for size, model, length in wanted
    ]


def measure(size: int, model: str, length: int, context: Context) -> dict[str, Any]:
    """Train a few steps in so many GiB. What was planned, what was used, and whether memory ran out on the way."""
    device = context.device
    rows = Rows("dense", length, 2, 8, count=64) if not device.tiny else Rows("dense", length, 2, 1, count=8)
    config = rows_.config(
        rows, context.folder, steps=4 if device.tiny else 6, quantization="nf4", train={"fit": "auto"}
    )
    data = rows_.prepare(rows, context.folder, model, config)
    memory = size * 2**30
    with capped(memory, device):
        found, _ = ways.ours(config, data, model, device, context.folder, memory=memory)
        found["reserved_gb"] = device.reserved() / 1e9
        found["outside_gb"] = device.outside() / 1e9
    found["cap_gb"] = memory / 1e9
    found["within"] = device.reserved() + device.outside() <= memory
    found["ran_out"] = [text for text in found["said"] if "out of memory" in text]
    return found


CONTEXT = int(0.55 * 2**30)
"""Bytes outside torch's allocator that a training has in the end, at least: libraries are loaded when they are used."""


@contextlib.contextmanager
def capped(memory: int, device: Device) -> Iterator[None]:
    """As if the card had so many bytes: torch's allocator gets what the context and the libraries leave of them."""
    import torch

    if device.name == "cpu":
        yield
        return
    torch.zeros(1, device="cuda")  # so that there is a context, whose size is known then
    _, total = torch.cuda.mem_get_info()
    share = (memory - max(device.outside(), CONTEXT)) / total
    if not 0 < share <= 1:
        raise Failed(f"a card of {memory / 2**30:.0f} GiB cannot be stood for by one of {total / 2**30:.0f} GiB")
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, one in found.items():
        fit = one["fit"]
        cut = f"{fit['micro_batch']} × {fit['accumulation']}, {fit['recomputed']} recomputed"
        cut += ", offloaded" if fit["offload"] else ""
        held = "yes" if one["within"] and not one["ran_out"] else "no"
        rows.append([name, held, cut, one["peak_gb"], one["reserved_gb"], one["outside_gb"], one["loss_tokens_per_s"]])
    header = ["card and model", "fits at once", "step", "peak GB", "reserved GB", "outside torch GB"]
    return measuring.table([*header, "tokens with loss a second"], rows)
