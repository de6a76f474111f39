"""Supervised fine-tuning: Config and prepared data → a trained adapter in the run folder, through TRL's SFTTrainer."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.prepare import PreparedData
from finetune.errors import TrainingError
from finetune.model.adapter import add_adapter
from finetune.model.base import LoadedModel
from finetune.model.memory import is_out_of_memory
from finetune.model.recompute import blocks, recompute_layers
from finetune.plan.setup import Fit
from finetune.runs.files import require_space
from finetune.runs.folder import RunFolder
from finetune.stopping import Stopped, Stopper
from finetune.train.arguments import arguments, processing_class
from finetune.train.batches import Collator, held_out_dataset, longest, sequence_lengths, to_dataset
from finetune.train.callbacks import GuardCallback, MetricsCallback, ProgressCallback, memory_in_use
from finetune.train.checkpoints import clear_leftovers, newest_whole, size_on_disk, step_of
from finetune.train.fingerprint import fingerprint
from finetune.train.length import remember, smaller, steps_in_all
from finetune.train.saved import TOKENIZER_FILES, save_adapter
from finetune.train.speed import Faster, make_faster
from finetune.train.trainer import Trainer, non_finite


@dataclass(frozen=True)
class Trained:
    """A finished training: the model is still in memory, so that it can be evaluated without loading it again."""

    loaded: LoadedModel
    steps: int
    seconds: float
    peak_memory: int
    final_loss: float | None


def train(
    config: Config,
    data: PreparedData,
    loaded: LoadedModel,
    run: RunFolder,
    console: Console,
    stopper: Stopper,
    base_files: Mapping[str, str],
    fit: Fit,
    why: str = "as written",
) -> Trained:
    """Train, going on from the newest whole checkpoint if there is one, and save the adapter.

    Where memory does not suffice, it is tried again with the same steps cut smaller.

    fit, why    how a step is cut at first, and the reason
    base_files  the hashes that tell the base from others (`export.base_identity`), for the checkpoints

    Raises TrainingError for a loss that is not finite, or memory that does not suffice for one sequence; `Stopped` at
    the end of the step during which the run was asked to stop. No adapter is saved then.
    """
    model = add_adapter(config, loaded)
    loaded = LoadedModel(model, loaded.hardware)
    faster = make_faster(config, loaded, packed=data.packs is not None)
    run.update_manifest(speed=faster.reasons)
    for what, why_so in faster.reasons.items():
        console.say(f"      {what}: {why_so}")
    try:
        return _train_fitting(_Attempt(config, data, loaded, faster, run, console, stopper, base_files), fit, why)
    finally:
        faster.restore()


def _train_fitting(attempt: _Attempt, fit: Fit, why: str) -> Trained:
    """Attempts, each in less memory than the one before."""
    config, run, hardware = attempt.config, attempt.run, attempt.loaded.hardware
    layers = len(blocks(attempt.loaded.model))
    # The compiler does not look into layers whose inputs are elsewhere.
    offload = hardware.device == "cuda" and not config.speed.compile
    while True:
        remember(config, run, fit, why)
        less = smaller(fit, layers, offload=offload)
        try:
            return attempt(fit)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if less is None:
                raise TrainingError(
                    f"out of memory on {hardware.name}, with one sequence at a time",
                    hint="lower train.sequence_length, or use a smaller base or quantization: nf4",
                ) from error
        # The exception held the frames, and they the tensors.
        _give_back_memory()
        attempt.console.warn(f"out of memory with {fit}; going on with {less}, which is the same step")
        fit, why = less, f"memory ran out with {fit}"


def _give_back_memory() -> None:
    """What nobody refers to any more is given back now, so that what comes next finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _Attempt:
    """One way through the training; tried again with smaller batches if memory runs out."""

    config: Config
    data: PreparedData
    loaded: LoadedModel
    """The model has its adapter."""
    faster: Faster
    run: RunFolder
    console: Console
    stopper: Stopper
    base_files: Mapping[str, str]

    def __post_init__(self) -> None:
        self._steps = steps_in_all(self.config, self.data)
        self._record = fingerprint(self.config, self.data, self.base_files, self._steps)
        self._initial: list[torch.Tensor] | None = None
        self._passed_over: list[str] = []

    def __call__(self, fit: Fit) -> Trained:
        run, console = self.run, self.console
        clear_leftovers(run.checkpoints)
        checkpoint, faults = newest_whole(run.checkpoints)
        for fault in faults:
            if fault not in self._passed_over:
                console.warn(fault)
                self._passed_over.append(fault)
        recompute_layers(self.loaded.model, fit.recomputed, offload=fit.offload)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # loading, and attempts that failed, are not the training's peak
        trainer = self._trainer(fit)
        try:
            return self._train(trainer, checkpoint)
        finally:
            # The optimizer's state is not needed any more, and evaluation, or a smaller batch, needs the memory.
            trainer.let_go()

    def _train(self, trainer: Trainer, checkpoint: Path | None) -> Trained:
        run, console, model = self.run, self.console, self.loaded.model
        self._reset_adapter()
        self._require_room()
        began = time.monotonic()
        with self.stopper.held():
            if checkpoint is not None and step_of(checkpoint) >= self._steps:
                state = trainer.restore(checkpoint)  # the library would take one more step
            else:
                if checkpoint is not None:
                    console.say(f"going on from step {step_of(checkpoint):,} of {self._steps:,}")
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                state = trainer.state
                if self.stopper.asked is not None and state.global_step < self._steps:
                    console.say(f"saved at step {state.global_step:,} of {self._steps:,}")
                    raise Stopped(self.stopper.asked)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not torch.isfinite(parameter).all():
                    raise non_finite(f"`{name}`", state.global_step, [])
            save_adapter(model, self.data, run)
        self.stopper.stop_if_asked()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        model.eval()
        loss = float(losses[-1]) if losses and math.isfinite(losses[-1]) else None
        return Trained(self.loaded, state.global_step, time.monotonic() - began, memory_in_use(), loss)

    def _trainer(self, fit: Fit) -> Trainer:
        config, data = self.config, self.data
        held_out = data.held_out if config.evaluation.every and data.held_out else None
        tokens_per_step = data.tokens / data.sequences * fit.micro_batch * fit.accumulation
        guard = GuardCallback(
            self.stopper,
            longest(sequence_lengths(data), fit.micro_batch),
            longest(held_out.lengths, fit.micro_batch) if held_out else [],
        )
        guard.trainer = trainer = Trainer(
            model=self.loaded.model,
            args=arguments(config, self.run, self.loaded.hardware, self._steps, fit),
            train_dataset=to_dataset(data),
            eval_dataset=held_out_dataset(held_out) if held_out else None,
            data_collator=Collator(data.store.row, data.tokenizer.pad_id, self.faster.layout),
            processing_class=processing_class(data),
            callbacks=[
                ProgressCallback(self.console, tokens_per_step),
                MetricsCallback(self.run.metrics, self.console, tokens_per_step),
                guard,
            ],
            place=data.store.place,
            record=self._record,
            keep=config.train.keep_checkpoints,
            own_head=self.faster.head,
        )
        return trainer

    def _reset_adapter(self) -> None:
        """The adapter in float32, as it was before the first attempt.

        TRL casts a quantised model's adapter to bf16. Small updates are lost there, so it is kept in fp32; B is still
        zero and A only random, so nothing trained has been rounded.
        """
        parameters = [parameter for parameter in self.loaded.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.grad = None
        if self._initial is None:
            self._initial = [parameter.detach().cpu().clone() for parameter in parameters]
        else:
            with torch.no_grad():
                for parameter, initial in zip(parameters, self._initial, strict=True):
                    parameter.copy_(initial)

    def _require_room(self) -> None:
        """Raise StorageError now, if the checkpoints and the adapter would not find room later."""
        run, train = self.run, self.config.train
        weights = sum(p.numel() for p in self.loaded.model.parameters() if p.requires_grad)
        optimizer = weights * (2 if train.optimizer.endswith("8bit") else 8)
        adapter = 4 * weights
        small = 2**21  # the states of schedule and random numbers, the manifest, the metrics
        tokenizer = sum(
            path.stat().st_size for name in TOKENIZER_FILES if (path := self.data.base_folder / name).is_file()
        )
        # Those that are kept, the best one, and the one that is being written.
        checkpoints = train.keep_checkpoints + (1 if self.config.evaluation.every else 0) + 1
        needed = checkpoints * (adapter + optimizer) + adapter + tokenizer + small
        require_space(
            run.path,
            max(0, needed - size_on_disk(run.checkpoints)),
            f"training (it keeps {train.keep_checkpoints} checkpoints)",
            largest=max(adapter, optimizer),
        )
