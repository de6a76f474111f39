"""The output head and its loss in one: only tokens with loss, a chunk at a time, and the gradient with the loss.

Logits are the largest tensor of a training step: 2,048 tokens of Llama 3 have 262 million, a gigabyte in float32. Here
a chunk of them exists at a time, and what the backward pass needs of it, the gradient of the head's input, is made at
once, because the loss is the end of the graph: its own gradient is a number, by which the result is multiplied when it
is known. So the product with the head's matrix is computed twice (once each way), where a chunked head that recomputes
its logits in the backward pass has three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import BaseError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

IGNORED = -100
"""The label of a token without loss, as in torch's cross entropy."""

CHUNK_LOGITS = 2**26
"""Logits of one chunk on a GPU: 4 bytes of each as float32 and 2 in 16 bit, so 384 MiB at the peak. At 128k words that
is 512 tokens: a matrix product still wide enough for every multiprocessor (reasoned, not measured)."""

CHUNK_LOGITS_CPU = 2**24
"""On a CPU (64 MiB). Measured with one core of a busy machine, width 512: above 2^24 nothing is gained; at 128k words
2^22 takes 1.3 to 1.7 times as long and 2^20 four times: the head's matrix is read anew for every few tokens."""

CHUNK_GRADIENT = 2**22
"""Numbers of the gradient that are multiplied at once in float32, in the backward pass: 16 MiB."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    divisor: torch.Tensor | int | None = None,
    chunk_tokens: int | None = None,
    correct: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ -log softmax(softcap(scale · (hidden · weightᵀ + bias)))[label] over the tokens with loss, / divisor. float32.

    hidden   (..., T, width), the output of the decoder, in 16 bit or 32
    weight   (vocabulary, width), frozen; bias (vocabulary,), frozen
    labels   (..., T) int64 as the model's forward takes them, -100 without loss: the position before a token predicts
             it, so `hidden[..., t]` is scored on `labels[..., t + 1]`, and the first label of a line is never used
    softcap  c · tanh(logits / c) (Gemma 2)
    divisor  tokens with loss of the whole step; None for those in `labels`. At least 1: no tokens are a loss of 0
    correct  int64, 0-dim, on the device: the number of tokens that no other is likelier than is added to it (equals,
             which logits in 16 bit often are, count). Nobody waits for it

    Logits are computed in autocast's dtype, or that of `hidden`; the softmax in float32, in place. At the peak a chunk
    costs 4 bytes a logit in float32 and 6 in 16 bit (10 on a CPU, which rounds through a copy), 4 more with a softcap.
    Saved for the backward pass: the gradient of the tokens with loss, in the dtype of `hidden`, and their places. It is
    divided only then, when float16's loss scale is known, so that nothing is lost below its smallest number. Raises
    BaseError if weight or bias is trained.
    """
    how = _How(scale, softcap, chunk_tokens, correct)
    return _scored(hidden, weight, bias, _targets(labels), divisor, how)


