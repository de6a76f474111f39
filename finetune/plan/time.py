"""How long a micro batch takes: operations at the card's rate, bytes at its bandwidth, and what is reached of both.

Counted on real models (tests/plan/test_time.py): every term of the operations with torch's FlopCounterMode, the bytes
of elementwise work tensor by tensor. Not measured here: any time. The share of the ideal that is reached comes from one
published run (`EFFICIENCY`), so seconds are an estimate, and are said to be one.

What is left out: the launching of kernels (small models on large cards are slower than said), reading the data, the
optimizer's step (some bytes moved for each of the adapter's few parameters), checkpoints, evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.plan import saved
from finetune.plan.gpus import Card
from finetune.plan.setup import HEAD, Linear, Setup

EFFICIENCY = 0.75
"""The share of the ideal that a training reaches. From one measurement by others: torchtune, Llama-3.1-8B, QLoRA of
rank 8, 2 packed sequences of 2,048 tokens, everything recomputed, compiled, makes 2,413 tokens a second on an RTX 4090
(github.com/pytorch/torchtune, README). This file's ideal for that work, with all kernels on (compiling fuses the same
operations and leaves out the same product), is 3,223.

Its speed at unpacking nf4 is in this number too. The same table's LoRA on a base in 16 bit makes 3,083, and this file
says 2,516: 18 % too few."""

TRANSFER = 12e9
"""Bytes a second between the card and the machine's memory: of the 15.75 GB/s of a PCIe 3.0 slot with 16 lanes, what
copies usually get. Later slots have more, but many cards have 8 lanes. Assumed, not measured; overlap with computing,
which the offload is written for, is not counted on."""

NF4_BYTES = 0.5159
"""A parameter in nf4 with double quantisation (arXiv 2305.14314, section 3)."""

NORM_AFTER_MLP = ("gemma2", "gemma3_text", "olmo2")
"""Families with a norm behind a block's last linear layer, whose output is then needed again in the backward pass."""


@dataclass(frozen=True)
class Operations:
    """Floating point operations for one token, forward and backward together."""

    base: float
    head: float
    adapter: float
    attention: float

    @property
    def total(self) -> float:
        return self.base + self.head + self.adapter + self.attention


@dataclass(frozen=True)
class Work:
    """What one micro batch costs, whatever the card."""

    operations: float
    moved: float
    """Bytes between the card's memory and its chip."""
    transferred: float
    """Bytes between the card and the machine's memory."""

    def ideal_seconds(self, card: Card) -> float:
        """At the full rate and the full bandwidth of the card."""
        return self.operations / card.rate + self.moved / card.bandwidth

    def seconds(self, card: Card) -> float:
        return self.ideal_seconds(card) / EFFICIENCY + self.transferred / TRANSFER


def work_of(setup: Setup) -> Work:
    """Forward and backward of one micro batch."""
    hidden_state = setup.tokens * setup.shape.hidden * saved.residual_bytes(setup)
    waiting = setup.recomputed * hidden_state if setup.offload else 0
    return Work(
        operations=setup.tokens * operations(setup).total,
        moved=base_traffic(setup) + setup.tokens * token_traffic(setup),
        transferred=2 * waiting,
    )


def operations(setup: Setup) -> Operations:
    """Floating point operations for each token of a micro batch; a multiplication and an addition are two.

    base       2·N forward, 2·N for the gradient of its inputs (its own is not asked for), 2·N again where it is
               recomputed: 2·N·(2+c), N the parameters of linear layers that see a token, c the share of recomputed
               layers. With our LoRA linear, recomputation ends before the last linear layer of a block.
    adapter    2·P forward, 2·P for its inputs, 2·P for itself, 2·P recomputed: 2·P·(3+c). On the head, for the tokens
               that it scores, and never recomputed.
    head       4·h·V for each token with loss, forward and gradient, in one pass over chunks. TRL's recomputes the
               logits in its backward pass: 6·h·V, and off a GPU for every token, with loss or not.
    attention  4·q·k for the k keys that a token sees on average, backward 2.5 times that (flash attention recomputes
               the scores: five products where forward has two; arXiv 2307.08691, section 2.3), and c times again.
               In eager attention backward is twice forward.
    """
    shape, kernels = setup.shape, setup.kernels
    c = setup.recomputed / shape.layers
    used = [linear.active * linear.inputs * linear.outputs for linear in shape.linears]
    adapted = _adapted(setup)
    last = shape.linears[-1]
    skipped = used[-1] if kernels.lora and last in adapted and shape.model_type not in NORM_AFTER_MLP else 0
    scored = setup.supervised if kernels.head or setup.dtype_bytes == 2 else 1.0
    backward = 2.0 if kernels.attention == "eager" else 2.5
    on_head = 2 * setup.rank * (shape.hidden + shape.vocabulary) * 3 * scored if HEAD in setup.targets else 0
    return Operations(
        base=2 * shape.layers * (sum(used) * (2 + c) - skipped * c),
        head=(4 if kernels.head else 6) * shape.hidden * shape.vocabulary * scored,
        adapter=2 * shape.layers * setup.rank * sum(_ends(linear) for linear in adapted) * (3 + c) + on_head,
        attention=4 * shape.layers * shape.heads * shape.head_dim * keys(setup) * (1 + backward + c),
    )


