"""TRL as it comes, and as somebody who knows it would set it up."""

from __future__ import annotations

import importlib.util
from typing import Any

from benchmarks.gpu.models import Device
from benchmarks.gpu.rows import Rows

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
"""TRL as somebody who knows it would set it up. Attention is flash attention where its package is installed, else
torch's own."""

NOT_RECOMPUTED = "trl tuned, not recomputed"
"""Tuned for a card with room to spare: what it keeps takes more memory, so that a micro batch is a quarter as large."""

FLEX = "trl tuned, flex"
"""Tuned, and packed rows attended to by flex attention, which leaves out what a mask would throw away."""


def trl_settings(way: str, rows: Rows, data: Any, device: Device) -> dict[str, Any]:
    """TRL's arguments, its batch cut so that a step is as large as ours."""
    step = rows.micro_batch * rows.accumulation
    if way == "trl defaults" and rows.kind == "chats":
        # Rows, not packs: as many as lie in our packs on average, eight at a time.
        wanted = step * len(data.train) / data.sequences
        return TRL_DEFAULTS | {"gradient_accumulation_steps": max(1, round(wanted / 8))}
    if way == "trl defaults":
        return {"per_device_train_batch_size": rows.micro_batch, "gradient_accumulation_steps": rows.accumulation}
    micro = max(1, rows.micro_batch // 4) if way == NOT_RECOMPUTED else rows.micro_batch
    settings = TRL_TUNED | {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": step // micro,
        "packing": rows.kind == "chats",
    }
    if way == NOT_RECOMPUTED:
        settings |= {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}
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


def attention_of(way: str) -> str:
    """Which of transformers' kinds of attention a way uses."""
    if way == FLEX:
        return "flex_attention"
    flash = way.startswith("trl tuned") and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"
