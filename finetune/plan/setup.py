"""What a plan is made for: the shape of a base, and how it is to be trained. Numbers only; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Quantization = Literal["nf4", "int8", "none"]
Targets = tuple[str, ...] | Literal["all-linear"]

HEAD = "lm_head"
"""The output head as a target of the adapter. It stands outside the blocks, and `all-linear` leaves it out."""


@dataclass(frozen=True)
class Linear:
    """A linear layer, as often as it stands in one layer (block) of the model."""

    name: str
    """The last part of its module's name, such as `q_proj`."""
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    """How many of them a layer has: the number of experts, or 1."""
    active: int = 1
    """How many of these compute on one token."""
    quantized: bool = True
    """Whether bitsandbytes holds it in 4 or 8 bits (a plain linear module) when the base is quantised."""
    adapted: bool = True
    """Whether `lora.targets: all-linear` puts an adapter on it."""

    @property
    def parameters(self) -> int:
        """All copies together, biases left out."""
        return self.copies * self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """What config.json says of a model, as far as memory and time depend on it."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width inside the MLP (of one expert)."""
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""
    context: int
    """The longest sequence the model was made for, in tokens."""
    window: int | None
    """Sliding attention window in tokens, where every layer has it, or None."""
    linears: tuple[Linear, ...]
    """The linear layers of one block; the output head is not among them."""
    vectors: int
    """Parameters of one block that are in no linear layer's matrix: norms and biases."""
    outside: int
    """Parameters outside the blocks, other than embedding and head: the last norm, learned positions."""
    gated: bool
    """Whether the MLP has a gate (SwiGLU) or not (GELU)."""
    parallel: bool
    """Whether attention and MLP read the same input (Falcon, GPT-NeoX)."""
    local: int | None = None
    """The window of some layers only (Gemma 2 and 3), whose others see everything; or None."""


@dataclass(frozen=True)
class Kernels:
    """Which of the faster ways of `speed:` are used."""

    attention: Literal["varlen", "sdpa", "eager"]
    """varlen: rows are laid end to end, no padding, no mask. sdpa: where rows are packed, a mask of sequence ×
    sequence."""
    fused: bool
    """RMSNorm, rotary and SwiGLU in one kernel each, which save less."""
    lora: bool
    """Our LoRA linear: saves its input once and the small product XA; copies nothing."""
    head: bool
    """Loss and its gradient in one pass over chunks of the tokens with loss. Otherwise TRL's chunked head."""
    liger: bool = True
    """Whether liger-kernel computes what is fused. Without it, torch does: as little is saved, but no time."""


PLAIN = Kernels(attention="sdpa", fused=False, lora=False, head=False)


@dataclass(frozen=True)
class Setup:
    """One training, on one device."""

    shape: Shape
    quantization: Quantization
    rank: int
    targets: Targets
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
    dtype_bytes: Literal[2, 4]
    """Bytes of a number in the computation: 2 on a GPU (bfloat16 or float16), 4 on a CPU (float32)."""
    micro_batch: int
    """Sequences in a forward and backward pass."""
    sequence: int
    """Tokens of the longest sequence of a micro batch (with packing, of a pack)."""
    row: int
    """Tokens of the longest row in it; attention reaches no further."""
    supervised: float
    """The share of the tokens that carry loss, from 0 to 1."""
    recomputed: int
    """In how many of the layers activations are recomputed in the backward pass, from 0 to `shape.layers`."""
    offload: bool
    """Whether what recomputation starts from waits in the machine's memory, not in the GPU's."""
    kernels: Kernels
    dropout: bool = False
    """Whether PEFT's linears drop some of their adapter's input."""
    answer: int = 0
    """Tokens of the longest answer that the evaluation afterwards writes; 0 where it writes none."""
    most: int | None = None
    """Tokens of the largest micro batch that the data can give, padding included; None: all sequences may be as long
    as the longest."""

    @property
    def tokens(self) -> int:
        """Tokens in the largest micro batch, padding included."""
        return self.micro_batch * self.sequence if self.most is None else self.most

    @property
    def pairs(self) -> int:
        """Pairs of tokens in the lines of a padded micro batch: what a mask has."""
        return self.tokens * self.sequence


@dataclass(frozen=True)
class Fit:
    """How an optimizer step is cut, so that it fits into memory. All cuts of one step train the same."""

    micro_batch: int
    """Sequences in a forward and backward pass."""
    accumulation: int
    """Passes in a step."""
    recomputed: int
    """Layers whose activations are recomputed in the backward pass: the first so many."""
    offload: bool
    """Whether what they are recomputed from waits in the machine's memory."""

    def __str__(self) -> str:
        recomputed = f", {self.recomputed} layers recomputed" if self.recomputed else ""
        return f"{self.micro_batch} × {self.accumulation} sequences{recomputed}{', offloaded' if self.offload else ''}"
