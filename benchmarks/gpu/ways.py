"""Ways to train the same rows with the same adapter: ft, TRL, unsloth. Each says what its steps took."""

from __future__ import annotations

import importlib
import itertools
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.models import Device, Quantization, build
from benchmarks.gpu.planned import fit_for
from benchmarks.gpu.rows import Rows, for_trl
from benchmarks.jobs import ALPHA, RANK, RATE, TARGETS
from benchmarks.measuring import Failed

if TYPE_CHECKING:
    from finetune.config.schema import Config
    from finetune.data.prepare import PreparedData
    from finetune.plan.setup import Fit

WARM_UP, MEASURED = 3, 12
"""Steps that are not counted (kernels are chosen and memory is found in them), and those that are."""

SHORT = 5
"""Steps in all where only memory is asked for."""


@dataclass
class Steps:
    """When each step was logged, which waits for the GPU, and its loss."""

    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """Warnings, such as memory that ran out and was made do with."""

    def note(self, loss: float) -> None:
        self.times.append(time.monotonic())
        self.losses.append(loss)

    @property
    def seconds(self) -> list[float]:
        """Of each step after those of the warm-up."""
        if len(self.times) < WARM_UP + 2:
            raise Failed(f"only {len(self.times)} steps were logged")
        return [later - earlier for earlier, later in itertools.pairwise(self.times[WARM_UP - 1 :])]


def measured(steps: Steps, device: Device, tokens: float, with_loss: float) -> dict[str, Any]:
    """`tokens` and `with_loss` are what an optimizer step trains on, padding left out, on average."""
    seconds = steps.seconds
    middle = statistics.median(seconds)
    return {
        "step_s": middle,
        "shortest_s": min(seconds),
        "longest_s": max(seconds),
        "steps": len(seconds),
        "tokens_per_s": tokens / middle,
        "loss_tokens_per_s": with_loss / middle,
        "peak_gb": device.peak() / 1e9,
        "losses": steps.losses,
        "mean_loss": statistics.fmean(steps.losses),
        "said": steps.said,
    }


def ours(
    config: Config,
    data: PreparedData,
    shape: str,
    device: Device,
    folder: Path,
    *,
    memory: int | None = None,
    fit: Fit | None = None,
) -> tuple[dict[str, Any], Fit]:
    """ft's own training, from the model in memory on. `memory` is what the plan is told that the card has, in bytes.

    fit  how a step is cut; None: as the config says
    """
    import dataclasses

    from finetune.model.base import LoadedModel
    from finetune.model.hardware import detect
    from finetune.runs.folder import RunFolder
    from finetune.stopping import Stopper
    from finetune.train.sft import train

    quantization: Quantization = "nf4" if config.quantization == "nf4" else "none"
    hardware = detect()
    if device.name == "cpu" and hardware.device != "cpu":
        raise Failed("there is a GPU: CUDA_VISIBLE_DEVICES= hides it")
    if memory is not None:
        hardware = dataclasses.replace(hardware, memory=memory)
    run = RunFolder(folder / "run")
    run.create()
    loaded = LoadedModel(build(shape, quantization, device), hardware)
    device.peak(reset=True)
    steps = Steps()
    fit = fit or fit_for(config, data, shape, hardware)
    train(config, data, loaded, run, _listening(steps), Stopper(), {}, fit)
    used = run.read_manifest().get("fit", {}).get("used", {})
    if used:
        fit = dataclasses.replace(fit, **used)
    sequences = fit.micro_batch * fit.accumulation
    share = sequences / data.sequences
    found = measured(steps, device, data.tokens * share, data.supervised_tokens * share)
    reasons = run.read_manifest().get("speed") or {}
    found["attention"] = str(reasons.get("attention", "?")).partition(":")[0]
    return found | {"fit": dataclasses.asdict(fit), "speed": reasons}, fit


def _listening(steps: Steps) -> Any:
    """ft's console, which notes the steps that are reported to it and says nothing."""
    from finetune.console import Console

    class Listening(Console):
        def event(self, kind: str, **fields: Any) -> None:
            if kind == "metrics" and "loss" in fields:
                steps.note(fields["loss"])

        def say(self, text: str = "") -> None:
            pass

        def warn(self, text: str) -> None:
            steps.said.append(text)

    return Listening()


def trl(
    rows: Rows,
    data: PreparedData,
    shape: str,
    quantization: Quantization,
    device: Device,
    folder: Path,
    steps: int,
    *,
    settings: dict[str, Any],
    attention: str = "sdpa",
) -> dict[str, Any]:
    """TRL's trainer on a model that was built here. `settings` are arguments of its SFTConfig."""
    from peft import LoraConfig

    model = build(shape, quantization, device)
    model.set_attn_implementation(attention)
    device.peak(reset=True)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return _with_trl(model, adapter, rows, data, device, folder, steps, settings)


def unsloth(
    rows: Rows,
    data: PreparedData,
    weights: Path,
    device: Device,
    folder: Path,
    steps: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """unsloth's model and adapter in TRL's trainer, as its documentation shows it. `weights` are real files, in nf4."""
    FastLanguageModel = import_unsloth().FastLanguageModel
    model, _ = FastLanguageModel.from_pretrained(str(weights), max_seq_length=rows.length, load_in_4bit=True)
    device.peak(reset=True)
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth",
    )
    return _with_trl(model, None, rows, data, device, folder, steps, settings)


def import_unsloth() -> Any:
    """The package, or Failed."""
    try:
        return importlib.import_module("unsloth")
    except Exception as error:  # it refuses what it does not know in many ways
        raise Failed(f"unsloth cannot be imported here: {error}") from error


def _with_trl(
    model: Any,
    adapter: Any,
    rows: Rows,
    data: PreparedData,
    device: Device,
    folder: Path,
    count: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetune.train.arguments import processing_class

    steps = Steps()

    class Noting(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                steps.note(float(logs["loss"]))

    values: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "max_steps": count,
        "max_length": rows.length,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device.name == "cpu",
        "bf16": device.name == "cuda",
        **settings,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**values),
        train_dataset=for_trl(data),
        processing_class=processing_class(data),
        peft_config=adapter,
        callbacks=[Noting()],
    )
    sequences = len(trainer.train_dataset)
    per_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    share = per_step / sequences
    trainer.train()
    return measured(steps, device, data.tokens * share, data.supervised_tokens * share)
