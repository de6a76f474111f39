"""How fast a training step is and what memory it takes: ft, each of its switches alone, TRL, unsloth.

Shapes of Llama-3-8B, Mistral-7B and Qwen2.5-7B, base in nf4, LoRA of rank 16 on all linear layers. Dense: every
sequence full, loss on all tokens, so that nobody gains by packing. Chats: short, loss on the answers, which TRL pads by
default. An optimizer step has the same number of sequences (dense) or of rows (chats, on average) for all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from functools import partial
from typing import Any

from benchmarks import measuring
from benchmarks.gpu import rows as rows_
from benchmarks.gpu import ways
from benchmarks.gpu.cards import capped
from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.models import SHAPES, Device
from benchmarks.gpu.rows import ALL_OFF, Rows
from benchmarks.measuring import Failed

MODELS = ("llama3-8b", "mistral-7b", "qwen2.5-7b")
STEPS = 7

DATA: dict[str, Rows] = {
    "dense 2k": Rows("dense", 2048, 8, 1, count=64),
    "chats": Rows("chats", 2048, 2, 2, count=2000),
    "dense 8k": Rows("dense", 8192, 2, 1, count=32),
}

TINY_DATA: dict[str, Rows] = {"chats": Rows("chats", 512, 2, 1, count=60)}

SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "attention": ({}, {"attention": "varlen"}),
    "fused": ({}, {"fused": True}),
    "lora": ({}, {"lora": True}),
    "head": ({}, {"head": True}),
    "half recomputed": ({"gradient_checkpointing": "half"}, {}),
    "offload": ({"offload": True}, {}),
    "compile": ({}, {"compile": True}),
}
"""ft with everything off, and with one thing on: what differs in `train:` and in `speed:`."""

ALL_ON: dict[str, Any] = {"attention": "varlen", "fused": True, "lora": True, "head": True}

TRL_DEFAULTS: dict[str, Any] = {"per_device_train_batch_size": 8}
"""TRL as it comes (recomputation and bf16 are its own defaults), with the length that is trained on."""

TRL_TUNED: dict[str, Any] = {
    "packing": True,  # no padding; best-fit decreasing, rows kept apart by their positions
    "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the variant that torch recommends
    "optim": "adamw_torch_fused",  # one kernel for all adapters
    "tf32": True,  # for what is left in float32
    "use_liger_kernel": True,  # fused norms, rotary and SwiGLU (its fused head clashes with TRL's own)
    "dataloader_pin_memory": True,
    "dataloader_num_workers": 2,  # collation beside the GPU
}
"""TRL as somebody who knows it would set it up; attention is flash attention where its package is installed."""


def cases(tiny: bool) -> list[Case]:
    """The most telling first: a call that is cut off has them."""
    data = TINY_DATA if tiny else DATA
    found = []
    for number, model in enumerate(MODELS[:1] if tiny else MODELS):
        for kind in data:
            names = ["trl defaults", "ft auto", "trl tuned", "ft all, recomputed", "ft auto in half of trl's memory"]
            names += ["unsloth"]
            if tiny:
                names = names[:4]
            else:
                names += [f"ft {name}" for name in SWITCHES] if number == 0 else ["ft plain"]
            for way in names:
                name = f"{model}, {kind}, {way}"
                seconds = 10 if tiny else 250 if way == "ft compile" else 100
                found.append(Case(name, partial(measure, model, kind, way), seconds=seconds))
    return found


def measure(model: str, kind: str, way: str, context: Context) -> dict[str, Any]:
    """One way to train on one kind of rows."""
    from benchmarks.gpu.planned import operations_per_token
    from finetune.model.hardware import detect
    from finetune.plan.setup import Fit

    if way == "unsloth":
        ways.import_unsloth()  # it has to be there before what it changes
    device = context.device
    rows = (TINY_DATA if device.tiny else DATA)[kind]
    shape = device.shape(model)
    steps = 4 if device.tiny else STEPS
    rate = matrix_rate(device)
    train, speed, memory = _asked(way, shape, context.done, f"{model}, {kind}, trl defaults")
    config = rows_.config(rows, context.folder, steps=steps, quantization="nf4", train=train, speed=speed)
    data = rows_.prepare(rows, context.folder, shape, config)
    if way.startswith("ft"):
        with contextlib.nullcontext() if memory is None else capped(memory, device):
            found, fit = ways.ours(config, data, shape, device, context.folder, memory=memory)
    else:
        settings = _trl_settings(way, rows, data, device)
        if way == "unsloth":
            weights = _weights_of(shape, context)
            found = ways.unsloth(rows, data, weights, device, context.folder, steps, settings)
        else:
            attention = "flash_attention_2" if way == "trl tuned" and _has_flash() else "sdpa"
            found = ways.trl(
                rows, data, shape, "nf4", device, context.folder, steps, settings=settings, attention=attention
            )
            found["attention"] = attention
        fit = Fit(rows.micro_batch, rows.accumulation, SHAPES[shape]["num_hidden_layers"], False)
    per_token = operations_per_token(config, data, shape, detect(), fit)
    found |= {"matrix_tflops": rate / 1e12, "gflops_per_token": per_token / 1e9, "recomputed": fit.recomputed}
    found["of_ceiling"] = per_token * found["tokens_per_s"] / rate
    return found


def matrix_rate(device: Device) -> float:
    """Operations a second of a large matrix product in the dtype of training, random numbers: the ceiling here and now.

    The median of some blocks of products, after a warm-up of the clocks.
    """
    import torch

    size, products = (256, 2) if device.tiny else (8192, 10)
    left, right = (torch.randn(size, size, device=device.name).to(device.dtype) for _ in range(2))
    taken = []
    for _ in range(6):
        device.synchronize()
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right)
        device.synchronize()
        taken.append((time.perf_counter() - began) / products)
    rate = 2 * size**3 / statistics.median(taken[2:])
    del left, right
    device.clear()
    return rate


def _asked(way: str, shape: str, done: Any, reference: str) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """What `train:` and `speed:` say for a way of ft's, and how much memory it may believe in."""
    if way.startswith("ft auto"):
        memory = None
        if "half" in way:
            if not done.get(reference, {}).get("peak_gb"):
                raise Failed(f"needs the peak memory of {reference}")
            memory = int(done[reference]["peak_gb"] * 1e9 / 2)
        return {"fit": "auto"}, {}, memory
    if way == "ft all, recomputed":
        return {"gradient_checkpointing": True}, ALL_ON, None
    train, speed = SWITCHES.get(way.removeprefix("ft "), ({}, {}))
    train = {"gradient_checkpointing": True} | train
    if train["gradient_checkpointing"] == "half":
        train["gradient_checkpointing"] = SHAPES[shape]["num_hidden_layers"] // 2
    return train, ALL_OFF | speed, None


