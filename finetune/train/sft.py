"""Supervised fine-tuning: Config and prepared data → a trained adapter in the run folder, through TRL's SFTTrainer."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.prepare import PreparedData
from finetune.data.template import end_of_turn
from finetune.data.tokenizer import Tokenizer
from finetune.errors import TrainingError
from finetune.model.adapter import add_adapter
from finetune.model.base import LoadedModel
from finetune.model.hardware import Hardware, choose_optimizer, use_gradient_checkpointing
from finetune.model.memory import is_out_of_memory
from finetune.runs.files import (
    discard,
    partial_of,
    replace_folder,
    require_space,
    storage_errors,
    write_json,
    write_text,
)
from finetune.runs.folder import RunFolder
from finetune.stopping import Stopped, Stopper
from finetune.train.batches import Collator, held_out_dataset, longest, sequence_lengths, to_dataset
from finetune.train.callbacks import GuardCallback, MetricsCallback, ProgressCallback, memory_in_use
from finetune.train.checkpoints import clear_leftovers, newest_whole, size_on_disk, step_of
from finetune.train.fingerprint import fingerprint
from finetune.train.length import steps_in_all
from finetune.train.trainer import Trainer, non_finite

if TYPE_CHECKING:
    from peft import PeftModel

MIN_SAVE_STEPS = 25
"""A checkpoint costs about as much as a short step of a tiny model, and 25 steps of a large one are a few minutes."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


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
) -> Trained:
    """Train, going on from the newest whole checkpoint if there is one, and save the adapter.

    Where memory does not suffice, it is tried again with smaller micro batches that make the same steps.

    base_files  the hashes that tell the base from others (`export.base_identity`), for the checkpoints

    Raises TrainingError for a loss that is not finite, or memory that does not suffice for one sequence; `Stopped` at
    the end of the step during which the run was asked to stop. No adapter is saved then.
    """
    model = add_adapter(config, loaded)
    batch = _batch(config, run)
    attempt = _Attempt(config, data, LoadedModel(model, loaded.hardware), run, console, stopper, base_files)
    while True:
        smaller = batch.smaller()
        try:
            return attempt(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if smaller is None:
                raise TrainingError(
                    f"out of memory on {loaded.hardware.name}, with one sequence at a time",
                    hint="lower train.sequence_length, or use a smaller base or quantization: nf4",
                ) from error
        # The exception held the frames, and they the tensors.
        _give_back_memory()
        console.warn(
            f"out of memory with micro batches of {batch.micro}; going on with {smaller}, which is the same step"
        )
        batch = smaller
        run.update_manifest(micro_batch={"configured": config.train.micro_batch_size, "used": batch.micro})


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


def _batch(config: Config, run: RunFolder) -> Batch:
    """As configured, or as it turned out earlier in this run that memory allows."""
    train = config.train
    batch = Batch(train.micro_batch_size, train.gradient_accumulation_steps)
    known = (run.read_manifest() if run.manifest.exists() else {}).get("micro_batch")
    used = known.get("used") if isinstance(known, dict) and known.get("configured") == batch.micro else None
    if isinstance(used, int) and 0 < used < batch.micro and batch.micro % used == 0:
        return Batch(used, batch.accumulation * (batch.micro // used))
    return batch


def _give_back_memory() -> None:
    """What nobody refers to any more is given back now, so that what comes next finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Attempt:
    """One way through the training; tried again with smaller batches if memory runs out."""

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        loaded: LoadedModel,
        run: RunFolder,
        console: Console,
        stopper: Stopper,
        base_files: Mapping[str, str],
    ) -> None:
        self._config, self._data, self._loaded, self._run = config, data, loaded, run
        self._console, self._stopper = console, stopper
        self._steps = steps_in_all(config, data)
        self._record = fingerprint(config, data, base_files, self._steps)
        self._initial: list[torch.Tensor] | None = None
        self._passed_over: list[str] = []

    def __call__(self, batch: Batch) -> Trained:
        run, console = self._run, self._console
        clear_leftovers(run.checkpoints)
        checkpoint, faults = newest_whole(run.checkpoints)
        for fault in faults:
            if fault not in self._passed_over:
                console.warn(fault)
                self._passed_over.append(fault)
        trainer = self._trainer(batch)
        try:
            return self._train(trainer, checkpoint)
        finally:
            # The optimizer's state is not needed any more, and evaluation, or a smaller batch, needs the memory.
            trainer.let_go()

    def _train(self, trainer: Trainer, checkpoint: Path | None) -> Trained:
        run, console, model = self._run, self._console, self._loaded.model
        self._reset_adapter()
        self._require_room(trainer)
        began = time.monotonic()
        with self._stopper.held():
            if checkpoint is not None and step_of(checkpoint) >= self._steps:
                state = trainer.restore(checkpoint)  # the library would take one more step
            else:
                if checkpoint is not None:
                    console.say(f"going on from step {step_of(checkpoint):,} of {self._steps:,}")
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                state = trainer.state
                if self._stopper.asked is not None and state.global_step < self._steps:
                    console.say(f"saved at step {state.global_step:,} of {self._steps:,}")
                    raise Stopped(self._stopper.asked)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not torch.isfinite(parameter).all():
                    raise non_finite(f"`{name}`", state.global_step, [])
            _save_adapter(model, self._data, run)
        self._stopper.stop_if_asked()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        model.eval()
        loss = float(losses[-1]) if losses and math.isfinite(losses[-1]) else None
        return Trained(self._loaded, state.global_step, time.monotonic() - began, memory_in_use(), loss)

    def _trainer(self, batch: Batch) -> Trainer:
        config, data = self._config, self._data
        held_out = data.held_out if config.evaluation.every and data.held_out else None
        tokens_per_step = data.tokens / data.sequences * batch.micro * batch.accumulation
        guard = GuardCallback(
            self._stopper,
            longest(sequence_lengths(data), batch.micro),
            longest(held_out.lengths, batch.micro) if held_out else [],
        )
        guard.trainer = trainer = Trainer(
            model=self._loaded.model,
            args=_arguments(config, self._run, self._loaded.hardware, self._steps, batch),
            train_dataset=to_dataset(data),
            eval_dataset=held_out_dataset(held_out) if held_out else None,
            data_collator=Collator(data.store.row, data.tokenizer.pad_id),
            processing_class=_processing_class(data),
            callbacks=[
                ProgressCallback(self._console, tokens_per_step),
                MetricsCallback(self._run.metrics, self._console, tokens_per_step),
                guard,
            ],
            place=data.store.place,
            record=self._record,
            keep=config.train.keep_checkpoints,
        )
        return trainer

    def _reset_adapter(self) -> None:
        """The adapter in float32, as it was before the first attempt.

        TRL casts a quantised model's adapter to bf16. Small updates are lost there, so it is kept in fp32; B is still
        zero and A only random, so nothing trained has been rounded.
        """
        parameters = [parameter for parameter in self._loaded.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
            parameter.grad = None
        if self._initial is None:
            self._initial = [parameter.detach().cpu().clone() for parameter in parameters]
        else:
            with torch.no_grad():
                for parameter, initial in zip(parameters, self._initial, strict=True):
                    parameter.copy_(initial)

    def _require_room(self, trainer: Trainer) -> None:
        """Raise StorageError now, if the checkpoints and the adapter would not find room later."""
        run, train = self._run, self._config.train
        weights = sum(p.numel() for p in self._loaded.model.parameters() if p.requires_grad)
        optimizer = weights * (2 if train.optimizer.endswith("8bit") else 8)
        adapter = 4 * weights
        small = 2**21  # the states of schedule and random numbers, the manifest, the metrics
        tokenizer = sum(
            path.stat().st_size for name in TOKENIZER_FILES if (path := self._data.base_folder / name).is_file()
        )
        needed = (train.keep_checkpoints + 1) * (adapter + optimizer) + adapter + tokenizer + small
        require_space(
            run.path,
            max(0, needed - size_on_disk(run.checkpoints)),
            f"training (it keeps {train.keep_checkpoints} checkpoints)",
            largest=max(adapter, optimizer),
        )


def _arguments(config: Config, run: RunFolder, hardware: Hardware, steps: int, batch: Batch) -> SFTConfig:
    train = config.train
    checkpointing, _ = use_gradient_checkpointing(config, hardware)
    optimizer, _ = choose_optimizer(config, hardware)
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return SFTConfig(
        output_dir=str(run.checkpoints),
        run_name=run.name,
        per_device_train_batch_size=batch.micro,
        per_device_eval_batch_size=batch.micro,
        gradient_accumulation_steps=batch.accumulation,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=optimizer,
        seed=train.seed,
        data_seed=train.seed,
        bf16=hardware.compute_dtype == "bfloat16",
        fp16=hardware.compute_dtype == "float16",
        use_cpu=hardware.device == "cpu",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        logging_steps=train.log_every or max(1, steps // 100),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.save_every or max(MIN_SAVE_STEPS, math.ceil(steps / 10)),
        eval_strategy="steps" if config.evaluation.every else "no",
        eval_steps=config.evaluation.every,
        prediction_loss_only=True,
        report_to="wandb" if config.tracking == "wandb" else "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=hardware.device == "cuda",
        # Rows arrive tokenised, masked, cut and packed by this project's data stage.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
    )


def _processing_class(data: PreparedData) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers' Trainer wants it; it is only ever saved beside a checkpoint."""
    tokenizer = data.tokenizer
    special = dict(tokenizer.special)
    special.setdefault("pad_token", str(tokenizer.backend.id_to_token(tokenizer.pad_id)))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **special)


def _save_adapter(model: PeftModel, data: PreparedData, run: RunFolder) -> None:
    """adapter/: the LoRA, and the tokenizer and chat template it was trained with. Complete, or not there at all."""
    partial = partial_of(run.adapter)
    with storage_errors(partial):
        discard(partial)
        model.save_pretrained(str(partial), save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
        copy_tokenizer(data.tokenizer, partial)
        if data.template is not None:
            write_text(partial / "chat_template.jinja", data.template.source)
        stop_ids, _ = end_of_turn(data.template, data.tokenizer)
        generation: dict[str, Any] = {"eos_token_id": stop_ids, "pad_token_id": data.tokenizer.pad_id}
        bos = data.tokenizer.special.get("bos_token")
        if bos is not None:
            generation["bos_token_id"] = data.tokenizer.token_id(bos)
        write_json(partial / "generation_config.json", generation)
        replace_folder(partial, run.adapter)


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The base's tokenizer files, with tokenizer.json as it was trained with and a class that takes it as it is.

    Of other classes transformers makes other things by config.json's model type, which is not here.
    """
    for name in TOKENIZER_FILES:
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    settings.pop("auto_map", None)
    write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
