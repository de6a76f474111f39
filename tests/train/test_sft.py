"""Training, on a real 4-bit base on the CPU: what is saved, what goes on after a fault, what stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.config.schema import Config
from finetune.console import Console
from finetune.errors import TrainingError
from finetune.model.base import load_base
from finetune.model.hardware import Hardware, choose_optimizer, detect
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged
from finetune.stopping import Stopper
from finetune.train.checkpoints import SEAL, damage, newest_whole
from finetune.train.length import steps_in_all
from finetune.train.sft import Trained, train
from tests.train.conftest import fit_of, prepared, tiny_config


def run_training(config: Config, run: RunFolder, stopper: Stopper | None = None) -> Trained:
    with logged(run.log):
        loaded = load_base(config, Path(config.base), detect())
        return train(config, prepared(config), loaded, run, Console(), stopper or Stopper(), {}, fit_of(config, run))


def adapter_of(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def test_an_adapter_is_saved_in_float32_with_its_tokenizer_and_template(tmp_path: Path, run: RunFolder) -> None:
    config = tiny_config(tmp_path)
    trained = run_training(config, run)
    tensors = adapter_of(run)
    assert trained.steps == 4
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    names = {path.name for path in run.adapter.iterdir()}
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert not (run.path / "adapter.partial").exists()
    saved = json.loads((run.adapter / "adapter_config.json").read_text("utf-8"))
    assert saved["base_model_name_or_path"] == config.base


def test_metrics_have_a_line_for_every_logged_step(tmp_path: Path, run: RunFolder) -> None:
    run_training(tiny_config(tmp_path), run)
    lines = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"} <= lines[0].keys()


def test_the_base_stays_nf4_with_double_quantisation_and_the_adapter_trains_in_float32(
    tmp_path: Path, run: RunFolder
) -> None:
    from bitsandbytes.nn import Linear4bit

    trained = run_training(tiny_config(tmp_path), run)
    layers = [module for module in trained.loaded.model.modules() if isinstance(module, Linear4bit)]
    assert layers
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert not layer.support_avx512bf16_for_cpu
    trainable = [p for p in trained.loaded.model.parameters() if p.requires_grad]
    assert trainable
    assert all(p.dtype == torch.float32 for p in trainable)


def test_evaluation_in_the_middle_does_not_cost_the_gradient_through_the_base(tmp_path: Path) -> None:
    """bitsandbytes repacks 4-bit weights in an eval forward on some CPUs; then gradients through the base vanish."""
    config = tiny_config(tmp_path)
    loaded = load_base(config, Path(config.base), detect())
    from finetune.model.adapter import add_adapter

    model = add_adapter(config, loaded)
    ids = torch.arange(40).reshape(1, -1) + 100

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The first layer's adapter learns only through the whole base above it.
    assert any(gradient.abs().max() > 0 for name, gradient in before.items() if "layers.0." in name)


def test_a_run_that_was_cut_off_goes_on_to_the_same_adapter(tmp_path: Path, run: RunFolder) -> None:
    config = tiny_config(tmp_path, train={"max_steps": 6, "save_every": 3}, lora={"dropout": 0.1})
    run_training(config, run)
    unbroken = adapter_of(run)
    broken = RunFolder(tmp_path / "broken")
    broken.create()
    shutil.copytree(run.checkpoints / "checkpoint-3", broken.checkpoints / "checkpoint-3")
    shutil.copyfile(run.metrics, broken.metrics)
    run_training(config, broken)
    resumed = adapter_of(broken)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    steps = [json.loads(line)["step"] for line in broken.metrics.read_text("utf-8").splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_passed_over_for_the_whole_one_before_it(tmp_path: Path, run: RunFolder) -> None:
    run_training(tiny_config(tmp_path, train={"max_steps": 4, "save_every": 2}), run)
    newest = run.checkpoints / "checkpoint-4"
    assert newest_whole(run.checkpoints) == (newest, [])
    weights = newest / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found, faults = newest_whole(run.checkpoints)
    assert found == run.checkpoints / "checkpoint-2"
    assert faults == [f"{newest} is passed over: adapter_model.safetensors is not what was written"]
    (newest / SEAL).unlink()
    assert damage(newest) == "it was not written to the end (whole.json is missing)"


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_no_adapter(tmp_path: Path, run: RunFolder) -> None:
    """A base with a weight that is infinite stands for a learning rate that blows up: the loss is NaN from step 1."""
    from safetensors.torch import save_file

    config = tiny_config(tmp_path, quantization="none")
    base = tmp_path / "base"
    shutil.copytree(config.base, base)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = torch.full_like(tensors[name], float("inf"))
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="no longer a finite number at step 1"):
        run_training(config.model_copy(update={"base": str(base)}), run)
    assert not run.adapter.exists()
    assert not list(run.checkpoints.glob("checkpoint-*"))


def test_steps_are_counted_as_the_trainer_counts_them(tmp_path: Path, run: RunFolder) -> None:
    config = tiny_config(
        tmp_path,
        rows=15,
        train={
            "max_steps": None,
            "epochs": 2,
            "packing": False,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
    )
    data = prepared(config)
    assert len(data.train) == 11
    # 11 rows are 6 micro-batches, which make 3 steps (the last one of 2 batches), twice over.
    assert steps_in_all(config, data) == 6
    run_training(config, run)
    assert json.loads(run.metrics.read_text("utf-8").splitlines()[-1])["step"] == 6


def test_paged_optimizers_say_that_nothing_is_paged_on_a_cpu(tmp_path: Path) -> None:
    cpu, gpu = Hardware("cpu", "2 CPU cores", 0, bf16=False), Hardware("cuda", "a card", 0, bf16=True)
    config = tiny_config(tmp_path, train={"optimizer": "paged_adamw_8bit"})
    assert choose_optimizer(config, cpu) == (
        "paged_adamw_8bit",
        "paged_adamw_8bit, as configured; nothing is paged on a CPU",
    )
    assert choose_optimizer(config, gpu) == ("paged_adamw_8bit", "paged_adamw_8bit, as configured")
    assert choose_optimizer(tiny_config(tmp_path), cpu)[0] == "adamw_torch_fused"
