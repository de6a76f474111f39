"""Smaller cards, stood for by a cap on what this process may take: does `fit: auto` train there, and how fast?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import measuring
from benchmarks.gpu import guess, ways
from benchmarks.gpu import rows as rows_
from benchmarks.gpu.case import Case, Context, Turn
from benchmarks.gpu.models import Device
from benchmarks.gpu.rows import Rows
from benchmarks.measuring import Failed

CARDS: dict[int, list[tuple[str, int]]] = {
    12: [("llama3-8b", 2048), ("qwen2.5-7b", 1024)],
    16: [("llama3-8b", 4096), ("qwen2.5-7b", 2048)],
    8: [("llama3.2-3b", 2048)],
    24: [("llama3-8b", 8192)],
}
"""Memory of a card in GiB → models, and the length of their sequences in tokens."""

MORE: dict[int, list[tuple[str, int]]] = {
    12: [("mistral-7b", 2048)],
    8: [("llama3.2-1b", 2048)],
    24: [("mistral-7b", 8192), ("qwen2.5-7b", 4096)],
}
"""When there is time."""

STEP_TOKENS = 16384
"""So many tokens make a step; the plan cuts it."""


def cases(tiny: bool) -> list[Case]:
    wanted = [(size, *one, Turn.CARDS) for size, models in CARDS.items() for one in models]
    wanted += [(size, *one, Turn.REST) for size, models in MORE.items() for one in models]
    return [
        Case(
            f"{size} GB, {model}, {length} tokens",
            partial(measure, size, model, length),
            # A little slower than elsewhere: what is in the way waits in the machine's memory.
            seconds=guess.seconds(model, 16 if tiny else STEP_TOKENS, ways.SHORT, length=length, slow=1.3),
            turn=turn,
            process="capped",  # what a process has taken of the GPU outside torch does not come back
        )
        for size, model, length, turn in ([(8, "tiny", 64, Turn.CARDS)] if tiny else wanted)
    ]


def measure(size: int, model: str, length: int, context: Context) -> dict[str, Any]:
    """Train a few steps in so many GiB. What was planned, what was used, and whether memory ran out on the way."""
    device = context.device
    rows = Rows("dense", length, 2, 1 if device.tiny else STEP_TOKENS // length // 2, count=8 if device.tiny else 64)
    config = rows_.config(rows, context.folder, steps=ways.SHORT, quantization="nf4", train={"fit": "auto"})
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


@contextlib.contextmanager
def capped(memory: int, device: Device) -> Iterator[None]:
    """As if the card had so many bytes: torch's allocator gets what the context and the libraries leave of them."""
    import torch

    from finetune.plan.memory import CONTEXT

    if device.name == "cpu":
        yield
        return
    # Libraries are loaded when they are used: in the end a training has at least CONTEXT outside torch's allocator.
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
