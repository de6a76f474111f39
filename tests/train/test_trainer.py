"""Steps that fail: numbers that are none, memory that runs out, a signal in the middle."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.schema import Config
from finetune.console import Console
from finetune.errors import RunError, StorageError, TrainingError
from finetune.evaluate.compare import held_out_loss
from finetune.model.base import LoadedModel, load_base
from finetune.model.hardware import detect
from finetune.plan.setup import Fit
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged
from finetune.stopping import Stopped, Stopper, stoppable
from finetune.train.checkpoints import seal
from finetune.train.length import remember
from finetune.train.sft import train
from tests.train.conftest import fit_of, prepared, tiny_config

Forward = Callable[[torch.nn.Module, Any, dict[str, Any]], None]


def start(
    config: Config, run: RunFolder, before_forward: Forward | None = None, stopper: Stopper | None = None
) -> LoadedModel:
    run.create()
    loaded = load_base(config, Path(config.base), detect())
    if before_forward is not None:
        # The decoder: training has its own way from there to the loss.
        loaded.model.model.register_forward_pre_hook(before_forward, with_kwargs=True)
    with logged(run.log):
        return train(
            config, prepared(config), loaded, run, Console(), stopper or Stopper(), {}, fit_of(config, run)
        ).loaded


def adapter_of(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def equal(one: RunFolder, other: RunFolder) -> bool:
    a, b = adapter_of(one), adapter_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def small(tmp_path: Path, base: Path, **overrides: Any) -> Config:
    train = {"packing": False, **overrides.pop("train", {})}
    return tiny_config(
        tmp_path, base=str(base), quantization=overrides.pop("quantization", "none"), train=train, **overrides
    )


def sequences_in(batch: dict[str, Any]) -> int:
    """Sequences of a micro batch without packing, however it is laid out."""
    begins = batch.get("cu_seq_lens_q")
    return int(batch["input_ids"].shape[0]) if begins is None else len(begins) - 1


class MemoryFor:
    """Stands for a card on which only so many sequences fit, in training or in evaluation."""

    def __init__(self, sequences: int, *, from_call: int = 0, in_training: bool = True) -> None:
        self.sequences, self.from_call, self.in_training = sequences, from_call, in_training
        self.calls = 0

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training != self.in_training:
            return
        self.calls += 1
        if self.calls > self.from_call and sequences_in(kwargs) > self.sequences:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.fault("out of memory", "training", "smaller micro batches make the same steps; said once")
@pytest.mark.parametrize("from_call", [0, 4], ids=["at the first batch", "after a checkpoint"])
def test_where_memory_runs_out_smaller_micro_batches_make_the_same_steps(
    tmp_path: Path, tiny_base: Path, from_call: int
) -> None:
    config = small(tmp_path, tiny_base, train={"micro_batch_size": 4, "gradient_accumulation_steps": 1})
    small_run, retried = RunFolder(tmp_path / "small"), RunFolder(tmp_path / "retried")
    start(small(tmp_path, tiny_base, train={"micro_batch_size": 1, "gradient_accumulation_steps": 4}), small_run)
    start(
        config.model_copy(update={"train": config.train.model_copy(update={"save_every": 2})}),
        retried,
        MemoryFor(1, from_call=from_call),
    )
    said = [line for line in retried.log.read_text().splitlines() if line.startswith("warning: ")]
    assert said == [
        "warning: out of memory with 4 × 1 sequences; going on with 2 × 2 sequences, which is the same step",
        "warning: out of memory with 2 × 2 sequences; going on with 1 × 4 sequences, which is the same step",
    ]
    assert json.loads(retried.manifest.read_text())["fit"]["used"]["micro_batch"] == 1
    if from_call == 0:
        assert equal(small_run, retried)
    else:
        # Two of the steps were taken with larger batches, whose sums round otherwise: 1e-7 a step, in a few steps.
        a, b = adapter_of(small_run), adapter_of(retried)
        assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    assert [json.loads(line)["step"] for line in retried.metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_what_memory_allowed_is_remembered_when_the_run_goes_on(tmp_path: Path, tiny_base: Path) -> None:
    config = small(tmp_path, tiny_base, train={"micro_batch_size": 4, "gradient_accumulation_steps": 1})
    run = RunFolder(tmp_path / "run")
    run.create()
    remember(config, run, Fit(micro_batch=2, accumulation=2, recomputed=1, offload=False), "a test")
    watch = MemoryFor(2)
    start(config, run, watch)
    assert watch.calls == 1 + 4 * 2  # the longest batch, and two micro batches a step


@pytest.mark.fault("out of memory with a single sequence", "training", "refused before step 1, with what to lower")
def test_a_sequence_that_does_not_fit_alone_is_refused_before_the_first_step(tmp_path: Path, tiny_base: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(TrainingError, match="with one sequence at a time") as caught:
        start(small(tmp_path, tiny_base), run, MemoryFor(0))
    assert "train.sequence_length" in str(caught.value.problems[0].hint)
    assert not run.metrics.exists()
    assert not run.adapter.exists()


def test_the_longest_batch_comes_first_in_training_and_in_evaluation(tmp_path: Path, tiny_base: Path) -> None:
    config = small(tmp_path, tiny_base, evaluation={"split": 4, "every": 4, "samples": 1})
    widths: list[tuple[bool, int]] = []
    start(
        config,
        RunFolder(tmp_path / "run"),
        lambda module, args, kwargs: widths.append((module.training, kwargs["input_ids"].shape[1])),
    )
    while not widths[0][0]:
        widths.pop(0)  # a few tokens are computed before anything, to see what the model can be given
    assert [training for training, _ in widths[:2]] == [True, False]
    assert widths[0][1] == max(width for training, width in widths if training)
    assert widths[1][1] == max(width for training, width in widths if not training)


def test_the_longest_batch_is_tried_beside_all_that_a_later_step_has(tmp_path: Path, tiny_base: Path) -> None:
    """AdamW's state (8 bytes a parameter) and the gradients of earlier micro batches (4) exist from step 2 on."""
    import gc

    beside: list[int] = []

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and not beside:
            kept = (one for one in gc.get_objects() if type(one) is torch.Tensor and one.dtype == torch.uint8)
            beside.append(max((tensor.numel() for tensor in kept if tensor.dim() == 1), default=0))

    loaded = start(small(tmp_path, tiny_base), RunFolder(tmp_path / "run"), look)
    trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    assert beside == [12 * trained]


