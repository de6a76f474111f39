"""Rows end to end give the loss and the gradients of the same rows padded, whoever computes the attention.

In float32 two ways of summing differ by rounding alone: losses by 1e-6 of themselves, gradients (relative to the
greatest entry of each parameter's) by some 1e-6. The limits here are ten times that; leaving out a window, or letting
one row see another, changes both by more than 1e-3.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.model.kernels import attention
from finetune.model.kernels.attention import NAME, LaterMask, register, supports_varlen, use_varlen
from tests.model.kernels.models import (
    FAMILIES,
    OWN_ATTENTION,
    VOCABULARY,
    WINDOW,
    adapted,
    base,
    batch,
    distance,
    gradients,
    plain_loss,
)

VARLEN = [family for family in FAMILIES if family not in OWN_ATTENTION]
BALANCED = ("mixtral", "qwen3_moe")
"""Their loss has a term over all tokens, padding included: what is padded otherwise is another loss."""

PACKED = [[9, 14], [23], [5, 1, 11]]


@pytest.fixture
def no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes a mask after this, fails."""

    def refuse(self: LaterMask) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(LaterMask, "mask", refuse)


@pytest.mark.parametrize("family", VARLEN)
def test_rows_end_to_end_have_the_loss_and_gradients_of_rows_padded(family: str, no_masks: None) -> None:
    model = adapted(base(family, output_router_logits=False if family in BALANCED else None))
    assert supports_varlen(model, "cpu")[0]
    padded, line = batch(PACKED, end_to_end=False), batch(PACKED, end_to_end=True)
    expected = plain_loss(model, padded)
    expected_gradients = gradients(model, expected)
    use_varlen(model)
    loss = plain_loss(model, line)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert distance(gradients(model, loss), expected_gradients) < 2e-5


@pytest.mark.parametrize("family", BALANCED)
def test_the_balance_of_experts_is_that_of_the_same_line_with_a_mask(family: str, no_masks: None) -> None:
    model, line = adapted(base(family)), batch(PACKED, end_to_end=True)
    expected = plain_loss(model, line)
    expected_gradients = gradients(model, expected)
    use_varlen(model)
    loss = plain_loss(model, line)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert distance(gradients(model, loss), expected_gradients) < 2e-5


