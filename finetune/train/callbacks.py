"""What happens around a training step: progress for the person, metrics for the run, a stop when it goes wrong."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from finetune.console import Console, Progress, duration, size
from finetune.runs.files import storage_errors, write_text
from finetune.stopping import Stopper
from finetune.train.trainer import StoppedEvaluating, Trainer

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """The live line: step, loss, learning rate, tokens a second, memory, time left."""

    def __init__(self, console: Console, tokens_per_step: float) -> None:
        self._console, self._tokens_per_step = console, tokens_per_step
        self._progress: Progress | None = None
        self._began, self._began_step = 0.0, 0
        self._loss = self._rate = math.nan

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress = self._console.progress("training", state.max_steps, unit="steps")
        self._began, self._began_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._progress is not None
        elapsed = time.monotonic() - self._began
        done = state.global_step - self._began_step
        left = elapsed / done * (state.max_steps - state.global_step)
        speed = self._tokens_per_step * done / elapsed
        parts = [f"loss {self._loss:.4f}"] if math.isfinite(self._loss) else []
        parts += [f"lr {self._rate:.1e}"] if math.isfinite(self._rate) else []
        parts += [f"{speed:,.0f} tokens/s", size(memory_in_use()), f"{duration(left)} left"]
        self._progress.update(state.global_step, "  ".join(parts))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        self._loss = logs.get("loss", self._loss)
        self._rate = logs.get("learning_rate", self._rate)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__()


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """metrics.jsonl: one line per log, appended; and the same as `--json` events."""

    def __init__(self, path: Path, console: Console, tokens_per_step: float) -> None:
        self._path, self._console, self._tokens_per_step = path, console, tokens_per_step
        self._last = time.monotonic()
        self._last_step = 0
        self._last_logged: tuple[int, frozenset[str]] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a fault, lines beyond the checkpoint describe steps that are taken again: they are cut off."""
        self._last, self._last_step = time.monotonic(), state.global_step
        if not self._path.exists():
            return
        with storage_errors(self._path):
            kept = [
                line
                for line in self._path.read_text("utf-8", "replace").splitlines()
                if _step_of(line) <= state.global_step
            ]
        write_text(self._path, "".join(line + "\n" for line in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        names = {
            "loss": "loss",
            "eval_loss": "eval_loss",
            "learning_rate": "learning_rate",
            "grad_norm": "grad_norm",
            "epoch": "epoch",
            "mean_token_accuracy": "token_accuracy",
        }
        record: dict[str, float | int] = {"step": state.global_step}
        values = {ours: float(logs[theirs]) for theirs, ours in names.items() if theirs in logs}
        # JSON has no NaN; the gradient norm is one for a step that float16's loss scaling skips.
        record.update({name: value for name, value in values.items() if math.isfinite(value)})
        if "loss" in record:
            now = time.monotonic()
            tokens = self._tokens_per_step * (state.global_step - self._last_step)
            record["tokens_per_second"] = round(tokens / max(now - self._last, 1e-9), 1)
            record["memory_bytes"] = memory_in_use()
            self._last, self._last_step = now, state.global_step
        elif "eval_loss" not in record:
            return  # the library's closing summary, which repeats what is in the lines before
        with storage_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            # A checkpoint that outlasts a power cut must not be ahead of these lines: they are not written again.
            file.flush()
            os.fsync(file.fileno())
        self._console.event("metrics", **record)


class GuardCallback(TrainerCallback):  # type: ignore[misc]
    """Looks at each step: before the optimizer takes it, at its numbers; after it, whether the run is to stop.

    The run is then saved as it is, at this step, whatever `train.save_every` says.
    """

    def __init__(self, stopper: Stopper, longest: Sequence[int], longest_held_out: Sequence[int]) -> None:
        """`longest`: the micro batches that need most memory, which are tried before the first step."""
        self._stopper, self._longest, self._longest_held_out = stopper, longest, longest_held_out
        self.trainer: Trainer | None = None
        """Whose steps these are."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A checkpoint remembers how often the run was saved and logged when it was written; the config says it now.
        state.compute_steps(args, state.max_steps)
        assert self.trainer is not None
        self.trainer.try_longest(self._longest, self._longest_held_out)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self.trainer is not None
        self.trainer.require_finite(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._stopper.asked is not None:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._stopper.asked is not None:
            raise StoppedEvaluating


def memory_in_use() -> int:
    """Peak bytes: of GPU memory where there is a GPU, else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line torn by the fault