def test_the_loss_on_held_out_rows_has_no_part_that_balances_experts(tmp_path: Path, tiny_base: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    base = tmp_path / "mixtral"
    described = json.loads((tiny_base / "config.json").read_text())
    torch.manual_seed(0)
    mixtral = MixtralConfig(
        vocab_size=described["vocab_size"],
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=5.0,  # so large that it cannot be overlooked
    )
    MixtralForCausalLM(mixtral).save_pretrained(base)
    for path in tiny_base.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (base / path.name).write_bytes(path.read_bytes())
    for head in (True, False):
        config = small(tmp_path, base, evaluation={"split": 4, "every": 4, "samples": 0}, speed={"head": head})
        run = RunFolder(tmp_path / f"run-{head}")
        loaded = start(config, run)
        data = prepared(config)
        expected, _ = held_out_loss(loaded.model, data.held_out, data.tokenizer.pad_id, lambda done, total: None)
        found = [json.loads(line).get("eval_loss") for line in run.metrics.read_text().splitlines()]
        assert found[-1] == pytest.approx(expected, rel=1e-4)
        assert not loaded.model.config.output_router_logits


def test_trying_the_longest_batch_leaves_no_trace_in_what_is_trained(tmp_path: Path, tiny_base: Path) -> None:
    from finetune.train.trainer import Trainer

    config = small(tmp_path, tiny_base, lora={"rank": 4, "dropout": 0.3})
    tried, untried = RunFolder(tmp_path / "tried"), RunFolder(tmp_path / "untried")
    start(config, tried)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "try_longest", lambda *_: None)
        start(config, untried)
    assert equal(tried, untried)


@pytest.mark.fault("a loss that is not a number", "training", "stopped within the step, which is named with its rows")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_step_whose_loss_is_not_finite_is_not_taken_and_its_rows_are_named(
    tmp_path: Path, tiny_base: Path, quantization: str
) -> None:
    """One row has a token whose embedding is NaN: the micro batch with it must be named, and no other."""
    config = small(tmp_path, tiny_base, quantization=quantization, evaluation={"split": 0})
    data = prepared(config)
    rows = list(data.train)
    counts: dict[int, set[int]] = {}
    for number, row in enumerate(rows):
        for token in row.ids.tolist():
            counts.setdefault(token, set()).add(number)
    token, (number,) = next((token, users) for token, users in counts.items() if len(users) == 1)
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = config.model_copy(
        update={
            "base": str(base),
            "train": config.train.model_copy(update={"max_steps": None, "epochs": 1, "save_every": 1}),
        }
    )
    run = RunFolder(tmp_path / "run")
    with pytest.raises(TrainingError, match="the loss is no longer a finite number at step") as caught:
        start(config, run, stopper=Stopper())
    said = str(caught.value)
    assert rows[number].place in said
    assert said.count(".jsonl:") == config.train.micro_batch_size
    assert not run.adapter.exists()
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        tensors = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, tiny_base: Path) -> None:
    """A learning rate beyond what float32 holds: the loss and the gradient are fine, and the step destroys all."""
    run = RunFolder(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"`.*lora_.*` is no longer a finite number at step 1"):
        start(small(tmp_path, tiny_base, train={"learning_rate": 1e38, "save_every": 1, "warmup": 0.0}), run)
    assert not run.adapter.exists()
    assert not list(run.checkpoints.glob("checkpoint-*"))


