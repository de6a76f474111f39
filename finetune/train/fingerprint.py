"""What a training depends on, kept in its checkpoints, and what has changed since.

The library goes on from a checkpoint whatever has become of the config, the data or the base. Here each difference is
found and named; one that a person wants is taken up where they say so, one that no checkpoint can be given is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData
from finetune.errors import Problem, RunError
from finetune.runs.manifest import as_plain, changed_keys

FILE = "fingerprint.json"

FREE = (
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.fit",
    "train.gradient_checkpointing",
    "train.offload",
    "speed.attention",
    "speed.fused",
    "speed.lora",
    "speed.head",
    "speed.compile",
    "evaluation.every",
    "evaluation.max_rows",
    "evaluation.metric",
    "evaluation.samples",
    "evaluation.max_new_tokens",
    "evaluation.allow_leakage",
    "private_data",
    "tracking",
)
"""Keys that no weight depends on, beyond the rounding of sums."""

OF_ROWS = (
    "data",
    "chat_template",
    "evaluation.split",
    "evaluation.path",
    "evaluation.format",
    "evaluation.columns",
    "evaluation.on_overlong",
    "train.sequence_length",
    "train.packing",
    "train.loss_on",
)
"""Keys that matter through the rows alone: another path to the same rows is no change, another content of a file is."""

LENGTH = ("train.epochs", "train.max_steps")
BATCH = ("train.micro_batch_size", "train.gradient_accumulation_steps")

FIXED = ("lora.rank", "lora.targets", "train.optimizer", *BATCH)
"""Keys that decide which tensors a checkpoint has, or which rows its steps have seen: it cannot be gone on from with
others. (The place in the data is the number of steps times the batch.)"""


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was when the checkpoint was written."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        if self.before == self.now:  # the same name, for other content
            return f"{self.key} has changed"
        return f"{self.key} was {_short(self.before)} and is {_short(self.now)} now"


def fingerprint(config: Config, data: PreparedData, base_files: Mapping[str, str], steps: int) -> dict[str, Any]:
    """What a checkpoint records: the config, hashes of the rows, of the base and of the template, and the length."""
    template = data.template
    return {
        "format": 1,
        "config": as_plain(config),
        "steps": steps,
        "rows": data.rows_digest,
        "template": None if template is None else hashlib.sha256(template.source.encode()).hexdigest(),
        "base": dict(base_files),
    }


def read(checkpoint: Path) -> dict[str, Any]:
    """The fingerprint in a checkpoint that was found whole."""
    value: dict[str, Any] = json.loads((checkpoint / FILE).read_text("utf-8"))
    return value


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two fingerprints, less what makes no difference to the weights.

    A longer training is none; nor are another micro batch and accumulation with the same product, since the same rows
    make the same step. Pure.
    """
    old, new = before["config"], now["config"]
    keys = changed_keys(old, new)
    found = [
        Change(key, _value(old, key), _value(new, key))
        for key in keys
        if key not in (*FREE, *OF_ROWS, *LENGTH, *BATCH, "base") and not _same_targets(key, old, new)
    ]
    if any(key in keys for key in BATCH) and _batch(old) != _batch(new):
        found += [Change(key, _value(old, key), _value(new, key)) for key in BATCH if key in keys]
    if any(key in keys for key in LENGTH) and now["steps"] < before["steps"]:
        found += [Change(key, _value(old, key), _value(new, key)) for key in LENGTH if key in keys]
    if before["template"] != now["template"]:
        found.append(Change("chat_template", old.get("chat_template"), new.get("chat_template")))
    if before["rows"] != now["rows"]:
        rows = [key for key in keys if key in OF_ROWS and key not in ("data", "chat_template")]
        found += [Change(key, _value(old, key), _value(new, key)) for key in rows]
        explained = bool(rows) or before["template"] != now["template"] or "train.seed" in keys
        if not explained or "data" in keys:
            found.append(Change("data", None, None))
    if before["base"] != now["base"] or ("base" in keys and not _local(old, new)):
        found.append(Change("base", old.get("base"), new.get("base")))
    return found


def require_same(found: Sequence[Change], allowed: Collection[str], place: str, step: int, fresh: str) -> None:
    """Raise RunError for each change that is not allowed, or that cannot be.

    place  the run;  fresh  what a new run would be called
    """
    problems = []
    for change in found:
        if change.key in FIXED:
            hint = f"a checkpoint cannot take that: undo it, or start {fresh} with --fresh"
        elif change.key not in allowed:
            hint = (
                f"undo it; or go on from step {step:,} with it: --allow-changed {change.key}; "
                f"or start {fresh} with --fresh"
            )
        else:
            continue
        problems.append(Problem(f"{change} (this run is at step {step:,})", place, hint))
    if problems:
        raise RunError(problems)


def _same_targets(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether only the order of `lora.targets` has changed, which means nothing."""
    before, now = _value(old, key), _value(new, key)
    lists = isinstance(before, list) and isinstance(now, list)
    return key == "lora.targets" and lists and sorted(before) == sorted(now)


def _local(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both bases are folders, of which the files are compared and not the path."""
    from finetune.config.schema import is_local_base

    return is_local_base(str(old.get("base"))) and is_local_base(str(new.get("base")))


def _batch(config: Mapping[str, Any]) -> int:
    """Sequences in an optimizer step."""
    train = config["train"]
    return int(train["micro_batch_size"]) * int(train["gradient_accumulation_steps"])


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
