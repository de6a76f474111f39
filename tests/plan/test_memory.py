"""Memory against what is counted: tensors that autograd keeps, and storages that are alive in whole steps.

Small real models, PEFT's LoRA, bitsandbytes' nf4. "float32" is a CPU as it is; "autocast" is the nearest thing to a GPU
that runs here: a base in bfloat16 under autocast, adapters in float32, and LayerNorm in float32, as CUDA's autocast
computes it and a CPU's does not.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.errors import ConfigError
from finetune.evaluate import compare
from finetune.model.families import quantisable_class
from finetune.model.generate import greedy
from finetune.model.kernels import head as head_kernel
from finetune.model.kernels.apply import apply
from finetune.model.recompute import recompute_layers
from finetune.plan import memory, saved
from finetune.plan.bases import shape_for
from finetune.plan.memory import evaluation_memory, outside_layers, rotary, training_memory, weight_bytes
from finetune.plan.setup import PLAIN, Kernels, Setup
from finetune.plan.shape import shape_of

FAST = Kernels(attention="sdpa", fused=True, lora=True, head=True)
GIB = 2**30


def build(setup: Setup, folder: Path | None = None) -> Any:
    """The model of a setup, quantised if it says so, with the adapter and the kernels that it names."""
    import peft
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

    shape = setup.shape
    dtype = torch.float32 if setup.dtype_bytes == 4 else torch.bfloat16
    facts: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "pad_token_id": 0,
        "intermediate_size": shape.intermediate,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    if shape.model_type in {"falcon", "gpt_neox"}:
        facts = {key: value for key, value in facts.items() if key not in {"num_key_value_heads", "head_dim"}}
    if shape.model_type == "falcon":
        facts["ffn_hidden_size"] = facts.pop("intermediate_size")
    if shape.model_type in {"mistral", "phi3", "gemma2"}:
        facts["sliding_window"] = None if shape.model_type != "gemma2" else 4096
    torch.manual_seed(0)
    config = CONFIG_MAPPING[shape.model_type](**facts)
    attention = "eager" if setup.kernels.attention == "eager" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    if setup.quantization == "nf4":
        assert folder is not None
        model.save_pretrained(folder)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = quantisable_class(config).from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, quantization_config=nf4, device_map={"": "cpu"}
        )
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    targets = setup.targets if isinstance(setup.targets, str) else list(setup.targets)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=setup.rank, target_modules=targets, lora_dropout=0.1 if setup.dropout else 0.0
    )
    adapted = peft.get_peft_model(model, lora).train()
    if setup.dtype_bytes == 2:
        for module in adapted.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    apply(adapted, lora=setup.kernels.lora, fused=setup.kernels.fused, device="cpu")
    return adapted


def batch(setup: Setup) -> dict[str, torch.Tensor]:
    """Rows as the collator lays them out: positions that start again where the next row of a sequence begins."""
    ids = torch.arange(setup.tokens).reshape(setup.micro_batch, setup.sequence) % setup.shape.vocabulary
    positions = (torch.arange(setup.sequence) % setup.row).repeat(setup.micro_batch, 1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


def autocast(setup: Setup) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=setup.dtype_bytes == 2)


def setup_of(model_type: str, *, hidden: int = 64, width: int = 176, rank: int = 8, **changes: Any) -> Setup:
    facts: dict[str, object] = {"model_type": model_type, "hidden_size": hidden, "num_attention_heads": 4}
    # GPT-NeoX's hidden states may be float32 from the second layer on (saved.py): the first should weigh little.
    facts |= {"num_hidden_layers": 6 if model_type == "gpt_neox" else 2, "vocab_size": 160, "sliding_window": None}
    if model_type != "falcon":
        facts["intermediate_size"] = width
    if model_type not in {"falcon", "gpt_neox"}:
        facts |= {"num_key_value_heads": 2, "head_dim": hidden // 4}
    setup = Setup(
        shape=shape_of(facts, "x"),
        quantization="none",
        rank=rank,
        targets="all-linear",
        optimizer="adamw",
        dtype_bytes=4,
        micro_batch=1,
        sequence=48,
        row=48,
        supervised=1.0,
        recomputed=0,
        offload=False,
        kernels=PLAIN,
    )
    return replace(setup, **changes)


# -- what is kept -------------------------------------------------------------------------------------------------


def kept_bytes(model: Any, setup: Setup) -> int:
    """Bytes that autograd keeps of the decoder's forward pass, the model's own tensors aside."""
    own = {storage.data_ptr() for storage in storages(model)}
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no address is given away twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs = {key: value for key, value in batch(setup).items() if key != "labels"}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(setup):
        result = model.base_model.model.base_model(**inputs, use_cache=False)
    assert result.last_hidden_state.requires_grad
    return sum(seen.values())


def storages(model: Any) -> list[torch.UntypedStorage]:
    """Those of parameters, buffers, and of what bitsandbytes has beside its 4-bit weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return [tensor.untyped_storage() for tensor in tensors]