@pytest.mark.parametrize("sequences", [[[19]], [[8], [21]], [[3], [17], [12], [30]], [[6, 6, 6], [4, 13], [22], [9]]])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_micro_batches_of_one_to_four_sequences(sequences: list[list[int]], checkpointing: bool) -> None:
    model = adapted(base("mistral"))
    expected = plain_loss(model, batch(sequences, end_to_end=False))
    expected_gradients = gradients(model, expected)
    use_varlen(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = plain_loss(model, batch(sequences, end_to_end=True))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert distance(gradients(model, loss), expected_gradients) < 2e-5


def test_gradients_are_as_near_to_float64_as_those_of_the_plain_way() -> None:
    exact_model = adapted(base("mistral", torch.float64)).double()
    exact = gradients(exact_model, plain_loss(exact_model, batch(PACKED, end_to_end=False)))
    model = adapted(base("mistral"))
    with torch.no_grad():
        for mine, theirs in zip(exact_model.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    exact = gradients(exact_model, plain_loss(exact_model, batch(PACKED, end_to_end=False)))
    plain = distance(gradients(model, plain_loss(model, batch(PACKED, end_to_end=False))), exact)
    use_varlen(model)
    varlen = distance(gradients(model, plain_loss(model, batch(PACKED, end_to_end=True))), exact)
    assert varlen < 2 * plain < 1e-4


def test_in_bfloat16_gradients_are_as_near_to_float64_as_those_of_the_plain_way() -> None:
    """Rounding to 8 bits moves gradients by per cents, either way alike: at most 1.5 times as far as plain bfloat16."""
    model = adapted(base("mistral"))
    exact_model = adapted(base("mistral", torch.float64)).double()
    with torch.no_grad():
        for mine, theirs in zip(exact_model.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    exact = gradients(exact_model, plain_loss(exact_model, batch(PACKED, end_to_end=False)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_value = plain_loss(model, batch(PACKED, end_to_end=False))
    plain = distance(gradients(model, plain_value), exact)
    use_varlen(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = plain_loss(model, batch(PACKED, end_to_end=True))
    assert 1e-3 < distance(gradients(model, value), exact) < 1.5 * plain


def test_a_base_in_nf4() -> None:
    from transformers import BitsAndBytesConfig

    model = _saved_and_loaded(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    expected = plain_loss(model, batch(PACKED, end_to_end=False))
    expected_gradients = gradients(model, expected)
    use_varlen(model)
    loss = plain_loss(model, batch(PACKED, end_to_end=True))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert distance(gradients(model, loss), expected_gradients) < 2e-5


def _saved_and_loaded(quantization: Any) -> Any:
    import tempfile

    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        base("llama", hidden_size=64, head_dim=16, intermediate_size=128).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.float32, attn_implementation="sdpa"
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return adapted(model)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    window=st.none() | st.integers(1, 24),
)
@settings(max_examples=60)
def test_any_rows_are_attended_to_as_with_the_mask_written_out(
    lengths: list[int], heads: tuple[int, int], window: int | None
) -> None:
    total = sum(lengths)
    torch.manual_seed(total)
    query, key, value = (torch.randn(1, n, total, 8, dtype=torch.float64) for n in (heads[0], heads[1], heads[1]))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(total)
    seen = (numbers[:, None] == numbers) & (at[:, None] >= at) & (at[:, None] - at < (window or total))
    groups = heads[0] // heads[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * 0.3
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, 1)

    begins = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    found, _ = attention.attention(
        torch.nn.Module(),
        query,
        key,
        value,
        LaterMask(window, lambda: None),
        scaling=0.3,
        sliding_window=window,
        cu_seq_lens_q=begins,
        max_length_q=max(lengths),
    )
    assert torch.allclose(found, expected.transpose(1, 2), rtol=0, atol=1e-13)


def test_padded_batches_are_computed_by_sdpa_bit_for_bit() -> None:
    for family in ("mistral", "gemma3_text", "gpt_neox"):
        model = base(family).eval()
        inputs = batch(PACKED, end_to_end=False)
        alone = batch([[23]], end_to_end=False)
        for some in (inputs, alone):
            some.pop("labels")
            expected = model(**some, use_cache=False).logits
            use_varlen(model)
            assert torch.equal(model(**some, use_cache=False).logits, expected)
            use_varlen(model, on=False)


def test_answers_with_a_cache_and_padding_on_the_left_are_those_of_sdpa() -> None:
    model = base("mistral").eval()
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) >= torch.tensor([[0], [4], [9]])
    asked = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = model.generate(**asked, output_logits=True, return_dict_in_generate=True)
    use_varlen(model)
    found = model.generate(**asked, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_window_in_the_mask_alone_is_not_left_out() -> None:
    """As Llama 4's chunks are: the layer is not told, so the whole mask decides."""
    register()
    torch.manual_seed(0)
    query = key = value = torch.randn(1, 2, 9, 8)
    band = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)[None, None]
    arguments = {"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32), "max_length_q": 9}
    found, _ = attention.attention(torch.nn.Module(), query, key, value, LaterMask(3, lambda: band), **arguments)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=band)
    assert torch.equal(found, expected.transpose(1, 2))


def test_it_is_switched_on_and_off_under_an_adapter() -> None:
    model = adapted(base("llama"))
    use_varlen(model)
    assert model.config._attn_implementation == NAME
    use_varlen(model, on=False)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "softly"),
        ("falcon", {}, "its own"),
        ("falcon", {"alibi": True}, "its own"),
        ("gpt_oss", {}, "its own"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_what_it_is_not_for_is_said(family: str, changes: dict[str, Any], reason: str) -> None:
    supported, why = supports_varlen(base(family, **changes).config, "cpu")
    assert not supported
    assert reason in why


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "bamba", "mamba", "lfm2", "granitemoehybrid"])
def test_models_with_a_state_are_refused(kind: str) -> None:
    from transformers import AutoConfig

    changes = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2} if kind == "lfm2" else {}
    assert not supports_varlen(AutoConfig.for_model(kind, **changes), "cpu")[0]


def test_a_model_in_which_rows_see_each_other_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the mask forgotten and the rows not kept apart, as where a model drops arguments that it does not know."""
    model = base("llama")
    assert supports_varlen(model, "cpu")[0]
    assert model.config._attn_implementation == "sdpa"

    def forgetful(query: Any, key: Any, value: Any, begins: Any, *others: Any) -> torch.Tensor:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2)

    monkeypatch.setattr(attention, "_row_by_row", forgetful)
    supported, why = supports_varlen(model, "cpu")
    assert not supported
    assert "see each other" in why


def test_a_model_that_fails_on_rows_end_to_end_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> torch.Tensor:
        raise ValueError("no such thing\nat all")

    model = adapted(base("llama"))
    monkeypatch.setattr(attention, "_row_by_row", fail)
    assert supports_varlen(model, "cpu") == (
        False,
        "LlamaForCausalLM does not take rows end to end: no such thing",
    )
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_without_a_gpu_none_is_claimed() -> None:
    if not torch.cuda.is_available():
        assert supports_varlen(base("llama").config, "cuda") == (False, "there is no CUDA device")


def test_the_arguments_of_torchs_function_are_those_that_are_passed() -> None:
    """On a GPU it is called by these names; whatever torch is installed must have them, or be known to lack them."""
    kernel = attention._varlen()
    assert kernel is not None
    parameters = inspect.signature(kernel).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(parameters)
    assert attention._asks_for_gqa() == ("enable_gqa" in parameters)


@pytest.mark.parametrize(("window", "passed"), [(None, (-1, 0)), (WINDOW, (WINDOW - 1, 0))])
@pytest.mark.parametrize("asks", [True, False], ids=["2.12", "2.11"])
def test_what_the_gpus_kernel_is_given(
    monkeypatch: pytest.MonkeyPatch, window: int | None, passed: tuple[int, int], asks: bool
) -> None:
    """Shapes, dtype, window and heads; the kernel itself is not here."""
    given: dict[str, Any] = {}

    def kernel(*line: Any, **arguments: Any) -> torch.Tensor:
        given.update(arguments, line=line)
        return line[0]

    monkeypatch.setattr(attention, "_varlen", lambda: kernel)
    monkeypatch.setattr(attention, "_asks_for_gqa", lambda: asks)
    query, key = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
    value = torch.randn(1, 2, 10, 8).bfloat16()
    begins = torch.tensor([0, 4, 10], dtype=torch.int32)
    output = attention._on_gpu(query, key, value, begins, 6, 0.5, window)
    assert torch.equal(output, query.bfloat16().transpose(1, 2))
    assert [tuple(tensor.shape) for tensor in given["line"][:3]] == [(10, 4, 8), (10, 2, 8), (10, 2, 8)]
    assert {tensor.dtype for tensor in given["line"][:3]} == {torch.bfloat16}
    assert given["line"][5:] == (6, 6)
    assert given["window_size"] == passed
    assert given["scale"] == 0.5
    assert given.get("enable_gqa", False) == asks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt_neox"])
def test_on_a_gpu_it_is_as_near_to_float32_as_sdpa_is(family: str, no_masks: None) -> None:
    model = adapted(base(family)).cuda()
    assert supports_varlen(model, "cuda")[0]
    padded, line = (_moved(batch(PACKED, end_to_end=way)) for way in (False, True))
    exact = gradients(model, plain_loss(model, padded))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain_value = plain_loss(model, padded)
    plain = distance(gradients(model, plain_value), exact)
    use_varlen(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        value = plain_loss(model, line)
    assert distance(gradients(model, value), exact) < 1.5 * plain


def _moved(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
