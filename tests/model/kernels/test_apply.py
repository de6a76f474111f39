"""Whole models with the faster layers: the same steps, less memory, fewer products, and back again."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from finetune.config.schema import Config
from finetune.model.base import load_base
from finetune.model.hardware import detect
from finetune.model.kernels.apply import apply

SHAPE = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {"intermediate_size": 176, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": GATED | {"attention_bias": True, "mlp_bias": True},
    "Mistral": GATED,
    "Qwen2": GATED,
    "Qwen3": GATED | {"head_dim": 16},
    "Gemma2": GATED | {"head_dim": 16},
    # The quicker way through experts knows no float64.
    "Mixtral": GATED | {"num_local_experts": 4, "experts_implementation": "eager"},
    "GPTNeoX": {"intermediate_size": 128},
    "Falcon": {"new_decoder_architecture": False, "bias": True},
}
IDS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(1))


def model_of(kind: str, folder: Path | None = None, quantization: str = "none", **changes: Any) -> PeftModel:
    """A small random model with a LoRA whose B is not zero, in training. With a folder it is loaded as `ft` does it."""
    torch.manual_seed(0)
    shape = SHAPE | MODELS[kind] | changes
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**shape))
    if folder is not None:
        base.save_pretrained(folder)
        config = {"base": str(folder), "data": [{"path": "/x.jsonl"}], "quantization": quantization}
        base = load_base(Config.model_validate(config), folder, detect()).model
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def recompute(model: PeftModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def step(model: PeftModel) -> dict[str, Tensor]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == sum(parameter.requires_grad for parameter in model.parameters())
    return gradients | {"loss": loss.detach()}


def error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest distance of a tensor from its reference, in units of the reference's norm."""
    return max(((found[k].double() - reference[k]).norm() / reference[k].norm()).item() for k in reference)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_the_same(kind: str, checkpointing: bool) -> None:
    model = model_of(kind)
    reference = step(copy.deepcopy(model).double())
    if checkpointing:
        recompute(model)
    plain = error(step(model), reference)
    assert 0 < plain < 1e-4
    for lora, fused in ((True, False), (False, True), (True, True)):
        applied = apply(model, lora=lora, fused=fused, device="cpu")
        # float32, in another order of sums: no further from float64 than twice the plain path.
        assert error(step(model), reference) <= 2 * plain, (lora, fused)
        applied.restore()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_a_quantised_base_is_the_same(tmp_path: Path, quantization: str, checkpointing: bool) -> None:
    model = model_of("Llama", tmp_path, quantization)
    if checkpointing:
        recompute(model)
    plain = {name: value.double() for name, value in step(model).items()}
    applied = apply(model, lora=True, fused=True, device="cpu")
    assert applied.linears == 14
    assert not applied.left
    assert error(step(model), plain) < 1e-5


