"""The switches of `speed:` change how a step is computed, not what: each run trains as the plain one does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.console import Console
from finetune.errors import ConfigError
from finetune.evaluate.compare import held_out_loss
from finetune.model.adapter import add_adapter, load_adapter
from finetune.model.base import LoadedModel, load_base
from finetune.model.hardware import Hardware, detect
from finetune.model.recompute import blocks
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged
from finetune.stopping import Stopper
from finetune.train.length import remember, remembered
from finetune.train.sft import train
from finetune.train.speed import make_faster
from tests.train.conftest import fit_of, prepared, tiny_config

PLAIN = {"attention": "sdpa", "fused": False, "lora": False, "head": False}


def trained(tmp_path: Path, base: Path, name: str, speed: dict[str, Any], **overrides: Any) -> RunFolder:
    config = tiny_config(tmp_path, base=str(base), speed=speed, evaluation={"split": 0}, **overrides)
    run = RunFolder(tmp_path / name)
    run.create()
    loaded = load_base(config, base, detect())
    with logged(run.log):
        train(config, prepared(config), loaded, run, Console(), Stopper(), {}, fit_of(config, run))
    return run


def logged_values(run: RunFolder, name: str) -> list[float]:
    return [json.loads(line)[name] for line in run.metrics.read_text().splitlines()]


def losses(run: RunFolder) -> list[float]:
    return logged_values(run, "loss")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, RunFolder]:
    folder = tmp_path_factory.mktemp("plain")
    return {kind: trained(folder, tiny_base, kind, PLAIN, quantization=kind) for kind in ("none", "nf4")}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "speed",
    [PLAIN | {"attention": "varlen"}, PLAIN | {"fused": True}, PLAIN | {"lora": True}, PLAIN | {"head": True}, {}],
    ids=["attention", "fused", "lora", "head", "all"],
)
def test_a_faster_run_trains_as_the_plain_one(
    tmp_path: Path, tiny_base: Path, plain: dict[str, RunFolder], speed: dict[str, Any], quantization: str
) -> None:
    run = trained(tmp_path, tiny_base, "fast", speed, quantization=quantization)
    expected = plain[quantization]
    # Sums in another order: 1e-7 of a loss of about 7, carried through four steps of AdamW.
    assert losses(run) == pytest.approx(losses(expected), rel=1e-5)
    assert len(losses(run)) == 4
    # Counted by TRL's head and by ours. TRL's is a mean of micro batches, ours of tokens: equal for one, near for two.
    accuracies = logged_values(run, "token_accuracy"), logged_values(expected, "token_accuracy")
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)
    ours, theirs = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # AdamW's first steps are sign-like: where a gradient is near zero, rounding decides by up to the learning rate.
        assert (tensor - theirs[name]).abs().mean() < 1e-5, name
        assert not torch.equal(tensor, torch.zeros_like(tensor))


def test_what_was_done_is_in_the_manifest(tmp_path: Path, plain: dict[str, RunFolder], tiny_base: Path) -> None:
    said = json.loads(plain["none"].manifest.read_text())["speed"]
    assert said["attention"] == "with a mask: as configured"
    said = json.loads(trained(tmp_path, tiny_base, "fast", {}).manifest.read_text())["speed"]
    assert said["attention"].startswith("varlen: ")
    assert said["head"].startswith("loss and gradient together: ")
    assert "14 LoRA linears" in said["layers"]


@pytest.mark.parametrize("family", ["Gemma2", "Falcon"])
def test_varlen_that_cannot_be_had_is_an_error_where_it_is_asked_for(tmp_path: Path, family: str) -> None:
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    described = getattr(transformers, f"{family}Config")(vocab_size=64, **shape)
    config = tiny_config(tmp_path, speed={"attention": "varlen"})
    model = transformers.AutoModelForCausalLM.from_config(described)
    loaded = LoadedModel(add_adapter(config, LoadedModel(model, detect())), detect())
    with pytest.raises(ConfigError, match=r"speed\.attention: varlen is not possible: ") as caught:
        make_faster(config, loaded, packed=False)
    assert described.model_type in str(caught.value)


def test_afterwards_the_model_is_as_it_was(tmp_path: Path, tiny_base: Path) -> None:
    config = tiny_config(tmp_path, base=str(tiny_base))
    loaded = load_base(config, tiny_base, detect())
    loaded = LoadedModel(add_adapter(config, loaded), loaded.hardware)

    def own() -> set[str]:
        return {name for name, module in loaded.model.named_modules() if "forward" in vars(module)}

    before, attention = own(), loaded.model.config._attn_implementation
    names = [name for name, _ in loaded.model.named_parameters()]
    faster = make_faster(config, loaded, packed=True)
    assert own() - before
    assert loaded.model.config._attn_implementation != attention
    assert [name for name, _ in loaded.model.named_parameters()] == names
    faster.restore()
    assert own() == before
    assert loaded.model.config._attn_implementation == attention
    assert not any(layer.gradient_checkpointing for layer in blocks(loaded.model))


class BfloatOnCpu(Hardware):
    """A CPU that is asked to compute as a GPU does."""

    @property
    def compute_dtype(self) -> Any:
        return "bfloat16"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_16_bit_only_the_adapter_is_wider(tmp_path: Path, tiny_base: Path, quantization: str) -> None:
    """No norm and no head in float32, as kbit preparation would leave them; the adapter learns in float32."""
    config = tiny_config(tmp_path, base=str(tiny_base), quantization=quantization, evaluation={"split": 0})
    loaded = load_base(config, tiny_base, BfloatOnCpu("cpu", "a CPU", 2**34, True))
    run = RunFolder(tmp_path / "run")
    run.create()
    dtypes: dict[str, set[torch.dtype]] = {"adapter": set(), "base": set()}
    computed: set[torch.dtype] = set()

    def look(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if module.training:
            computed.add(output.dtype)
            for parameter in loaded.model.parameters():
                if parameter.is_floating_point():
                    dtypes["adapter" if parameter.requires_grad else "base"].add(parameter.dtype)

    for layer in blocks(loaded.model):
        layer.register_forward_hook(lambda module, args, output: look(module, args, output))
    with logged(run.log):
        train(config, prepared(config), loaded, run, Console(), Stopper(), {}, fit_of(config, run))
    assert dtypes == {"adapter": {torch.float32}, "base": {torch.bfloat16}}
    assert computed == {torch.bfloat16}
    assert all(loss == pytest.approx(losses(run)[0], rel=0.2) for loss in losses(run))


def test_in_16_bit_the_trained_model_is_evaluated_as_it_will_be_from_disk(tmp_path: Path, tiny_base: Path) -> None:
    """The trainer's mixed precision is gone, and whatever it had put around the model, also after a second attempt."""
    config = tiny_config(tmp_path, base=str(tiny_base), quantization="none")
    hardware = BfloatOnCpu("cpu", "a CPU", 2**34, True)
    loaded = load_base(config, tiny_base, hardware)
    run = RunFolder(tmp_path / "run")
    run.create()
    ran_out: list[int] = []

    def run_out_once(module: torch.nn.Module, args: Any) -> None:
        if module.training and not ran_out:
            ran_out.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = blocks(loaded.model)[0].register_forward_pre_hook(run_out_once)
    data = prepared(config)
    with logged(run.log):
        trained = train(config, data, loaded, run, Console(), Stopper(), {}, fit_of(config, run)).loaded.model
    hook.remove()
    assert ran_out
    fresh = load_adapter(load_base(config, tiny_base, hardware), run.adapter)
    ids = torch.tensor([data.held_out[0].ids.tolist()])
    with torch.inference_mode():
        ours, theirs = trained(input_ids=ids).logits, fresh(input_ids=ids).logits
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    losses = [
        held_out_loss(one, data.held_out, data.tokenizer.pad_id, lambda done, all_: None) for one in (trained, fresh)
    ]
    assert losses[0] == losses[1]


def test_how_a_step_was_cut_is_remembered_until_another_cut_is_configured(tmp_path: Path, run: RunFolder) -> None:
    config = tiny_config(tmp_path)
    fit = replace(fit_of(config, run), micro_batch=1, accumulation=4, recomputed=1)
    assert remembered(config, run) is None
    remember(config, run, fit, "a test")
    assert json.loads(run.manifest.read_text())["fit"]["why"] == "a test"
    remember(config, run, fit, "as before in this run")
    assert json.loads(run.manifest.read_text())["fit"]["why"] == "a test"
    assert remembered(config, run) == fit
    other = tiny_config(tmp_path, train={"gradient_checkpointing": True})
    assert remembered(other, run) is None
    another_step = {"micro_batch": 3, "accumulation": 1, "recomputed": 0}
    for damaged in ({}, another_step, {"micro_batch": True}):
        manifest = json.loads(run.manifest.read_text())
        run.update_manifest(fit={**manifest["fit"], "used": damaged})
        assert remembered(config, run) is None
