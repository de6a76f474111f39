"""Supervised fine-tuning: Config and prepared data → a trained adapter in the run folder, through TRL's SFTTrainer."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.prepare import PreparedData
from finetune.data.template import end_of_turn
from finetune.data.tokenizer import Tokenizer
from finetune.errors import TrainingError
from finetune.model.adapter import add_adapter
from finetune.model.base import LoadedModel
from finetune.model.hardware import Hardware, choose_optimizer, use_gradient_checkpointing
from finetune.runs.files import storage_errors, sync_folder, write_json, write_text
from finetune.runs.folder import RunFolder
from finetune.train.batches import Collator, held_out_dataset, to_dataset
from finetune.train.callbacks import (
    FiniteCallback,
    MetricsCallback,
    ProgressCallback,
    SealCallback,
    memory_in_use,
    non_finite,
)
from finetune.train.checkpoints import newest_whole

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


def steps_in_all(config: Config, data: PreparedData) -> int:
    """Optimizer steps of the whole run, counted as transformers counts them: an epoch's last, partial step counts."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    batches = math.ceil(data.sequences / config.train.micro_batch_size)
    per_epoch = math.ceil(batches / config.train.gradient_accumulation_steps)
    return max(1, math.ceil(per_epoch * config.train.epochs))


def train(config: Config, data: PreparedData, loaded: LoadedModel, run: RunFolder, console: Console) -> Trained:
    """Train, going on from the newest whole checkpoint if there is one, and save the adapter.

    Raises TrainingError for a loss that is not finite or memory that does not suffice; then no adapter is saved.
    """
    steps = steps_in_all(config, data)
    checkpoint, faults = newest_whole(run.checkpoints)
    for fault in faults:
        console.warn(fault)
    model = add_adapter(config, loaded)
    tokens_per_step = data.tokens * min(config.train.epochs, 1) / max(1, steps / config.train.epochs)
    trainer = _Trainer(
        model=model,
        args=_arguments(config, run, loaded.hardware, steps),
        train_dataset=to_dataset(data),
        eval_dataset=held_out_dataset(data.held_out) if config.evaluation.every and data.held_out else None,
        data_collator=Collator(data.store.row, data.tokenizer.pad_id),
        processing_class=_processing_class(data),
        callbacks=[
            ProgressCallback(console, tokens_per_step),
            MetricsCallback(run.metrics, console, tokens_per_step),
            FiniteCallback(),
            SealCallback(),
        ],
    )
    # TRL casts a quantised model's adapter to bf16. Small updates are lost there, so it is kept in fp32; B is still
    # zero and A only random, so nothing trained has been rounded.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpoint is not None:
        console.say(f"going on from step {checkpoint.name.rpartition('-')[2]} of {steps}")
    began = time.monotonic()
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(
            f"out of memory on {loaded.hardware.name}",
            hint="halve train.micro_batch_size and double train.gradient_accumulation_steps: the result is the same",
        ) from error
    seconds = time.monotonic() - began
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(f"{name} is not finite; no adapter was saved", hint="lower train.learning_rate")
    _save_adapter(model, data, run)
    loss = float(result.training_loss)
    # The model was switched to training mode; gradients and optimizer state are no longer needed.
    model.eval()
    return Trained(
        LoadedModel(model, loaded.hardware), steps, seconds, memory_in_use(), loss if math.isfinite(loss) else None
    )


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer without the model card, which this project writes itself, and with a check on each loss."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        pass

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.args.fp16 and not torch.isfinite(loss):
            raise non_finite(self.state.global_step + 1)
        return loss


def _arguments(config: Config, run: RunFolder, hardware: Hardware, steps: int) -> SFTConfig:
    train = config.train
    checkpointing, _ = use_gradient_checkpointing(config, hardware)
    optimizer, _ = choose_optimizer(config, hardware)
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return SFTConfig(
        output_dir=str(run.checkpoints),
        run_name=run.name,
        per_device_train_batch_size=train.micro_batch_size,
        per_device_eval_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
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
        save_total_limit=train.keep_checkpoints,
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
    partial = run.path / "adapter.partial"
    with storage_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
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
        for path in partial.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(run.adapter, ignore_errors=True)
        os.replace(partial, run.adapter)
        sync_folder(run.path)


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