def _trl_settings(way: str, rows: Rows, data: Any, device: Device) -> dict[str, Any]:
    """TRL's arguments, its batch cut so that a step is as large as ours."""
    step = rows.micro_batch * rows.accumulation
    if way == "trl defaults" and rows.kind == "chats":
        # Rows, not packs: as many as lie in our packs on average, eight at a time.
        wanted = step * len(data.train) / data.sequences
        return TRL_DEFAULTS | {"gradient_accumulation_steps": max(1, round(wanted / 8))}
    if way == "trl defaults":
        return {"per_device_train_batch_size": rows.micro_batch, "gradient_accumulation_steps": rows.accumulation}
    settings = TRL_TUNED | {
        "per_device_train_batch_size": rows.micro_batch,
        "gradient_accumulation_steps": rows.accumulation,
        "packing": rows.kind == "chats",
    }
    if device.name == "cpu":
        settings |= {
            "use_liger_kernel": False,
            "tf32": None,
            "dataloader_pin_memory": False,
            "dataloader_num_workers": 0,
        }
    if way == "unsloth":
        settings = {
            key: settings[key] for key in ("packing", "per_device_train_batch_size", "gradient_accumulation_steps")
        }
        settings["optim"] = "adamw_8bit"  # as its notebooks have it
    return settings


def _weights_of(shape: str, context: Context) -> Any:
    """Real files for those who only load from files: the random model, saved in nf4."""
    from benchmarks.gpu.models import build, write_folder

    folder = write_folder(context.folder / "weights", shape)
    build(shape, "nf4", context.device).save_pretrained(folder)
    context.device.clear()
    return folder


def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def table(found: dict[str, dict[str, Any]]) -> str:
    """Per model and data: tokens with loss, memory, ceiling, and both against TRL's two ways."""
    lines = []
    for name, one in found.items():
        group = ", ".join(name.split(", ")[:2])
        row: list[object] = [name, one["loss_tokens_per_s"], one["peak_gb"], one["of_ceiling"]]
        for reference in ("trl defaults", "trl tuned"):
            other = found.get(f"{group}, {reference}")
            for key in ("loss_tokens_per_s", "peak_gb"):
                row.append(one[key] / other[key] if other and other[key] else None)
        lines.append([*row, f"{one['losses'][0]:.3f} → {one['losses'][-1]:.3f}"])
    header = ["case", "tokens with loss a second", "peak GB", "of the ceiling"]
    header += ["speed / TRL's defaults", "memory", "speed / TRL tuned", "memory", "loss, first and last"]
    return measuring.table(header, lines)
