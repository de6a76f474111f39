"""How long a training is, and what a step of it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData
from finetune.runs.folder import RunFolder


def steps_in_all(config: Config, data: PreparedData) -> int:
    """Optimizer steps of the whole run, counted as transformers counts them: an epoch's last, partial step counts."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    batches = math.ceil(data.sequences / config.train.micro_batch_size)
    per_epoch = math.ceil(batches / config.train.gradient_accumulation_steps)
    return max(1, math.ceil(per_epoch * config.train.epochs))


@dataclass(frozen=True)
class Batch:
    """How an optimizer step is made: sequences at a time, and how many times."""

    micro: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.micro} × {self.accumulation} sequences"

    def smaller(self) -> Batch | None:
        """The next smaller micro batch that makes the same step from the same sequences in the same order."""
        smaller = next((size for size in range(self.micro - 1, 0, -1) if self.micro % size == 0), None)
        return None if smaller is None else Batch(smaller, self.accumulation * (self.micro // smaller))


def batch_of(config: Config, run: RunFolder) -> Batch:
    """As configured, or as it turned out earlier in this run that memory allows."""
    train = config.train
    batch = Batch(train.micro_batch_size, train.gradient_accumulation_steps)
    known = (run.read_manifest() if run.manifest.exists() else {}).get("micro_batch")
    used = known.get("used") if isinstance(known, dict) and known.get("configured") == batch.micro else None
    if isinstance(used, int) and 0 < used < batch.micro and batch.micro % used == 0:
        return Batch(used, batch.accumulation * (batch.micro // used))
    return batch
