"""The head and its loss in one pass: the same numbers as all logits and torch's cross entropy, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import BaseError
from finetune.model.kernels import head
from finetune.model.kernels.attention import supports_varlen, use_varlen
from finetune.model.kernels.head import fused_loss, linear_cross_entropy, supports_head
from tests.model.kernels.models import FAMILIES, adapted, base, batch, distance, gradients, plain_loss


def written_out(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """The formula of the docstring, summed, in the dtype of what it is given."""
    logits = torch.nn.functional.linear(hidden, weight, bias)[..., :-1, :] * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = labels[..., 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits.reshape(-1, len(weight)), wanted, reduction="sum")


@given(
    lines=st.integers(1, 3),
    length=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.sampled_from([1, 3, 1000]),
    scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 3.0]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80)
def test_it_is_cross_entropy(
    lines: int, length: int, share: float, chunk: int, scale: float, softcap: float | None, biased: bool, seed: int
) -> None:
    """In float32 within 1e-5 of the formula in float64: rounding of sums of 16 products is 1e-6."""
    torch.manual_seed(seed)
    hidden = torch.randn(lines, length, 16, requires_grad=True)
    weight, bias = torch.randn(37, 16), torch.randn(37) if biased else None
    labels = torch.randint(0, 37, (lines, length))
    labels[torch.rand(lines, length) > share] = -100
    exact = hidden.detach().double().requires_grad_()
    total = written_out(exact, weight.double(), labels, bias if bias is None else bias.double(), scale, softcap)
    (total / 7).backward()
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=bias, scale=scale, softcap=softcap, divisor=7, chunk_tokens=chunk
    )
    loss.backward()
    assert loss.item() == pytest.approx(total.item() / 7, rel=1e-5, abs=1e-6)
    assert hidden.grad is not None
    assert exact.grad is not None
    assert torch.allclose(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        alone = linear_cross_entropy(
            hidden, weight, labels, bias=bias, scale=scale, softcap=softcap, divisor=7, chunk_tokens=chunk
        )
    assert torch.equal(alone, loss)


def case(dtype: torch.dtype, tokens: int = 64, words: int = 500) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, 32).to(dtype).requires_grad_()
    labels = torch.randint(0, words, (1, tokens))
    labels[0, ::3] = -100
    return hidden, (torch.randn(words, 32) / 3).to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_it_is_as_near_to_float64_as_the_plain_way(dtype: torch.dtype) -> None:
    """Plain: logits in 16 bit, cross entropy in float32. The gradient is rounded once more here (when it is divided),
    so up to 1.3 times as far; the loss is the same."""
    hidden, weight, labels = case(dtype)
    exact = hidden.detach().double().requires_grad_()
    (written_out(exact, weight.double(), labels) / 42).backward()
    plain = hidden.detach().clone().requires_grad_()
    logits = (plain @ weight.T)[:, :-1].float().reshape(-1, 500)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / 42
    expected.backward()
    loss = linear_cross_entropy(hidden, weight, labels, divisor=42)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    def error(gradient: torch.Tensor | None) -> float:
        assert gradient is not None
        assert exact.grad is not None
        return float((gradient.double() - exact.grad).norm() / exact.grad.norm())

    assert 1e-4 < error(hidden.grad) < 1.3 * error(plain.grad)


def test_nothing_is_lost_below_float16s_smallest_number() -> None:
    """With a million tokens in a step a gradient is 1e-8; only the loss scale brings it back into float16's range."""
    hidden, weight, labels = case(torch.float16)
    (linear_cross_entropy(hidden, weight, labels, divisor=1_000_000) * 2.0**16).backward()
    reference = hidden.detach().clone().requires_grad_()
    linear_cross_entropy(reference, weight, labels, divisor=1).backward()
    assert hidden.grad is not None
    assert reference.grad is not None
    assert torch.allclose(hidden.grad.float(), reference.grad.float() * 2**16 / 1e6, rtol=3e-3, atol=1e-6)


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_divided_in_float32_and_rounded_once(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1/767 is 0.16 % from its nearest bfloat16. A GPU rounds its own factors to what they multiply."""
    monkeypatch.setattr(head, "CHUNK_GRADIENT", 5 * 32)
    hidden, weight, labels = (tensor.to(device) for tensor in case(dtype))
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, divisor=1), hidden)[0]
    loss = linear_cross_entropy(hidden, weight, labels, divisor=767)
    expected = (whole.float() * (torch.ones(whole.shape, device=device) / 767)).to(dtype)
    for _ in range(2):  # what is saved is not changed
        assert torch.equal(torch.autograd.grad(loss, hidden, retain_graph=True)[0], expected)


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("grad", [True, False])
def test_tokens_whose_label_is_the_likeliest_are_counted(chunk: int, grad: bool) -> None:
    hidden, weight, labels = case(torch.float32)
    best = (hidden.detach() @ weight.T).argmax(-1)
    labels[0, 1::4] = best[0, :-1][::4]  # some are right
    wanted = labels[:, 1:]
    expected = int((best[:, :-1] == wanted)[wanted != -100].sum())
    correct = torch.tensor(3)
    with torch.set_grad_enabled(grad):
        counted = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk, correct=correct)
        assert torch.equal(counted, linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk))
    assert expected > 5
    assert correct.dtype == torch.int64
    assert int(correct) == 3 + expected


def test_without_labels_the_loss_is_zero_and_so_is_the_gradient() -> None:
    hidden, weight, labels = case(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_what_is_saved_is_the_gradient_of_the_tokens_with_loss() -> None:
    hidden, weight, labels = case(torch.bfloat16)
    count = int((labels[:, 1:] != -100).sum())
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, labels)
    gradient = count * 32 * 2
    places, divisor = count * 8, 4
    assert sum(tensor.nbytes for tensor in saved) == gradient + places + divisor


@pytest.mark.parametrize(("dtype", "bytes_per_logit"), [(torch.float32, 4), (torch.bfloat16, 10)])
def test_at_the_peak_one_chunk_of_logits_exists(dtype: torch.dtype, bytes_per_logit: int) -> None:
    """Counted by torch's profiler. Beside the chunk only vectors and tensors of the width are made: under a tenth."""
    hidden, weight, labels = case(dtype, tokens=256, words=4000)
    chunk = 32
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)  # what is made once
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    logits = chunk * 4000
    assert bytes_per_logit * logits <= peak < 1.1 * bytes_per_logit * logits


