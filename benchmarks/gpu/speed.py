"""How fast a training step is and what memory it takes: ft, each of its switches alone, TRL, unsloth.

Shapes of Llama-3-8B, Mistral-7B and Qwen2.5-7B, base in nf4, LoRA of rank 16 on all linear layers. Dense: every
sequence full, loss on all tokens, so that nobody gains by packing. Chats: short, loss on the answers, which TRL pads by
default. An optimizer step has the same number of sequences (dense) or of rows (chats, on average) for all. Each case is
one run of twelve steps after three that do not count; ways.py and `ratios` in speed_table.py say what is compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import guess, ways
from benchmarks.gpu import rows as rows_
from benchmarks.gpu.cards import capped
from benchmarks.gpu.case import Case, Context, Turn
from benchmarks.gpu.models import SHAPES, Device
from benchmarks.gpu.rows import ALL_OFF, Rows
from benchmarks.gpu.speed_table import AGAIN, table
from benchmarks.gpu.trl_settings import FLEX, NOT_RECOMPUTED, attention_of, trl_settings
from benchmarks.measuring import Failed

if TYPE_CHECKING:
    from finetune.config.schema import Config
    from finetune.data.prepare import PreparedData
    from finetune.model.hardware import Hardware
    from finetune.plan.setup import Fit

__all__ = ["cases", "measure", "table"]

MODELS = ("llama3-8b", "mistral-7b", "qwen2.5-7b")
STEPS = ways.WARM_UP + ways.MEASURED

DATA: dict[str, Rows] = {
    # Eight sequences are TRL's default batch.
    "dense 2k": Rows("dense", 2048, 8, 1, count=128),
    "chats": Rows("chats", 2048, 2, 2, count=800),
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

IN_TRLS, IN_HALF = "ft auto in trl's memory", "ft auto in half of trl's memory, or the least"
"""ft with no more memory than TRL's defaults took; and with half of that, or, where the base, the adapter and one
sequence alone are more than half, with the least that ft can do with."""

RATE_WARM_UP = 1.0
"""Seconds of products before their rate is taken: clocks rise, and power limits begin to be felt."""


def cases(tiny: bool) -> list[Case]:
    """What is measured of each model and kind of rows, and when. Those that need no process of their own go first."""
    if tiny:
        few = ("trl defaults", "ft auto", "trl tuned", NOT_RECOMPUTED, IN_HALF, "ft all, recomputed")
        named = [(MODELS[0], "chats", way, Turn.TELLING, "") for way in few]
    else:
        named = list(_named())
    return [
        Case(
            f"{model}, {kind}, {way}{again}",
            partial(measure, model, kind, way),
            seconds=15 if tiny else _guess(model, kind, way),
            turn=turn,
            process=_process(way),
            needs="unsloth" if way == "unsloth" else "",
        )
        for model, kind, way, turn, again in named
    ]


def _named() -> Iterator[tuple[str, str, str, Turn, str]]:
    """Model, rows, way, turn, and a mark on what is measured a second time. Ways that may share a process stand
    together, so that few have to be started."""
    first, others = MODELS[0], MODELS[1:]
    for kind in ("dense 2k", "chats"):
        for way in ("trl defaults", "ft auto", "ft plain", IN_TRLS, IN_HALF, "ft all, recomputed"):
            yield first, kind, way, Turn.TELLING, ""
        yield from ((model, kind, way, Turn.TELLING, "") for model in others for way in ("trl defaults", "ft auto"))
        yield from ((model, kind, "trl tuned", Turn.TELLING, "") for model in MODELS)
        yield first, kind, NOT_RECOMPUTED, Turn.TELLING, ""
    yield first, "chats", FLEX, Turn.TELLING, ""
    yield from ((first, "dense 8k", way, Turn.TELLING, "") for way in ("trl defaults", "ft auto", "trl tuned"))
    yield from ((first, "dense 8k", way, Turn.MEMORY, "") for way in (IN_HALF, IN_TRLS, "ft plain"))
    yield from ((first, "dense 2k", way, Turn.MEMORY, AGAIN) for way in ("trl defaults", "ft auto"))
    for kind in ("dense 2k", "chats"):
        for way in (IN_HALF, IN_TRLS, "ft plain"):
            yield from ((model, kind, way, Turn.MEMORY, "") for model in others)
        yield from ((model, kind, NOT_RECOMPUTED, Turn.MEMORY, "") for model in others)
    switches = [f"ft {name}" for name in SWITCHES if name != "plain"]
    yield from ((first, "dense 2k", way, Turn.SWITCHES, "") for way in switches)
    yield from ((model, kind, "unsloth", Turn.OTHERS, "") for model in MODELS for kind in ("dense 2k", "chats"))
    yield first, "dense 8k", "unsloth", Turn.OTHERS, ""
    yield from ((first, kind, way, Turn.REST, "") for kind in ("chats", "dense 8k") for way in switches)
    yield from ((model, "chats", FLEX, Turn.REST, "") for model in others)
    for model in others:
        yield from ((model, kind, "ft all, recomputed", Turn.REST, "") for kind in DATA)
        for way in ("trl defaults", "ft plain", "ft auto", IN_HALF, "trl tuned"):
            yield model, "dense 8k", way, Turn.REST, ""
    yield first, "dense 8k", "ft all, recomputed", Turn.REST, ""


def _process(way: str) -> str:
    """TRL's tuned ways set how torch multiplies in float32 and what transformers' modules are made of, unsloth and the
    compiler change more."""
    return "tuned" if way.startswith("trl tuned") else way if way in ("unsloth", "ft compile") else "ours"


def _guess(model: str, kind: str, way: str) -> float:
    rows = DATA[kind]
    # Padding, and kernels that are not fused; the other way round, what is not recomputed.
    slow = {"trl defaults": 1.6 if kind == "chats" else 1.3, "ft auto": 0.8, "ft compile": 1.2}.get(way, 1.0)
    recomputed = 0.0 if way in ("ft auto", NOT_RECOMPUTED) else 1.0
    tokens = rows.micro_batch * rows.accumulation * rows.length
    found = guess.seconds(model, tokens, STEPS, length=rows.length, recomputed=recomputed, slow=slow)
    return found + (60 if way in ("ft compile", FLEX, "unsloth") else 0)


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
    steps = ways.SHORT if device.tiny else STEPS
    rate = matrix_rate(device)
    train, speed = _asked(way, shape)
    config = rows_.config(rows, context.folder, steps=steps, quantization="nf4", train=train, speed=speed)
    data = rows_.prepare(rows, context.folder, shape, config)
    if way.startswith("ft"):
        bound = Bound()
        if way in (IN_TRLS, IN_HALF):
            reference = context.done.get(f"{model}, {kind}, trl defaults", {}).get("peak_gb")
            bound = _bound(way, config, data, shape, detect(), reference)
        with contextlib.nullcontext() if bound.memory is None else capped(bound.memory, device):
            found, fit = ways.ours(config, data, shape, device, context.folder, memory=bound.memory, fit=bound.fit)
        found |= bound.said
    else:
        settings = trl_settings(way, rows, data, device)
        if way == "unsloth":
            weights = _weights_of(shape, context)
            found = ways.unsloth(rows, data, weights, device, context.folder, steps, settings)
            found["attention"] = "its own"
        else:
            attention = attention_of(way)
            found = ways.trl(
                rows, data, shape, "nf4", device, context.folder, steps, settings=settings, attention=attention
            )
            found["attention"] = attention
        recomputed = 0 if way == NOT_RECOMPUTED else SHAPES[shape]["num_hidden_layers"]
        micro, accumulation = (settings[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
        fit = Fit(micro, accumulation, recomputed, False)
        found["fit"] = dataclasses.asdict(fit)
    per_token = operations_per_token(config, data, shape, detect(), fit)
    found |= {"matrix_tflops": rate / 1e12, "gflops_per_token": per_token / 1e9}
    found["of_ceiling"] = per_token * found["tokens_per_s"] / rate
    return found


@dataclasses.dataclass(frozen=True)
class Bound:
    """How much memory ft may take."""

    memory: int | None = None
    """Bytes of the card that is stood for."""
    fit: Fit | None = None
    """How the step is cut, where that is not left to the plan."""
    said: dict[str, Any] = dataclasses.field(default_factory=dict)


def _bound(
    way: str, config: Config, data: PreparedData, shape: str, hardware: Hardware, reference_gb: float | None
) -> Bound:
    """A card that is as large as what TRL took, or half of it; or the least, where that is more than half."""
    from benchmarks.gpu.planned import least_fit, within

    least, needed = least_fit(config, data, shape, hardware)
    if hardware.device == "cpu":  # nobody counts memory there
        return Bound(fit=least, said={"half_possible": False, "least_gb": needed / 1e9, "half_gb": None})
    if not reference_gb:
        raise Failed("needs the peak memory of TRL's defaults, which were not measured")
    tensors = reference_gb * 1e9
    if way == IN_TRLS:
        return Bound(within(round(tensors)))
    said = {"half_possible": needed <= tensors / 2, "least_gb": needed / 1e9, "half_gb": tensors / 2e9}
    return Bound(within(round(tensors / 2)), said=said) if said["half_possible"] else Bound(fit=least, said=said)


def matrix_rate(device: Device) -> float:
    """Operations a second of a large matrix product in the dtype of training, random numbers: the ceiling here and now.

    The median of some blocks of products, after a second of them.
    """
    import torch

    size, products = (256, 2) if device.tiny else (8192, 10)
    left, right = (torch.randn(size, size, device=device.name).to(device.dtype) for _ in range(2))
    warm = time.perf_counter() + (0.0 if device.tiny else RATE_WARM_UP)
    while time.perf_counter() < warm:
        torch.mm(left, right)
        device.synchronize()
    taken = []
    for _ in range(5):
        device.synchronize()
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right)
        device.synchronize()
        taken.append((time.perf_counter() - began) / products)
    rate = 2 * size**3 / statistics.median(taken)
    del left, right
    device.clear()
    return rate


def _asked(way: str, shape: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `train:` and `speed:` say for a way of ft's."""
    if way.startswith("ft auto"):
        return {"fit": "auto"}, {}
    if way == "ft all, recomputed":
        return {"gradient_checkpointing": True}, ALL_ON
    train, speed = SWITCHES.get(way.removeprefix("ft "), ({}, {}))
    train = {"gradient_checkpointing": True} | train
    if train["gradient_checkpointing"] == "half":
        train["gradient_checkpointing"] = SHAPES[shape]["num_hidden_layers"] // 2
    return train, ALL_OFF | speed


def _weights_of(shape: str, context: Context) -> Any:
    """Real files for those who only load from files: the random model, saved in nf4."""
    from benchmarks.gpu.models import build, write_folder

    folder = write_folder(context.folder / "weights", shape)
    build(shape, "nf4", context.device).save_pretrained(folder)
    context.device.clear()
    return folder
