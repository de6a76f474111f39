"""TRL's SFTTrainer, with what this project does otherwise: checkpoints, evaluation, what is said of a failing step."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers.trainer_callback import TrainerState
from trl import SFTTrainer

from finetune.data.store import IGNORED
from finetune.errors import RunError, TrainingError
from finetune.model.kernels.head import fused_loss
from finetune.model.memory import is_out_of_memory
from finetune.runs.files import write_json
from finetune.train import checkpoints
from finetune.train.borrowed import Borrowed
from finetune.train.fingerprint import FILE as FINGERPRINT

MAX_SKIPPED = 40
"""Steps in a row whose gradients may be infinite in float16. The scale begins at 2^16 and is halved for each."""


class StoppedEvaluating(Exception):
    """An evaluation in the middle of training is broken off, because the run is to stop."""


class Trainer(SFTTrainer):  # type: ignore[misc]
    """Supervised fine-tuning that can be cut off anywhere and goes on to the same weights.

    place     what shows where a row came from, by its number
    record    the fingerprint, which goes into every checkpoint
    keep      how many checkpoints are kept
    own_head  whether loss and gradient of the output head are computed together (model/kernels/head.py)
    """

    def __init__(
        self,
        *args: Any,
        place: Callable[[int], str],
        record: Mapping[str, Any],
        keep: int,
        own_head: bool,
        **kwargs: Any,
    ) -> None:
        self._borrowed = Borrowed(kwargs["model"])
        super().__init__(*args, **kwargs)
        self._place, self._record, self._keep, self._own_head = place, record, keep, own_head
        self._losses: list[tuple[torch.Tensor, list[list[int]]]] = []
        """Of each micro batch of the step that is being taken: its loss, and the rows in its sequences."""
        self._evaluated: list[tuple[float, int]] = []
        """Of each batch of an evaluation: the sum of the loss, and of how many tokens."""
        self._skipped = 0
        # The library sets it with the first step; the longest batch is tried before that.
        self.current_gradient_accumulation_steps: int = self.args.gradient_accumulation_steps
        self._forget_scores()

    # -- a step ---------------------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        rows = inputs.pop("rows")
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append((loss.detach(), rows))
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if not self._own_head or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The backbone is called without the wrapper around the whole model, which would have set the precision.
        with self.accelerator.autocast():
            # Without a divisor a micro batch stands for itself.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            if not self.model.training:
                return fused_loss(self.model, inputs, num_items_in_batch, accumulation=steps)
            self._scored += (inputs["labels"][..., 1:] != IGNORED).sum()
            return fused_loss(
                self.model, inputs, num_items_in_batch, accumulation=steps, correct=self._scored_correctly
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL logs, with the share of tokens of which the right one was the likeliest since the last time."""
        if self._own_head and self.model.training:
            scored = int(self._scored)
            if scored:
                logs["mean_token_accuracy"] = int(self._scored_correctly) / scored
            self._forget_scores()
        super().log(logs, start_time)

    def _forget_scores(self) -> None:
        """Counted on the device, so that nobody waits for it in a step."""
        self._scored, self._scored_correctly = (
            torch.zeros((), dtype=torch.int64, device=self.args.device) for _ in range(2)
        )

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("rows", None)
        # What balances a mixture's experts in training is no part of how well the model answers.
        balancing: bool = self.aux_loss_enabled
        self.aux_loss_enabled: bool = False
        try:
            found = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.aux_loss_enabled = balancing
        tokens = int((inputs["labels"][..., 1:] != IGNORED).sum())
        self._evaluated.append((float(found[0]) * tokens, tokens))
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss is the mean over all tokens with loss. The library's is a mean of batches, whatever is in them."""
        self._evaluated.clear()
        output = super().evaluation_loop(*args, **kwargs)
        if "eval_loss" in output.metrics:
            total, tokens = (sum(parts) for parts in zip(*self._evaluated, strict=True))
            output.metrics["eval_loss"] = total / max(tokens, 1)
        return output

    def require_finite(self, step: int) -> None:
        """Raise TrainingError unless this step's losses and gradients are finite; to be called before the optimizer.

        One look at the device for all of it. With float16, loss scaling skips steps with infinite gradients on purpose,
        to find the scale; only so many in a row mean that there is none.
        """
        losses, self._losses = self._losses, []
        values = torch.stack([loss for loss, _ in losses]) if losses else torch.zeros(1)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else values
        finite_losses, finite_norms = torch.stack([values.isfinite().all(), norms.isfinite().all()]).tolist()
        self._skipped = 0 if finite_norms else self._skipped + 1
        if finite_losses and (finite_norms or (self.args.fp16 and self._skipped < MAX_SKIPPED)):
            return
        bad = [rows for loss, rows in losses if not torch.isfinite(loss)]
        what = "the loss" if bad else "the gradient"
        numbers = [row for rows in bad or [rows for _, rows in losses] for sequence in rows for row in sequence]
        raise non_finite(what, step, [self._place(number) for number in dict.fromkeys(numbers)])

    def try_longest(self, training: Sequence[int], held_out: Sequence[int]) -> None:
        """Take the step that needs most memory, forward and backward, and undo it: better to run out now than later.

        training, held_out  numbers of the longest sequences of either dataset, one micro batch; may be empty
        """
        with untouched_randomness():
            if training:
                inputs = self.data_collator([self.train_dataset[number] for number in training])
                items = self._get_num_items_in_batch([inputs], self.args.device)
                later = self._later_bytes()
                self.training_step(self.model_wrapped, inputs, items)
                del later
                self.model.zero_grad()
                self._losses.clear()
            if held_out:
                inputs = self.data_collator([self.eval_dataset[number] for number in held_out])
                self.model.eval()
                self.prediction_step(self.model_wrapped, inputs, True)
                self.model.train()
        for metrics in self._metrics.values():
            metrics.clear()
        self._forget_scores()
        self._total_train_tokens = 0

    def _later_bytes(self) -> torch.Tensor:
        """As much memory as the optimizer's state and the gradients of earlier micro batches take from step 2 on."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in trained)
        state = 0 if self.optimizer.state else count * (2 if "8bit" in str(self.args.optim) else 8)
        gradients = 4 * count if self.args.gradient_accumulation_steps > 1 else 0
        return torch.empty(state + gradients, dtype=torch.uint8, device=self.args.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the library does it, but without a trace in the random numbers, and it can be broken off.

        Making a data loader draws a number: a run that evaluates would else train otherwise than one that does not.
        """
        with untouched_randomness():
            try:
                found: dict[str, float] = super().evaluate(*args, **kwargs)
            except StoppedEvaluating:
                self.control.should_save = self.control.should_training_stop = True
                found = {}
        self.model.train()
        return found

    def let_go(self) -> None:
        """Drop the optimizer and its state; the model stays, as it was given. Callbacks and trainer refer to each other
        for ever."""
        self.model.zero_grad(set_to_none=True)
        self.optimizer: Any = None
        self.lr_scheduler: Any = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.accelerator.free_memory()
        self._losses.clear()
        self._borrowed.give_back()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: this project writes its own."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """What is needed to go on, in a folder that has its name only once it is whole."""
        step = self.state.global_step
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise non_finite(f"`{name}`", step, [])
        folder = Path(self.args.output_dir)
        checkpoints.write(folder, step, self._fill)
        self._rotate()

    def _rotate(self) -> None:
        checkpoints.rotate(Path(self.args.output_dir), self.state.global_step, self._keep, self._best_step())

    def _fill(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        write_json(folder / FINGERPRINT, self._record)

    def _best_step(self) -> int | None:
        """The step with the lowest loss on held-out rows so far."""
        losses = {entry["step"]: entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry}
        return min(losses, key=lambda step: losses[step]) if losses else None

    def restore(self, checkpoint: Path) -> TrainerState:
        """The weights of a checkpoint whose training was over, and what was logged up to it."""
        self._load_from_checkpoint(str(checkpoint))
        self.state: TrainerState = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        # Whoever wrote it may have been killed before the one that it makes superfluous was removed.
        self._rotate()
        return self.state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with _unreadable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The states, but learning rate and weight decay as they are configured now: the library takes the old ones."""
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        with _unreadable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # torch's LambdaLR, which all schedules are, inside accelerate's wrapper. The same values give the same bits.
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        schedule.base_lrs = [self.args.learning_rate for _ in schedule.base_lrs]
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate, decay in zip(self.optimizer.param_groups, rates, decays, strict=True):
            group.update(initial_lr=self.args.learning_rate, lr=rate, weight_decay=decay)
        schedule._last_lr = rates

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _unreadable(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _unreadable(checkpoint):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """Whatever random numbers are drawn inside, those drawn afterwards are as if nothing had been."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def non_finite(what: str, step: int, places: Sequence[str]) -> TrainingError:
    """The error for a step with numbers that are none; `places` are its rows."""
    rows = f" (rows: {', '.join(places[:4])}{f' and {len(places) - 4} more' if len(places) > 4 else ''})"
    return TrainingError(
        f"{what} is no longer a finite number at step {step:,}{rows if places else ''}; no adapter was saved",
        hint="lower train.learning_rate (try a tenth), and look at these rows with `ft data`; with "
        "--allow-changed train.learning_rate the run goes on from its last checkpoint, with --fresh from the start",
    )


@contextlib.contextmanager
def _unreadable(checkpoint: str | None) -> Iterator[None]:
    """Translate what the library says about a checkpoint that is sealed, and yet not what this program writes.

    Pickles are read without executing anything (`weights_only`), which is what most of these refusals are.
    """
    try:
        yield
    except (
        pickle.UnpicklingError,
        SafetensorError,
        EOFError,
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        if is_out_of_memory(error):
            raise
        raise RunError(
            f"this checkpoint cannot be gone on from: {str(error).strip().splitlines()[0][:200]}",
            place=checkpoint,
            hint="remove this folder: the checkpoint before it is used then",
        ) from error