WIDE = {"hidden": 96, "width": 128, "rank": 4, "sequence": 64, "row": 64}
EAGER = replace(PLAIN, attention="eager")
BF16 = {"dtype_bytes": 2}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ("llama", "qwen3", "gpt_neox", "falcon", "phi3", "gemma3_text")),
    *((family, BF16) for family in ("llama", "qwen2", "olmo2", "gpt_neox", "falcon", "phi3")),
    *((family, {"quantization": "nf4"}) for family in ("mistral", "gpt_neox")),
    *((family, {"quantization": "nf4", **BF16}) for family in ("llama", "gpt_neox")),
    *((family, WIDE) for family in ("llama", "gpt_neox")),
    *((family, {**WIDE, **BF16}) for family in ("llama", "falcon")),
    *((family, {"row": 24, "micro_batch": 2}) for family in ("llama", "falcon")),
    ("llama", {"row": 24, "micro_batch": 2, **BF16}),
    ("gemma2", {"kernels": EAGER}),
    ("gemma2", {"kernels": EAGER, **BF16}),
    ("llama", {"targets": ("q_proj", "v_proj")}),
    ("llama", {"targets": ("q_proj", "v_proj"), **BF16}),
    ("llama", {"targets": ("q_proj", "v_proj"), "kernels": FAST}),
    ("llama", {"kernels": replace(PLAIN, lora=True)}),
    ("llama", {"kernels": replace(PLAIN, fused=True)}),
    *((family, {"kernels": FAST}) for family in ("llama", "qwen3", "falcon", "gemma3_text", "olmo2")),
    *((family, {"kernels": FAST, **BF16}) for family in ("llama", "phi3")),
    *((family, {"kernels": FAST, "quantization": "nf4", **BF16}) for family in ("llama", "gpt_neox")),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_what_a_layer_keeps_is_what_autograd_saves(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    setup = setup_of(family, **changes)
    model = build(setup, tmp_path)
    model.get_base_model().enable_input_require_grads()  # the first layer then keeps what the others do
    result = outside_layers(setup) - rotary(setup)  # the last norm's input and result, of which the result is not kept
    result -= setup.tokens * setup.shape.hidden * setup.dtype_bytes
    counted = kept_bytes(model, setup) - result - shared_tensors(setup)
    assert saved.layer_saved(setup) == pytest.approx(counted / setup.shape.layers, rel=0.05)


def shared_tensors(setup: Setup) -> int:
    """cos and sin, which rotate a quarter of GPT-NeoX's heads."""
    return rotary(setup) // (4 if setup.shape.model_type == "gpt_neox" else 1)


# -- whole steps --------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and that still exist, and the most of them at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        for tensor in tree_leaves(result):
            if not is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in given or storage._cdata in self._known:
                continue
            self._known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def peak_of_a_step(setup: Setup, folder: Path) -> int:
    """The most that exists at once in a forward and backward pass, the base aside."""
    model = build(setup, folder)
    base = model.get_base_model()
    if setup.recomputed:
        base.enable_input_require_grads()
    recompute_layers(base, setup.recomputed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    inputs = batch(setup)
    with Alive() as alive:
        with autocast(setup):
            loss = head_kernel.fused_loss(model, inputs, setup.tokens)
        loss.backward()
    return alive.peak + sum(2 * parameter.nbytes for parameter in trained)


STEP = {"hidden": 64, "width": 176, "sequence": 256, "row": 256}
OURS = replace(PLAIN, head=True)
STEPS: list[tuple[str, dict[str, Any]]] = [
    (family, {"recomputed": recomputed, "dtype_bytes": size, "kernels": kernels})
    for family, recomputed, size, kernels in [
        ("llama", 0, 4, OURS),
        ("llama", 2, 4, OURS),
        ("llama", 3, 4, OURS),
        ("llama", 0, 2, OURS),
        ("llama", 3, 2, OURS),
        ("qwen2", 0, 4, FAST),
        ("llama", 1, 2, FAST),
        ("llama", 3, 2, FAST),
        ("mistral", 3, 4, replace(OURS, lora=True)),
        ("gpt_neox", 3, 4, OURS),
        ("gpt_neox", 3, 2, FAST),
        ("falcon", 3, 4, OURS),
        ("gemma2", 3, 4, replace(EAGER, head=True)),
    ]
]
STEPS.append(("llama", {"recomputed": 3, "dtype_bytes": 2, "kernels": OURS, "rank": 64}))


@pytest.mark.parametrize(("family", "changes"), STEPS)
def test_the_peak_of_a_step(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    setup = setup_of(family, **STEP, **changes)
    setup = replace(setup, shape=replace(setup.shape, layers=3))
    found = training_memory(setup)
    expected = found.total - found.weights - found.optimizer - found.context
    assert expected == pytest.approx(peak_of_a_step(setup, tmp_path), rel=0.10)


# -- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon"])
def test_weights_in_4_bits_are_those_that_bitsandbytes_holds(family: str, tmp_path: Path) -> None:
    setup = setup_of(family, quantization="nf4")
    model = build(setup, tmp_path).unload()
    held = {storage.data_ptr(): storage.nbytes() for storage in storages(model)}
    buffers = sum(buffer.nbytes for buffer in model.buffers())  # the frequencies of the rotary embedding
    assert sum(held.values()) - buffers == weight_bytes(setup.shape, "nf4", 4)


def test_four_bits_with_double_quantisation_are_half_a_byte_and_a_little() -> None:
    """0.5 + 1/64 + 4/(64·256) = 0.5159 bytes a number; tables of 1,092 bytes a matrix are nothing beside it."""
    linear = shape_for("meta-llama/Meta-Llama-3-8B").linears[0]
    each = memory.linear_bytes(linear, "nf4", 2) / linear.parameters
    assert each == pytest.approx(0.5159, abs=2e-4)


def test_constants_are_those_of_the_code_that_they_describe() -> None:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert (memory.HEAD_LOGITS, memory.HEAD_LOGITS_CPU) == (head_kernel.CHUNK_LOGITS, head_kernel.CHUNK_LOGITS_CPU)
    assert memory.EVALUATION_SLICE == compare.SLICE
    assert memory.TRL_TILE_TOKENS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert memory.TRL_TILE_WORDS == utils._CHUNKED_LOGPROB_CHUNK_SIZE


def llama_8b(**changes: Any) -> Setup:
    setup = replace(setup_of("llama"), shape=shape_for("meta-llama/Llama-3.1-8B"), quantization="nf4", dtype_bytes=2)
    return replace(setup, recomputed=32, sequence=2048, row=2048, **changes)


def test_a_published_peak() -> None:
    """torchtune, Llama-3.1-8B, QLoRA of rank 8 on q, v, o and the MLP, packed 2048, batch 2, RTX 4090: 7.4 GiB.

    What differs there: the adapter, its gradients and AdamW's state are in 16 bit (here in 32: 0.15 GiB more), the peak
    is torch's own figure, without CUDA's context (0.55 GiB), layers are compiled (here fused kernels of our own), and
    the head makes all logits in chunks.
    """
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    kernels = Kernels(attention="varlen", fused=True, lora=True, head=True)
    found = training_memory(llama_8b(rank=8, targets=targets, micro_batch=2, kernels=kernels))
    assert found.total / GIB == pytest.approx(7.4, rel=0.15)
    assert (found.total - found.context - found.as_dict()["adapter"] * 2) / GIB == pytest.approx(7.4, rel=0.05)


def test_parts_are_what_the_words_say() -> None:
    full = training_memory(llama_8b(rank=16))
    adapter = memory.adapter_parameters(shape_for("meta-llama/Llama-3.1-8B"), 16, "all-linear")
    assert full.adapter + full.gradients + full.optimizer == 16 * adapter
    assert full.checkpoints == 2 * 4096 * 32 * 2048  # 2·h·L bytes a token
    assert sum(full.as_dict().values()) == full.total
    assert training_memory(llama_8b(rank=16, offload=True)).checkpoints == full.checkpoints // 16
    # At rank 16 only what is 14,336 wide is large enough to be paged: B of gate and up, A of down.
    in_place = adapter - 32 * 3 * 16 * 14336
    assert training_memory(llama_8b(rank=16, optimizer="paged_adamw")).optimizer == 8 * in_place
    eight = training_memory(llama_8b(rank=16, optimizer="adamw_8bit")).optimizer
    assert eight == pytest.approx(adapter * (2 + 2 * 4 / 256), rel=1e-3)


def test_memory_grows_with_what_is_kept_and_asked_for() -> None:
    by_layers = [training_memory(replace(llama_8b(), recomputed=count)).total for count in range(33)]
    assert by_layers == sorted(by_layers, reverse=True)
    for change in ({"micro_batch": 2}, {"rank": 64}, {"quantization": "none"}, {"row": 512}):
        assert training_memory(replace(llama_8b(), **change)).total > training_memory(llama_8b()).total
    fast = replace(FAST, attention="varlen")
    assert training_memory(llama_8b(kernels=fast)).total < training_memory(llama_8b()).total
    # Without a mask it does not matter how long the rows in a line are.
    packed = replace(llama_8b(kernels=fast), row=512)
    assert training_memory(packed) == training_memory(llama_8b(kernels=fast))


# -- evaluation ---------------------------------------------------------------------------------------------------


class AliveInside(Alive):
    """The same without gradients, where torch hands operations over whole: they are taken apart first."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._whole:
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
            self._whole.add(func)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Row:
    """A row with loss on every token."""

    def __init__(self, setup: Setup) -> None:
        self.ids = np.arange(setup.row) % setup.shape.vocabulary

    def labels(self) -> Any:
        return self.ids.copy()


def beside_the_model(setup: Setup) -> int:
    found = evaluation_memory(setup) - weight_bytes(setup.shape, setup.quantization, setup.dtype_bytes)
    adapter = 4 * memory.adapter_parameters(setup.shape, setup.rank, setup.targets)
    return found - adapter - (memory.CONTEXT if setup.dtype_bytes == 2 else 0)


def evaluated(family: str, size: Any, vocabulary: int, width: int, row: int, tmp_path: Path, **more: Any) -> Any:
    """A setup and its model, as it is after training."""
    kernels = EAGER if family == "gemma2" else PLAIN
    setup = setup_of(family, width=width, sequence=row, row=row, dtype_bytes=size, kernels=kernels, **more)
    setup = replace(setup, shape=replace(setup.shape, vocabulary=vocabulary))
    model = build(setup, tmp_path).eval()
    if size == 2:  # no autocast here, and so none of what `build` does to stand in for CUDA's
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.bfloat16()._forward_pre_hooks.clear()
    return setup, model


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("vocabulary", "width", "row"), [(160, 512, 256), (500, 176, 256), (5000, 176, 600)])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon", "gemma2"])
def test_the_peak_of_an_evaluation(
    family: str, vocabulary: int, width: int, row: int, size: int, tmp_path: Path
) -> None:
    setup, model = evaluated(family, size, vocabulary, width, row, tmp_path)
    with AliveInside() as alive:
        compare._batch_loss(model, 0, [Row(setup)])  # type: ignore[list-item]
    # Where the scores exist as a tensor, the largest count is taken for all.
    assert -0.05 < beside_the_model(setup) / alive.peak - 1 < (0.30 if saved.scores_exist(setup) else 0.05)


@pytest.mark.parametrize("size", [2, 4])
def test_the_peak_of_an_answer(size: int, tmp_path: Path) -> None:
    """Where keys and values are most of it: a long answer to a short question."""
    setup, model = evaluated("llama", size, 160, 64, 16, tmp_path, answer=24)
    with AliveInside() as alive:
        list(greedy(model, [list(range(1, 17))], max_new_tokens=24, stop_ids=[], pad_id=0))
    assert -0.10 < beside_the_model(setup) / alive.peak - 1 < 0.30


def test_a_long_answer_needs_memory_of_its_own() -> None:
    few = replace(llama_8b(), row=64, sequence=64, answer=128)
    many = replace(few, answer=8192)
    token = 2 * 32 * 8 * 128 * 2  # keys and values of 32 layers, 8 heads of 128, in 16 bit: 128 KiB
    assert evaluation_memory(many) > weight_bytes(few.shape, "nf4", 2) + 8192 * token
    assert evaluation_memory(replace(few, answer=0)) < evaluation_memory(few)


# -- dropout, paging, an adapter on the head ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 2])
def test_dropout_keeps_a_copy_and_a_mask_for_each_linear(size: Any, tmp_path: Path) -> None:
    setup = setup_of("llama", dtype_bytes=size, dropout=True)
    model = build(setup, tmp_path)
    result = outside_layers(setup) - rotary(setup) - setup.tokens * setup.shape.hidden * size
    model.get_base_model().enable_input_require_grads()
    counted = kept_bytes(model, setup) - result - shared_tensors(setup)
    if size == 2:  # a CPU keeps a float32 for each number where a GPU keeps a byte
        inputs = sum(linear.inputs for linear in setup.shape.linears)
        counted -= (4 - saved.DROPPED_BYTES) * inputs * setup.tokens * setup.shape.layers
    assert saved.layer_saved(setup) == pytest.approx(counted / setup.shape.layers, rel=0.05)
    assert saved.layer_saved(setup) > saved.layer_saved(replace(setup, dropout=False))


def test_the_optimizers_state_is_decided_tensor_by_tensor() -> None:
    setup = llama_8b(rank=1, targets=("k_proj",))
    count = 32 * (4096 + 1024)  # A has 4,096 numbers, B 1,024

    def state(**changes: Any) -> int:
        return memory.optimizer_bytes(replace(setup, **changes))

    assert state() == state(optimizer="paged_adamw") == 8 * count
    assert state(optimizer="adamw_8bit") == 32 * (2 * 4096 + 2 * 4 * 16 + 8 * 1024)
    assert state(rank=128, optimizer="paged_adamw") == 0
    # A is paged (102,400 numbers), B is not (25,600); the largest of each 256 numbers never is.
    assert state(rank=25, optimizer="paged_adamw") == 32 * 8 * 25_600
    assert state(rank=25, optimizer="paged_adamw_8bit") == 32 * (2 * 4 * 400 + 2 * 25_600 + 2 * 4 * 100)
    assert state(rank=128, optimizer="paged_adamw", dtype_bytes=4) == 8 * 128 * count


def test_bitsandbytes_has_the_same_limits() -> None:
    from bitsandbytes.optim import AdamW8bit
    from bitsandbytes.optim.optimizer import Optimizer8bit

    assert inspect.signature(AdamW8bit).parameters["min_8bit_size"].default == memory.SMALLEST_IN_8_BIT
    assert f"p.numel() < {memory.SMALLEST_PAGED:.0e}".replace("+0", "") in inspect.getsource(
        Optimizer8bit.get_state_buffer
    )


def test_an_adapter_on_the_head_counts() -> None:
    shape = shape_for("meta-llama/Llama-3.1-8B")
    one, both = (memory.adapter_parameters(shape, 8, ("q_proj", *more)) for more in ((), ("lm_head",)))
    assert both - one == 8 * (shape.vocabulary + shape.hidden)
    with pytest.raises(ConfigError, match="embed_out"):
        memory.adapter_parameters(shape, 8, ("embed_out",))


def test_layers_with_a_window_have_a_mask_once_a_row_is_longer() -> None:
    setup = setup_of("gemma3_text", row=64, sequence=64)
    assert not saved.has_mask(setup)
    windowed = replace(setup, shape=replace(setup.shape, local=32))
    assert saved.has_mask(windowed)
    assert not saved.has_mask(replace(windowed, row=16, sequence=16))
    assert saved.layer_saved(windowed) > saved.layer_saved(setup)
    assert shape_of({"model_type": "gemma3_text"}, "x").local == 4096
    assert shape_of({"model_type": "gemma3_text", "sliding_window": 512}, "x").local == 512