def _targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token with loss: where in `hidden`, (…, T) flattened, it is predicted, and its label. int64.

    How many they are decides shapes, so the CPU waits here for whatever the device has been asked for before.
    """
    wanted = labels[..., 1:].reshape(-1)
    places = (wanted != IGNORED).nonzero().squeeze(1)
    wanted = wanted[places]
    # Where a token stands in `hidden`, whose lines are one longer than those of `wanted`.
    line = labels.shape[-1] - 1
    return places + places.div(max(line, 1), rounding_mode="floor"), wanted


@dataclass(frozen=True)
class _How:
    scale: float
    softcap: float | None
    chunk_tokens: int | None
    correct: torch.Tensor | None

    def tokens(self, hidden: torch.Tensor, words: int) -> int:
        """Tokens in a chunk."""
        return self.chunk_tokens or max(1, (CHUNK_LOGITS_CPU if hidden.device.type == "cpu" else CHUNK_LOGITS) // words)


def _scored(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: tuple[torch.Tensor, torch.Tensor],
    divisor: torch.Tensor | int | None,
    how: _How,
) -> torch.Tensor:
    """`linear_cross_entropy` of tokens whose places are known."""
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise BaseError(
            "the output head is trained, and this loss has no gradient for it", hint="set speed.head: false"
        )
    places, wanted = targets
    count = len(places) if divisor is None else divisor
    divided = torch.as_tensor(count, device=hidden.device, dtype=torch.float32).clamp(min=1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if torch.is_grad_enabled() and hidden.requires_grad:
        loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            flat, weight, bias, places, wanted, divided, how
        )
        return loss
    with torch.no_grad():
        return _loss(flat, weight, bias, places, wanted, how, None) / divided


def _loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    places: torch.Tensor,
    wanted: torch.Tensor,
    how: _How,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The summed loss; its gradient by `hidden[places]` is written into `gradient`, (tokens with loss, width)."""
    total = torch.zeros((), device=hidden.device, dtype=torch.float32)
    kind, step = hidden.device.type, how.tokens(hidden, len(weight))
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        for begin in range(0, len(places), step):
            some = slice(begin, begin + step)
            chunk = hidden[places[some]].to(dtype)
            part = None if gradient is None else gradient[some]
            total += _chunk(chunk, weight, bias, wanted[some].unsqueeze(1), how, part)
    return total