@pytest.mark.fault("SIGTERM, SIGINT, SIGHUP", "training step", "saved at the end of the step, then exit code 75")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_the_run_at_the_end_of_the_step(tmp_path: Path, tiny_base: Path, name: str) -> None:
    run = RunFolder(tmp_path / "run")
    calls = 0

    def send(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += module.training
        if calls == 1 + 2 + 1:  # the longest batch, the two micro batches of step 1, and the first of step 2
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(Stopped, match=name), stoppable() as stopper:
        start(small(tmp_path, tiny_base, train={"save_every": 100}), run, send, stopper)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    assert not run.adapter.exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_no_pickle_that_could_run_something_is_written(tmp_path: Path, tiny_base: Path) -> None:
    run = RunFolder(tmp_path / "run")
    start(small(tmp_path, tiny_base), run)
    assert not list(run.path.rglob("training_args.bin"))
    for path in [*run.path.rglob("*.pt"), *run.path.rglob("*.pth")]:
        from transformers.trainer import safe_globals

        with safe_globals():
            torch.load(path, weights_only=True)


def test_a_checkpoint_of_somebody_else_that_cannot_be_read_is_an_error_and_not_a_bug(
    tmp_path: Path, tiny_base: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    config = small(tmp_path, tiny_base, train={"save_every": 2})
    start(config, run)
    for name in ("checkpoint-4",):
        (run.checkpoints / name / "whole.json").unlink()
    checkpoint = run.checkpoints / "checkpoint-2"
    (checkpoint / "optimizer.pt").write_bytes(b"not a zip archive")
    seal(checkpoint)
    with pytest.raises(RunError, match="this checkpoint cannot be gone on from"):
        start(config, run)


@pytest.mark.fault("a disk that is too small", "before step 1", "refused, with what is needed and what is free")
def test_room_for_the_checkpoints_is_asked_for_before_the_first_step(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100_000))  # type: ignore[attr-defined]
    run = RunFolder(tmp_path / "run")
    with pytest.raises(StorageError, match=r"training \(it keeps 2 checkpoints\): .* needed, 97.7 KiB free"):
        start(small(tmp_path, tiny_base), run)
    assert not run.metrics.exists()


@pytest.mark.fault("an evaluation set of any size", "evaluation", "memory does not grow with it: no logits are kept")
def test_evaluation_keeps_no_logits(tmp_path: Path, tiny_base: Path) -> None:
    """In training and at its end: of all outputs, no more than the last two are alive when the next one is made."""
    import weakref

    config = small(tmp_path, tiny_base, evaluation={"split": 12, "every": 1, "samples": 0}, train={"max_steps": 1})
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watch(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        alive.append(sum(reference() is not None for reference in outputs))
        outputs.append(weakref.ref(output))

    loaded = load_base(config, Path(config.base), detect())
    # Training has its own way from hidden states to the loss; the last layer's output is made in all of them.
    loaded.model.model.norm.register_forward_hook(watch)
    loaded.model.lm_head.register_forward_hook(watch)
    run = RunFolder(tmp_path / "run")
    run.create()
    data = prepared(config)
    with logged(run.log):
        train(config, data, loaded, run, Console(), Stopper(), {}, fit_of(config, run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.evaluate.compare.BATCH_LOGITS", 1)  # a row at a time
        held_out_loss(loaded.model, data.held_out, data.tokenizer.pad_id, lambda done, total: None)
    assert len(alive) > 2 * 12
    assert max(alive) <= 2


def test_after_training_the_optimizer_has_let_go_of_its_memory(tmp_path: Path, tiny_base: Path) -> None:
    import gc

    start(small(tmp_path, tiny_base), RunFolder(tmp_path / "run"))
    gc.collect()
    holding = [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer) and one.state]
    assert holding == []


def test_in_float16_skipped_steps_are_allowed_but_not_for_ever() -> None:
    """Loss scaling skips steps until it has found a scale; a model that has none must not "finish" untrained."""
    from types import SimpleNamespace

    from finetune.train.trainer import MAX_SKIPPED, Trainer

    trainer = Trainer.__new__(Trainer)
    layer = torch.nn.Linear(2, 2)
    trainer.model, trainer.args, trainer._place = layer, SimpleNamespace(fp16=True), str
    trainer._skipped = 0

    def step(number: int, value: float) -> None:
        layer.weight.grad = torch.full((2, 2), value)
        trainer._losses = [(torch.tensor(1.0), [[number]])]
        trainer.require_finite(number)

    for number in range(MAX_SKIPPED - 1):
        step(number, float("inf"))
    step(100, 1.0)
    for number in range(MAX_SKIPPED - 1):
        step(number, float("inf"))
    with pytest.raises(TrainingError, match=r"the gradient is no longer a finite number at step 7 \(rows: 7\)"):
        step(7, float("inf"))


def test_what_the_last_checkpoint_makes_superfluous_goes_even_if_its_writer_was_killed(
    tmp_path: Path, tiny_base: Path
) -> None:
    import shutil

    run = RunFolder(tmp_path / "run")
    config = small(tmp_path, tiny_base, train={"save_every": 1})
    start(config, run)
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-3", "checkpoint-4"}
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(run.checkpoints / "checkpoint-3", run.checkpoints / name)
    start(config, run)
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-3", "checkpoint-4"}