def test_a_head_that_is_trained_is_refused() -> None:
    hidden, weight, labels = case(torch.float32)
    with pytest.raises(BaseError, match="trained"):
        linear_cross_entropy(hidden, weight.requires_grad_(), labels)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_and_gradients_of_a_model(family: str) -> None:
    """float32 sums in another order: losses within 1e-5, gradients within 2e-5 of each parameter's greatest entry."""
    model = adapted(base(family))
    assert supports_head(model) == (True, "loss and gradient in one pass, for tokens with loss only")
    inputs = batch([[17], [23], [4]], end_to_end=False)
    expected = plain_loss(model, inputs)
    expected_gradients = gradients(model, expected)
    loss = fused_loss(model, inputs, None)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert distance(gradients(model, loss), expected_gradients) < 2e-5
    with torch.no_grad():
        assert float(fused_loss(model, inputs, None)) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_with_rows_end_to_end_and_over_micro_batches_it_is_the_same_step(checkpointing: bool) -> None:
    """Two micro batches, divided by the tokens of both: the gradient of all rows in one plain batch."""
    model = adapted(base("mistral"))
    whole = plain_loss(model, batch([[9, 14], [23], [5, 1, 11]], end_to_end=False))
    expected = gradients(model, whole)
    assert supports_varlen(model, "cpu")[0]
    use_varlen(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    line = batch([[9, 14], [23], [5, 1, 11]], end_to_end=True)
    tokens = (line["labels"] != -100).sum()
    losses = [fused_loss(model, part, tokens, accumulation=2) for part in _cut(line, 3)]
    assert float(sum(loss.detach() for loss in losses)) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert distance(gradients(model, losses[0] + losses[1]), expected) < 2e-5


def _cut(line: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """A line as two, the first with so many rows."""
    begins = line["cu_seq_lens_q"]
    middle = int(begins[rows])
    parts = []
    for some, own in ((slice(0, middle), begins[: rows + 1]), (slice(middle, None), begins[rows:] - middle)):
        longest = int(own.diff().max())
        part = {name: line[name][:, some] for name in ("input_ids", "labels", "position_ids")}
        part |= {"cu_seq_lens_q": own, "cu_seq_lens_k": own, "max_length_q": longest, "max_length_k": longest}
        parts.append(part)
    return parts


def test_the_balance_of_experts_is_a_mean_over_micro_batches() -> None:
    model = adapted(base("mixtral"))
    inputs = batch([[17]], end_to_end=False)
    with torch.no_grad():
        one, half = (float(fused_loss(model, inputs, None, accumulation=n)) for n in (1, 2))
        model.config.output_router_logits = False
        none = float(fused_loss(model, inputs, None))
    assert one - none > 0.01
    assert half - none == pytest.approx((one - none) / 2, rel=1e-3)


def test_an_evaluations_loss_is_without_the_balance_of_experts() -> None:
    """It is the mean over tokens with loss, whatever is trained on besides."""
    model = adapted(base("mixtral")).eval()
    inputs = batch([[17], [9]], end_to_end=False)
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits[:, :-1]
        labels = inputs["labels"][:, 1:].reshape(-1)
        expected = torch.nn.functional.cross_entropy(logits.reshape(len(labels), -1), labels)
        assert float(fused_loss(model, inputs, None)) == pytest.approx(float(expected), rel=1e-5)


def test_experts_that_trl_will_balance_in_a_way_of_their_own_are_left_to_it() -> None:
    """Llama 4 counts no experts on its model, and has a weight for a balance that its config does not ask for yet."""
    model = base("llama")
    model.config.output_router_logits, model.config.router_aux_loss_coef = False, 0.001
    assert supports_head(model) == (False, "LlamaForCausalLM weighs the balance of its experts in its own way")
    model.config.router_aux_loss_coef = 0.0
    assert supports_head(model)[0]


def test_labels_are_looked_at_before_the_decoder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, to look at them is to wait for everything that was asked for before."""
    model, inputs = adapted(base("llama")), batch([[17]], end_to_end=False)
    order: list[str] = []
    targets = head._targets

    def watched(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order.append("labels")
        return targets(labels)

    monkeypatch.setattr(head, "_targets", watched)
    model.get_base_model().model.register_forward_pre_hook(lambda *_: order.append("decoder"))
    fused_loss(model, inputs, None, correct=torch.tensor(0))
    assert order == ["labels", "decoder"]


def test_under_autocast_gradients_are_as_near_to_float64_as_those_of_the_plain_way() -> None:
    """Per cents either way: at most 1.5 times as far as plain bfloat16."""
    model, inputs = adapted(base("llama")), batch([[17], [23], [4]], end_to_end=False)
    exact_model = adapted(base("llama", torch.float64)).double()
    with torch.no_grad():
        for mine, theirs in zip(exact_model.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    exact = gradients(exact_model, plain_loss(exact_model, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, mine = plain_loss(model, inputs), fused_loss(model, inputs, None)
    assert 1e-3 < distance(gradients(model, mine), exact) < 1.5 * distance(gradients(model, plain), exact)


@pytest.mark.parametrize("how", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_is_left_to_others(how: dict[str, Any]) -> None:
    supported, why = supports_head(adapted(base("llama"), **how))
    assert not supported
    assert "head" in why


def test_a_head_that_does_more_than_the_config_says_is_found_out() -> None:
    model = base("granite")

    def more(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        output.logits = output.logits * 1.5

    model.register_forward_hook(more)
    supported, why = supports_head(model)
    assert not supported
    assert "more than its head" in why
