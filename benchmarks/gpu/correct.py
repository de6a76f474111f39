"""Does every faster way compute the same? Loss and gradients of one step against a reference in float32.

The reference has the very weights that bitsandbytes unpacks, in float32, plain torch operations, and one row at a time:
no packing, no kernels, no recomputation. The plain path's distance from it is what rounding costs; a faster way may be
half as far again, and no further.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.gpu import rows as rows_
from benchmarks.gpu.case import Case, Context, Turn
from benchmarks.gpu.models import Device, Quantization, build
from benchmarks.gpu.rows import ALL_OFF, Rows
from benchmarks.gpu.speed import ALL_ON
from benchmarks.measuring import Failed

if TYPE_CHECKING:
    import torch

    from finetune.config.schema import Config
    from finetune.data.prepare import PreparedData
    from finetune.model.base import LoadedModel

ROWS = Rows("chats", 512, 1, 2, count=24)

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({}, {"attention": "varlen"}),
    "fused": ({}, {"fused": True}),
    "lora": ({}, {"lora": True}),
    "head": ({}, {"head": True}),
    "all": ({}, ALL_ON),
    "half recomputed": ({"gradient_checkpointing": 2}, {}),
    "all, half recomputed": ({"gradient_checkpointing": 2}, ALL_ON),
    "all, offloaded": ({"gradient_checkpointing": True, "offload": True}, ALL_ON),
    # The compiler takes the place of lora and fused (train/speed.py): what is left beside it are these two.
    "compiled, attention, head": ({}, {"attention": "varlen", "head": True, "compile": True}),
}
"""What differs from the plain path in `train:` and `speed:`."""

FURTHER, FLOOR = 1.5, {"bfloat16": 1e-3, "float32": 1e-5}
"""How far from the reference a way may be: so many times the plain path's distance, and a little where that is none."""

Gradients = dict[str, "torch.Tensor"]


SHORT = {
    ("small-llama", "nf4"): tuple(WAYS),
    ("small-mistral", "nf4"): ("all", "attention"),
    ("small-qwen2", "nf4"): ("all", "lora"),
    ("small-llama", "none"): ("all", "lora"),
}
"""What is looked at first: every way once, and where other families and a base in 16 bit take other paths. What is
compiled takes long, is off unless somebody asks for it, and has its turn with the other switches."""


def _turn(shape: str, quantization: Quantization, way: str) -> Turn:
    if way not in SHORT.get((shape, quantization), ()):
        return Turn.REST
    return Turn.SWITCHES if "compiled" in way else Turn.CORRECT


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case(f"tiny, nf4, {way}", partial(measure, "tiny", "nf4", way), seconds=15) for way in ("all", "lora")]
    shapes: list[tuple[str, Quantization]] = [("small-llama", "nf4"), ("small-mistral", "nf4"), ("small-qwen2", "nf4")]
    shapes += [("small-llama", "none"), ("small-qwen2", "none")]
    return [
        Case(
            f"{shape}, {quantization}, {way}",
            partial(measure, shape, quantization, way),
            seconds=60 if "compiled" in way else 5,
            turn=_turn(shape, quantization, way),
            process="compiled" if "compiled" in way else "ours",
        )
        for shape, quantization in shapes
        for way in WAYS
    ]


def wrong(one: dict[str, Any]) -> str:
    return "" if one["equal"] else "does not compute the same as the plain path"


def measure(shape: str, quantization: Quantization, way: str, context: Context) -> dict[str, Any]:
    """The distance of the way and of the plain path from the reference, and the verdict."""
    import torch

    from finetune.model.adapter import add_adapter
    from finetune.model.base import LoadedModel
    from finetune.model.hardware import detect

    device = context.device
    plain = rows_.config(ROWS, context.folder, steps=1, quantization=quantization, speed=ALL_OFF)
    data = rows_.prepare(ROWS, context.folder, shape, plain)
    # One step sees every row, in two micro batches: which rows come first does not matter then.
    rows = dataclasses.replace(ROWS, micro_batch=math.ceil(data.sequences / 2))
    train, speed = WAYS[way]
    loaded = LoadedModel(build(shape, quantization, device), detect())
    model = add_adapter(plain, loaded)
    generator = torch.Generator(device.name).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Values that bfloat16 holds: TRL rounds a quantised model's adapter to it before ft takes it back.
                noise = torch.randn(parameter.shape, generator=generator, device=device.name) * 0.02
                parameter.copy_(noise.bfloat16().float())
    loaded = LoadedModel(model, loaded.hardware)
    truth = reference(model, data, device)
    found: dict[str, Any] = {}
    for name, (more_train, more_speed) in {"plain": ({}, {}), "way": (train, speed)}.items():
        config = rows_.config(
            rows,
            context.folder,
            steps=1,
            quantization=quantization,
            train={"gradient_checkpointing": False, "max_grad_norm": 1e9} | more_train,
            speed=ALL_OFF | more_speed,
        )
        taken, loss, reasons = one_step(config, data, loaded, context, name)
        found[name] = distances(taken, loss, *truth)
        found[f"{name} reasons"] = reasons
    floor = FLOOR["bfloat16" if device.dtype == torch.bfloat16 else "float32"]
    found["equal"] = all(found["way"][key] <= FURTHER * found["plain"][key] + floor for key in found["plain"])
    return found


