"""Config → the arguments of TRL's trainer."""

from __future__ import annotations

import math

from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData
from finetune.model.hardware import Hardware, choose_optimizer
from finetune.plan.setup import Fit
from finetune.runs.folder import RunFolder

MIN_SAVE_STEPS = 25
"""A checkpoint costs about as much as a short step of a tiny model, and 25 steps of a large one are a few minutes."""


def arguments(config: Config, run: RunFolder, hardware: Hardware, steps: int, fit: Fit) -> SFTConfig:
    train = config.train
    optimizer, _ = choose_optimizer(config, hardware)
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return SFTConfig(
        output_dir=str(run.checkpoints),
        run_name=run.name,
        per_device_train_batch_size=fit.micro_batch,
        per_device_eval_batch_size=fit.micro_batch,
        gradient_accumulation_steps=fit.accumulation,
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
        gradient_checkpointing=False,  # the library knows all layers or every nth: model/recompute.py has set it up
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


def processing_class(data: PreparedData) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers' Trainer wants it; it is only ever saved beside a checkpoint."""
    tokenizer = data.tokenizer
    special = dict(tokenizer.special)
    special.setdefault("pad_token", str(tokenizer.backend.id_to_token(tokenizer.pad_id)))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **special)