def _chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    how: _How,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """`_loss` of one chunk. A function of its own, so that its logits are freed before the next ones are made.

    With e = exp(x - max) and s = Σe, the gradient by a logit is e/s, less 1 at the label: (e - [label] s) / s, whose
    division is also the rounding to 16 bit. Times 1 - (x / c)² for a softcap, and the scale.
    """
    raw = hidden @ weight.T
    if bias is not None:
        raw += bias
    logits = raw.float()
    if how.scale != 1.0:
        logits *= how.scale
    slope = None
    if how.softcap is not None:
        logits.div_(how.softcap).tanh_()
        slope = None if gradient is None else logits.square().neg_().add_(1)
        logits *= how.softcap
    top = logits.amax(1, keepdim=True)
    label_logits = logits.gather(1, labels) - top
    if how.correct is not None:
        how.correct.add_((label_logits == 0).sum())
    shifted = logits.sub_(top).exp_()
    sums = shifted.sum(1, keepdim=True)
    if gradient is not None:
        shifted.scatter_add_(1, labels, -sums)
        if slope is not None:
            shifted *= slope
        torch.div(shifted, sums, out=raw)
        gradient.copy_((raw @ weight).mul_(how.scale))
    return (sums.log() - label_logits).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        places: torch.Tensor,
        wanted: torch.Tensor,
        divisor: torch.Tensor,
        how: _How,
    ) -> torch.Tensor:
        gradient = torch.empty(len(places), hidden.shape[1], device=hidden.device, dtype=hidden.dtype)
        loss = _loss(hidden, weight, bias, places, wanted, how, gradient)
        ctx.save_for_backward(gradient, places, divisor)
        ctx.lines = len(hidden)
        return loss / divisor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, places, divisor = ctx.saved_tensors
        whole = torch.zeros(ctx.lines, gradient.shape[1], device=gradient.device, dtype=gradient.dtype)
        # In float32: beside a tensor in 16 bit torch would round the factor too, and with it every gradient alike.
        factor = grads[0] / divisor
        step = max(1, CHUNK_GRADIENT // gradient.shape[1])
        for begin in range(0, len(places), step):
            some = slice(begin, begin + step)
            whole[places[some]] = gradient[some].to(torch.float32, copy=True).mul_(factor).to(gradient.dtype)
        return whole, None, None, None, None, None, None


def fused_loss(
    model: PeftModel | PreTrainedModel,
    inputs: dict[str, Any],
    divisor: torch.Tensor | int | None,
    *,
    accumulation: int = 1,
    correct: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of a micro batch: the decoder, then the head and the loss in one. What `model(**inputs)` would give.

    inputs        of the model's forward, with `labels`; nothing is taken out of it
    divisor       tokens with loss of the whole step, over all its micro batches; None for those of this one
    accumulation  micro batches in the step: a mixture of experts' balancing loss is their mean. It is part of what is
                  trained on, not of an evaluation's loss: left out of a model that is not in training
    correct       as of `linear_cross_entropy`

    The model's own forward is not called, nor what accelerate has wrapped around it: mixed precision must be switched
    on around this call (`with accelerator.autocast():`).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    decoder_inputs = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
    balanced = bool(getattr(config, "output_router_logits", False))
    if balanced:
        decoder_inputs["output_router_logits"] = base.training
    # Before the decoder is asked for, so that the CPU does not wait for all of it here.
    targets = _targets(inputs["labels"])
    outputs = base.base_model(**decoder_inputs)
    head: Any = base.get_output_embeddings()
    how = _How(_scale(config), getattr(config, "final_logit_softcapping", None), None, correct)
    loss = _scored(outputs.last_hidden_state, head.weight, head.bias, targets, divisor, how)
    if not balanced or not base.training:
        return loss
    # Every family has a copy of this function, and these numbers on its model class. The weight is the config's, where
    # TRL writes it.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    balance: torch.Tensor = load_balancing_loss_func(
        outputs.router_logits, base.num_experts, base.num_experts_per_tok, inputs.get("attention_mask")
    )
    weight: float = config.router_aux_loss_coef
    return loss + balance * (weight / accumulation)


def _scale(config: PretrainedConfig) -> float:
    """By what a family multiplies its logits: Cohere `logit_scale`, Falcon-H1 `lm_head_multiplier`; Granite divides."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)


def supports_head(model: PeftModel | PreTrainedModel) -> tuple[bool, str]:
    """Whether `fused_loss` gives this model's loss, and the reason.

    Not believed but seen: the model computes two tokens, and its logits must be those of the head on what the decoder
    gave, scaled as the config says. Whatever a family does in between, known or not, shows there.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head: Any = base.get_output_embeddings()
    if not type(head).__module__.startswith("torch.nn.") or not isinstance(head, torch.nn.Linear):
        return False, "the output head is not a plain matrix: it has an adapter, is trained, or is quantised"
    if head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad):
        return False, "the output head is trained"
    decoder = base.base_model
    if decoder is base:
        return False, f"{type(base).__name__} has no decoder apart from its head"
    config = base.config.get_text_config()
    counted = hasattr(base, "num_experts") and hasattr(base, "num_experts_per_tok")
    # TRL's constructor comes after this, and switches them on wherever their weight is not 0.
    balanced = hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0) != 0
    if (balanced or getattr(config, "output_router_logits", False)) and not counted:
        return False, f"{type(base).__name__} weighs the balance of its experts in its own way"
    if not _probe(base, decoder, head, config):
        return False, f"the logits of {type(base).__name__} are more than its head on the decoder's output"
    return True, "loss and gradient in one pass, for tokens with loss only"


def _probe(base: Any, decoder: Any, head: torch.nn.Linear, config: PretrainedConfig) -> bool:
    """Whether the model's logits of two tokens are what `linear_cross_entropy` takes them for.

    The same products in the same dtype: 2 % of the largest logit is far above what rounding in 16 bit does, and a scale
    or a cap that was missed is seen wherever it matters.
    """
    found: list[Any] = []
    hook = decoder.register_forward_hook(lambda module, arguments, output: found.append(output))
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            tokens = torch.tensor([[0, 1]], device=head.weight.device)
            logits = base(input_ids=tokens, use_cache=False).logits.float()
    finally:
        hook.remove()
        base.train(was_training)
    hidden = getattr(found[0], "last_hidden_state", None) if found else None
    if hidden is None:
        return False
    with torch.no_grad():
        expected = head(hidden.to(head.weight.dtype)).float() * _scale(config)
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None:
            expected = cap * torch.tanh(expected / cap)
    return bool((expected - logits).abs().max() <= 0.02 * logits.abs().max())
