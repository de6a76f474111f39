"""Recomputing some layers changes memory and time, and not one bit of a gradient."""

import gc

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from finetune.model.recompute import Offload, blocks, recompute_layers

LAYERS = 5


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).train()


def _gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 24))
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def _forward_passes(model: PreTrainedModel) -> list[int]:
    """How often each layer's attention computes in one step."""
    counts = [0] * LAYERS
    handles = []
    for index, layer in enumerate(blocks(model)):

        def count(*_: object, index: int = index) -> None:
            counts[index] += 1

        assert isinstance(layer.self_attn, torch.nn.Module)
        handles.append(layer.self_attn.register_forward_pre_hook(count))
    _gradients(model)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, LAYERS])
def test_gradients_are_the_same_to_the_bit(model: PreTrainedModel, count: int, offload: bool) -> None:
    expected = _gradients(model)
    assert recompute_layers(model, count, offload=offload) == count
    for ours, plain in zip(_gradients(model), expected, strict=True):
        assert torch.equal(ours, plain)


def test_the_first_layers_are_recomputed_and_no_other(model: PreTrainedModel) -> None:
    recompute_layers(model, 2)
    assert _forward_passes(model) == [2, 2, 1, 1, 1]
    recompute_layers(model, 0)
    assert _forward_passes(model) == [1] * LAYERS


def test_more_than_there_are_is_all(model: PreTrainedModel) -> None:
    assert recompute_layers(model, 99) == LAYERS


def test_dropout_is_drawn_once() -> None:
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout=0.3,
    )
    model = GPTNeoXForCausalLM(config).train()
    expected = _gradients(model)
    recompute_layers(model, LAYERS)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model), expected, strict=True))


def test_only_the_inputs_of_layers_are_away(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []
    pack = Offload._pack

    def watched(self: Offload, tensor: torch.Tensor) -> object:
        packed = pack(self, tensor)
        if packed is not tensor:
            moved.append(tuple(tensor.shape))
        return packed

    monkeypatch.setattr(Offload, "_pack", watched)
    recompute_layers(model, 3, offload=True)
    _gradients(model)
    assert moved == [(2, 24, 32)] * 3


def test_a_step_that_was_broken_off_leaves_no_trace(model: PreTrainedModel) -> None:
    expected = _gradients(model)
    recompute_layers(model, LAYERS, offload=True)
    model(input_ids=torch.zeros((1, 8), dtype=torch.long), use_cache=False)  # and no backward pass
    offload = blocks(model)[0]._gradient_checkpointing_func
    assert isinstance(offload, Offload)
    gc.collect()
    assert [known() for known in offload._waiting] == [None] * LAYERS
    for ours, plain in zip(_gradients(model), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_offloaded_inputs_come_back_unchanged(model: PreTrainedModel) -> None:
    model = model.cuda()
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 24), device="cuda")

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    recompute_layers(model, LAYERS, offload=True)
    for ours, plain in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