def test_a_step_in_16_bit_is_no_further_from_the_truth() -> None:
    model = model_of("Llama").bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    reference = step(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = error(step(model), reference)
        apply(model, lora=True, fused=True, device="cpu")
        ours = error(step(model), reference)
    assert plain > 1e-3
    assert ours <= 1.2 * plain


@pytest.mark.parametrize(
    ("kind", "account"),
    [
        ("Llama", (14, 10, 5, 2, 2)),
        ("Qwen3", (14, 10, 9, 2, 2)),
        ("Gemma2", (14, 10, 9, 0, 2)),  # its MLP is not a SwiGLU
        ("Mixtral", (8, 6, 5, 0, 2)),  # its experts are no linear layers
        ("GPTNeoX", (8, 0, 0, 0, 2)),
        ("Falcon", (8, 0, 0, 0, 2)),
    ],
)
def test_what_is_replaced(kind: str, account: tuple[int, ...]) -> None:
    applied = apply(model_of(kind), lora=True, fused=True, device="cpu")
    found = (applied.linears, applied.grouped, applied.norms, applied.swiglus, applied.rotaries)
    assert found == account
    assert f"{account[0]} LoRA linears" in applied.account()
    if kind == "Gemma2":
        assert "left alone: 2 × MLP of Gemma2MLP" in applied.account()


def test_a_norm_that_only_looks_like_one_is_left_alone() -> None:
    model = model_of("Llama")

    class SquareRMSNorm(type(model.base_model.model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) ** 2  # type: ignore[no-any-return]

    model.base_model.model.model.norm = SquareRMSNorm(64)
    plain = step(model)
    applied = apply(model, lora=False, fused=True, device="cpu")
    assert (applied.norms, applied.left["norm of SquareRMSNorm"]) == (4, 1)
    assert torch.equal(step(model)["loss"], plain["loss"])


def products(model: PeftModel, run: Callable[[], object]) -> int:
    """How many base products a run makes in forward passes, those that are computed again among them."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    bases = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
    hooks = [base.register_forward_pre_hook(counted) for base in bases]
    run()
    for hook in hooks:
        hook.remove()
    return count


@pytest.mark.parametrize(("kind", "linears"), [("Llama", 7), ("GPTNeoX", 4), ("Falcon", 4)])
def test_recomputing_a_block_leaves_out_its_last_base_product(kind: str, linears: int) -> None:
    model = model_of(kind)
    recompute(model)
    assert products(model, lambda: step(model)) == 2 * (linears + linears)
    apply(model, lora=True, fused=False, device="cpu")
    assert products(model, lambda: step(model)) == 2 * (linears + linears - 1)


def saved_bytes(model: PeftModel) -> int:
    """Bytes that a forward pass through the blocks keeps for the backward pass, each storage once, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model.model.model(input_ids=IDS, use_cache=False)
    return sum(storages.values())


def test_less_is_saved() -> None:
    model = model_of("Llama", intermediate_size=256)
    plain = saved_bytes(model)
    apply(model, lora=False, fused=True, device="cpu")
    # Per token and layer, in widths: silu(gate) of 4 is gone, of about 22.
    assert saved_bytes(model) < 0.85 * plain
    apply(model, lora=True, fused=False, device="cpu")
    # And the inputs of q, k, v (1), of gate and up (1) and of down (4).
    assert saved_bytes(model) < 0.6 * plain


def test_what_is_recomputed_is_not_held() -> None:
    model = model_of("Llama", intermediate_size=251)
    recompute(model)
    apply(model, lora=True, fused=True, device="cpu")
    result = model(input_ids=IDS, use_cache=False).logits
    gc.collect()
    inside = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape == (*IDS.shape, 251)]
    assert not inside
    assert result.requires_grad


def test_without_gradients_and_without_the_adapter_it_is_the_librarys_bit_for_bit() -> None:
    model = model_of("Qwen2")
    prompt = {"input_ids": IDS[:, :5], "attention_mask": torch.ones_like(IDS[:, :5])}

    def answers() -> list[Tensor]:
        with torch.no_grad():
            result = [model.eval().generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=True)]
            with model.disable_adapter():
                result.append(model(IDS).logits)
        return [*result, step(model.train())["loss"]]

    plain = answers()
    apply(model, lora=True, fused=True, device="cpu")
    ours = answers()
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    torch.testing.assert_close(ours[2], plain[2])


def test_it_can_be_undone_and_names_stay(tmp_path: Path) -> None:
    model = model_of("Llama")
    plain, names = step(model), list(model.state_dict())
    forwards = {name: module.forward for name, module in model.named_modules()}
    applied = apply(model, lora=True, fused=True, device="cpu")
    assert list(model.state_dict()) == names
    again = apply(model, lora=True, fused=True, device="cpu")
    assert (again.linears, again.norms) == (0, 0)  # what is replaced already is not replaced twice
    model.save_pretrained(tmp_path)
    copied = copy.deepcopy(model)
    applied.restore()
    assert {name: module.forward for name, module in model.named_modules()} == forwards
    found = step(model)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    torch.testing.assert_close(step(copied)["loss"], plain["loss"])


def test_the_random_state_is_left_alone() -> None:
    model = model_of("Llama")
    before = torch.get_rng_state()
    apply(model, lora=True, fused=True, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