def one_step(
    config: Config, data: PreparedData, loaded: LoadedModel, context: Context, name: str
) -> tuple[Gradients, float, dict[str, str]]:
    """Gradients and loss of one step of ft's trainer, which is not taken: the adapter stays as it is."""
    from transformers import TrainerCallback

    from finetune.console import Console
    from finetune.model.recompute import blocks, recompute_layers
    from finetune.plan.estimate import as_written
    from finetune.runs.folder import RunFolder
    from finetune.stopping import Stopper
    from finetune.train.sft import _Attempt
    from finetune.train.speed import make_faster

    gradients: Gradients = {}
    losses: list[float] = []

    class Catching(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            for key, parameter in loaded.model.named_parameters():
                if parameter.grad is not None:
                    gradients[key] = parameter.grad.detach().float().clone()
                    parameter.grad = None

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            losses.extend([float(logs["loss"])] if logs and "loss" in logs else [])

    run = RunFolder(context.folder / name)
    run.create()
    faster = make_faster(config, loaded, packed=data.packs is not None)
    try:
        fit = as_written(config, len(blocks(loaded.model)), loaded.hardware.device)
        recompute_layers(loaded.model, fit.recomputed, offload=fit.offload)
        attempt = _Attempt(config, data, loaded, faster, run, Console(), Stopper(), {})
        trainer = attempt._trainer(fit)
        attempt._reset_adapter()
        trainer.add_callback(Catching())
        trainer.train()
        trainer.let_go()
    finally:
        faster.restore()
    if not gradients or not losses:
        raise Failed("the trainer took no step")
    return gradients, losses[0], faster.reasons


def reference(model: Any, data: PreparedData, device: Device) -> tuple[Gradients, float]:
    """Loss and gradients in float32, row by row, of all rows."""
    import torch

    exact = copy.deepcopy(model)
    for module in exact.modules():
        base = getattr(module, "base_layer", None)
        if base is not None and hasattr(base.weight, "quant_state"):
            module.base_layer = _unpacked(base)
    exact.float().train()
    exact.zero_grad(set_to_none=True)
    count = sum(int((row.labels()[1:] != -100).sum()) for row in data.train)
    total = 0.0
    for row in data.train:
        ids = torch.from_numpy(row.ids.astype("int64")).to(device.name).unsqueeze(0)
        labels = torch.from_numpy(row.labels().astype("int64")).to(device.name)
        logits = exact(input_ids=ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum") / count
        torch.autograd.backward(loss)
        total += float(loss.detach())
    gradients = {name: p.grad.clone() for name, p in exact.named_parameters() if p.grad is not None}
    return gradients, total


def _unpacked(base: Any) -> torch.nn.Linear:
    import bitsandbytes.functional as bnb
    import torch

    weight = bnb.dequantize_4bit(base.weight.data, base.weight.quant_state)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    if base.bias is not None:
        linear.bias = torch.nn.Parameter(base.bias.detach().float(), requires_grad=False)
    return linear


def distances(taken: Gradients, loss: float, truth: Gradients, true_loss: float) -> dict[str, float]:
    """Relative errors: of the loss, of all gradients together, and of the tensor that is furthest off."""
    import torch

    if set(taken) != set(truth):
        raise Failed(f"other parameters have gradients: {sorted(set(taken) ^ set(truth))[:4]}")
    each = {name: float((taken[name] - truth[name]).norm() / truth[name].norm()) for name in truth}
    off = torch.stack([(taken[name] - truth[name]).norm() for name in truth]).norm()
    whole = torch.stack([truth[name].norm() for name in truth]).norm()
    return {
        "loss": abs(loss - true_loss) / true_loss,
        "gradients": float(off / whole),
        "worst tensor": max(each.values()),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, one in found.items():
        numbers = [
            f"{one[path][key]:.1e}" for key in ("loss", "gradients", "worst tensor") for path in ("plain", "way")
        ]
        rows.append([name, "yes" if one["equal"] else "NO", *numbers])
    header = ["case", "equal", "loss, plain", "loss", "gradients, plain", "gradients", "worst tensor, plain"]
    return measuring.table([*header, "worst tensor"], rows)