def keys(setup: Setup) -> float:
    """Keys for which attention computes a score, for one token, on average.

    A causal row of S tokens: S/2; with a window of w: w - w²/2S. Where there is a mask (rows packed under sdpa, several
    of different lengths padded, or a window), and in eager attention, every pair of the sequence is computed, and most
    of it thrown away.
    """
    if setup.kernels.attention == "eager" or saved.has_mask(setup):
        return setup.sequence
    reach = min(setup.row, setup.shape.window or setup.row)
    return reach - reach * reach / (2 * setup.row)


def base_traffic(setup: Setup) -> float:
    """Bytes moved to have the base's matrices in 16 bit, once for a micro batch, however many tokens it has: that is
    what makes large micro batches cheaper. Forward, backward, and once more where it is recomputed.

    nf4 is read and written out in 16 bit each time. int8 is multiplied as it is, and written out for the backward pass
    (bitsandbytes, autograd/_functions.py, MatMul8bitLt). In 16 bit nothing is to be done.
    """
    shape = setup.shape
    held = shape.layers * sum(linear.parameters for linear in shape.linears if linear.quantized)
    if setup.quantization == "nf4":
        return held * (NF4_BYTES + 2) * (2 + setup.recomputed / shape.layers)
    return held * (1 + 2) if setup.quantization == "int8" else 0.0


def token_traffic(setup: Setup) -> float:
    """Bytes moved for one token by all that is no matrix product.

    For transformers' and PEFT's own code in bfloat16 with an adapter in float32, counted on a Llama layer (inputs and
    outputs of every operation): forward 85·h + 10·f + 21·(q+k), and for each adapted linear layer 12 a number that
    comes in and 10 a number that goes out; backward 214·h + 18·f + 32·(q+k), 18 and 4. Where one kernel does it, each
    number is read and written once: forward 20·h + 6·f + 4·(q+k), backward 42·h + 10·f + 4·(q+k). Our LoRA linear adds
    in place: 4 a number that goes out, forward, and 4 that comes in, backward. These latter are counted by hand. What
    is fused in torch, for want of liger-kernel, is taken to move as much as transformers' code does.

    The head: 10 a logit (written, read for the loss, written again, turned into its gradient), 6 in one pass.
    """
    shape, kernels = setup.shape, setup.kernels
    h, f, rotated = shape.hidden, shape.intermediate, (shape.heads + shape.kv_heads) * shape.head_dim
    adapted = _adapted(setup)
    come = sum(linear.active * linear.inputs for linear in adapted)
    go = sum(linear.active * linear.outputs for linear in adapted)
    if kernels.fused and kernels.liger:
        forward, backward = 20 * h + 6 * f + 4 * rotated, 42 * h + 10 * f + 4 * rotated
    else:
        forward, backward = 85 * h + 10 * f + 21 * rotated, 214 * h + 18 * f + 32 * rotated
    if kernels.lora:
        forward, backward = forward + 4 * go, backward + 4 * come
    else:
        forward, backward = forward + 12 * come + 10 * go, backward + 18 * come + 4 * go
    logits = (6 if kernels.head else 10) * shape.vocabulary * setup.supervised
    return shape.layers * (forward + backward) + setup.recomputed * forward + logits


def _adapted(setup: Setup) -> list[Linear]:
    every = setup.targets == "all-linear"
    return [linear for linear in setup.shape.linears if (linear.adapted if every else linear.name in setup.targets)]


def _ends(linear: Linear) -> int:
    return linear.active * (linear.inputs + linear.outputs)
