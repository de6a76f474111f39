"""What there is to compute on, and what follows from it: each choice comes with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from finetune.config.schema import Config

if TYPE_CHECKING:
    import torch

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Hardware:
    """The device that a run uses. One device, always: several GPUs are not what this project is for."""

    device: Device
    name: str
    memory: int
    """Bytes of GPU memory, or of RAM on a CPU."""
    bf16: bool

    @property
    def compute_dtype(self) -> Literal["bfloat16", "float16", "float32"]:
        if self.device == "cpu":
            return "float32"
        return "bfloat16" if self.bf16 else "float16"

    @property
    def dtype_reason(self) -> str:
        if self.device == "cpu":
            return "float32, because few CPUs compute in 16 bit faster than in 32"
        if self.bf16:
            return "bfloat16, which this GPU computes natively"
        return "float16 with loss scaling, because this GPU has no bfloat16"

    def torch_dtype(self) -> torch.dtype:
        import torch

        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[self.compute_dtype]


def detect() -> Hardware:
    """The first visible GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Hardware("cuda", properties.name, properties.total_memory, torch.cuda.is_bf16_supported(False))
    return Hardware("cpu", f"{usable_cores()} CPU cores", total_ram(), bf16=False)


def usable_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_ram() -> int:
    """Bytes of RAM, or 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def choose_optimizer(config: Config, hardware: Hardware) -> tuple[str, str]:
    """transformers' name of the optimizer, and the reason for it."""
    wanted = config.train.optimizer
    if wanted in ("auto", "adamw"):
        return "adamw_torch_fused", "AdamW, its state in float32" + (" (auto)" if wanted == "auto" else "")
    names = {"adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit", "paged_adamw_8bit": "paged_adamw_8bit"}
    paged = "; nothing is paged on a CPU" if hardware.device == "cpu" and wanted.startswith("paged") else ""
    return names[wanted], f"{wanted}, as configured{paged}"
