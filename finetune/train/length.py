"""How long a training is."""

from __future__ import annotations

import math

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData


def steps_in_all(config: Config, data: PreparedData) -> int:
    """Optimizer steps of the whole run, counted as transformers counts them: an epoch's last, partial step counts."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    batches = math.ceil(data.sequences / config.train.micro_batch_size)
    per_epoch = math.ceil(batches / config.train.gradient_accumulation_steps)
    return max(1, math.ceil(per_epoch * config.train.epochs))
