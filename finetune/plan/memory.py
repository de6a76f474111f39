"""How many bytes a training needs on its device at its worst moment, part by part.

The peak is the largest of three moments, not the sum of all that ever exists (`training_memory`). What a layer keeps
is in `saved.py`; what exists beside it for a moment is `transient`. Proven on a CPU (tests/plan/test_memory.py):
parameters exactly, what is kept within 5 %, the peak of whole steps within 10 %. Nothing of this has been measured on
a GPU here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.errors import ConfigError
from finetune.plan import saved
from finetune.plan.setup import Linear, Quantization, Setup, Shape

CONTEXT = round(0.55 * 2**30)
"""Bytes that CUDA's context, its libraries and cuBLAS's workspace take on a card before anything is computed. What the
issue gives as typical; it differs by driver and card."""

TRL_TILE_TOKENS, TRL_TILE_WORDS = 4096, 32768
"""TRL's chunked head computes logits in tiles of so many tokens and words (trl/kernels/chunked_logprob.py,
`TOKEN_CHUNK_SIZE`; trl/trainer/utils.py, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""

HEAD_LOGITS, HEAD_LOGITS_CPU = 2**26, 2**24
"""Logits in one chunk of our head (model/kernels/head.py, `CHUNK_LOGITS`; a test holds them equal)."""

EVALUATION_LOGITS, EVALUATION_SLICE = 2**28, 256
"""Logits in one batch of an evaluation, and positions whose loss is computed at a time (evaluate/compare.py)."""


@dataclass(frozen=True)
class Memory:
    """The peak, in bytes, by what it is made of."""

    weights: int
    """The frozen base."""
    adapter: int
    gradients: int
    """Of the adapter."""
    optimizer: int
    """AdamW's two moments."""
    checkpoints: int
    """What recomputation starts from: the input of each recomputed layer."""
    activations: int
    """What layers keep, and what exists for a moment in the one that is computed."""
    logits: int
    """The head and the loss."""
    buffers: int
    """A dequantised matrix, the attention mask."""
    context: int
    """What CUDA takes for itself."""

    @property
    def total(self) -> int:
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """The parts by name, without the total."""
        return {
            "weights": self.weights,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "checkpoints": self.checkpoints,
            "activations": self.activations,
            "logits": self.logits,
            "buffers": self.buffers,
            "context": self.context,
        }


def training_memory(setup: Setup) -> Memory:
    """The peak of a training step, after the first (the optimizer's state and the gradients exist).

    The largest of three moments. The first layers are those that are recomputed (model/recompute.py):

    head      all checkpoints, all that other layers keep, and the head with its loss
    backward  of the last layer: the same, less the head, and what its backward pass needs for a moment
    recompute of the last recomputed layer: the other layers have given back what they kept; this one keeps all, for now
    """
    shape, adapter = setup.shape, adapter_parameters(setup.shape, setup.rank, setup.targets)
    layer, kept_layers = saved.layer_saved(setup), shape.layers - setup.recomputed
    outside = outside_layers(setup)
    in_head = kept_layers * layer + outside, head_bytes(setup)
    moments = [in_head, (kept_layers * layer + outside + last_backward(setup), hidden_gradient(setup))]
    if setup.recomputed:
        working = layer - saved.shared_with_checkpoint(setup) + transient(setup)
        moments.append((working + rotary(setup), hidden_gradient(setup)))
    activations, logits = max(moments, key=sum)
    return Memory(
        weights=weight_bytes(shape, setup.quantization, setup.dtype_bytes),
        adapter=4 * adapter,
        gradients=4 * adapter,
        optimizer=optimizer_bytes(setup),
        checkpoints=checkpoint_bytes(setup),
        activations=activations,
        logits=logits,
        buffers=dequantized(shape, setup.quantization, setup.dtype_bytes) + mask_bytes(setup),
        context=CONTEXT if setup.dtype_bytes == 2 else 0,
    )


def evaluation_memory(shape: Shape, quantization: Quantization, dtype_bytes: int, rows_tokens: tuple[int, int]) -> int:
    """Bytes of evaluating the loss, without the adapter (4 bytes a parameter of it): weights, one layer, logits.

    rows_tokens  rows in all, and tokens of the longest

    evaluate/compare.py makes the logits of a whole batch in the compute dtype, at most 2²⁸ unless one row alone has
    more, and turns 256 positions at a time into float32 (the logits, their logarithms, and a copy).
    """
    rows, longest = rows_tokens
    lines = max(1, min(rows, EVALUATION_LOGITS // max(1, shape.vocabulary * longest)))
    tokens = lines * longest
    widest = max(shape.intermediate * max(linear.active for linear in shape.linears), shape.hidden)
    layer = dtype_bytes * tokens * (3 * widest + 2 * shape.hidden) + 4 * tokens * shape.hidden
    logits = dtype_bytes * tokens * shape.vocabulary + dtype_bytes * tokens * shape.hidden
    sliced = 3 * 4 * min(longest, EVALUATION_SLICE) * shape.vocabulary
    context = CONTEXT if dtype_bytes == 2 else 0
    at_once = max(layer + dequantized(shape, quantization, dtype_bytes), logits + sliced)
    return weight_bytes(shape, quantization, dtype_bytes) + context + at_once


# -- parameters ---------------------------------------------------------------------------------------------------


def parameters(shape: Shape) -> int:
    """All parameters of the base."""
    block = sum(linear.parameters for linear in shape.linears) + shape.vectors
    head = 0 if shape.tied else shape.vocabulary * shape.hidden
    return shape.layers * block + shape.vocabulary * shape.hidden + head + shape.outside


def adapter_parameters(shape: Shape, rank: int, targets: tuple[str, ...] | str) -> int:
    """Parameters of the adapter: rank × (inputs + outputs) for each adapted linear layer (arXiv 2106.09685).

    Of experts, gate and up are one matrix, to which PEFT gives the rank of both (peft/utils, transformers_weight_
    conversion.py, `_convert_peft_config_moe`). Raises ConfigError for a target that is no linear layer of the model.
    """
    names = {linear.name for linear in shape.linears}
    if not isinstance(targets, str):
        wanted = {_EXPERT_NAMES.get(target, target) for target in targets} if _has_experts(shape) else set(targets)
        unknown = sorted(wanted - names)
        if unknown:
            known = ", ".join(sorted(names))
            raise ConfigError(f"lora.targets: the base has no layer named {unknown[0]}", hint=f"it has: {known}")
        names = wanted
    per_layer = 0
    for linear in shape.linears:
        if linear.adapted if isinstance(targets, str) else linear.name in names:
            doubled = 2 if linear.name == "gate_up_proj" and linear.copies > 1 else 1
            per_layer += linear.copies * doubled * rank * (linear.inputs + linear.outputs)
    return shape.layers * per_layer


_EXPERT_NAMES = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""What experts' matrices were called before they were stacked; PEFT still takes these names."""


def _has_experts(shape: Shape) -> bool:
    return any(linear.copies > 1 for linear in shape.linears)


def linear_bytes(linear: Linear, quantization: Quantization, dtype_bytes: int) -> int:
    """Bytes of a linear layer's matrices.

    nf4 with double quantisation (arXiv 2305.14314, section 3; bitsandbytes/functional.py, `quantize_4bit`): 4 bits a
    number, one byte for the largest of each 64, one float32 for each 256 of those bytes, and of every matrix two tables
    (16 and 256 float32) and an offset: 0.5159 bytes a number. int8: one byte, and a float32 for each output.
    """
    numbers = linear.inputs * linear.outputs
    if quantization == "none" or not linear.quantized:
        return linear.copies * numbers * dtype_bytes
    if quantization == "int8":
        return linear.copies * (numbers + 4 * linear.outputs)
    blocks = math.ceil(numbers / 64)
    return linear.copies * (math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1))


def weight_bytes(shape: Shape, quantization: Quantization, dtype_bytes: int) -> int:
    """Bytes of the base. Embedding, head, norms and biases are never quantised."""
    block = sum(linear_bytes(linear, quantization, dtype_bytes) for linear in shape.linears)
    others = parameters(shape) - shape.layers * sum(linear.parameters for linear in shape.linears)
    return shape.layers * block + dtype_bytes * others


def optimizer_bytes(setup: Setup) -> int:
    """AdamW's two moments: 8 bytes a parameter in float32; in 8 bit 2, and a float32 for each 256 of either.

    Paged state lies in memory that the driver moves out of the GPU when room is needed (bitsandbytes, `get_paged`), so
    it is not counted there; on a CPU nothing is paged. Small tensors, which bitsandbytes leaves in float32, are not
    told apart.
    """
    if setup.dtype_bytes == 2 and setup.optimizer.startswith("paged"):
        return 0
    count = adapter_parameters(setup.shape, setup.rank, setup.targets)
    return 2 * count + 2 * 4 * math.ceil(count / 256) if setup.optimizer.endswith("8bit") else 8 * count


# -- a step -------------------------------------------------------------------------------------------------------


def checkpoint_bytes(setup: Setup) -> int:
    """One hidden state for each recomputed layer (arXiv 1604.06174); with offload two, the one that is being used and
    the one that is being fetched (model/recompute.py)."""
    count = min(setup.recomputed, 2) if setup.offload else setup.recomputed
    return count * setup.tokens * setup.shape.hidden * saved.residual_bytes(setup)


def rotary(setup: Setup) -> int:
    """cos and sin, which all layers share."""
    return 2 * setup.tokens * setup.shape.head_dim * setup.dtype_bytes


def outside_layers(setup: Setup) -> int:
    """cos and sin, the last norm's input (in float32 unless it is fused), and its result."""
    fused = setup.kernels.fused and setup.shape.model_type not in saved.LAYER_NORM
    norm = setup.dtype_bytes if fused else saved.NORM_BYTES
    return rotary(setup) + setup.tokens * (setup.shape.hidden * (norm + setup.dtype_bytes) + saved.NORM_BYTES)


def mask_bytes(setup: Setup) -> int:
    """transformers' mask of sequence × sequence for each sequence, a byte a pair."""
    return setup.micro_batch * setup.sequence**2 if saved.has_mask(setup) else 0


def dequantized(shape: Shape, quantization: Quantization, dtype_bytes: int) -> int:
    """The largest quantised matrix, unpacked for one product at a time (bitsandbytes/autograd/_functions.py)."""
    sizes = [linear.inputs * linear.outputs for linear in shape.linears if linear.quantized]
    return dtype_bytes * max(sizes, default=0) if quantization != "none" else 0


def hidden_gradient(setup: Setup) -> int:
    """The gradient of the hidden states where the layers end: what the head leaves behind."""
    return setup.tokens * setup.shape.hidden * setup.dtype_bytes


def head_bytes(setup: Setup) -> int:
    """What the head and the loss need at once, beside the hidden states.

    Ours (model/kernels/head.py): the gradient of tokens with loss, and a chunk of logits in the compute dtype and
    float32; then that gradient, it scaled, and the gradient of all tokens. TRL's: the tokens with loss copied, their
    gradient in float32 and then in the compute dtype, and a tile of logits. On a CPU TRL scores every token, and a tile
    exists about seven times in float32 (`_backward_tile` without Triton).
    """
    shape, size = setup.shape, setup.dtype_bytes
    tokens = max(1, math.ceil(setup.tokens * setup.supervised))
    if setup.kernels.head:
        logits = HEAD_LOGITS if size == 2 else HEAD_LOGITS_CPU
        chunk = min(tokens, max(1, logits // shape.vocabulary))
        gradient = size * shape.hidden * tokens
        one_chunk = chunk * (shape.vocabulary * (6 if size == 2 else 4) + 2 * size * shape.hidden)
        return gradient + max(one_chunk, gradient + hidden_gradient(setup))
    tokens = tokens if size == 2 else setup.tokens
    lines = min(tokens, TRL_TILE_TOKENS)
    tile = lines * TRL_TILE_WORDS * size
    if size == 4:
        tile += 6 * 4 * lines * min(shape.vocabulary, TRL_TILE_WORDS)
    return tile + tokens * shape.hidden * (2 * size + 4)


def last_backward(setup: Setup) -> int:
    """What exists for a moment where the backward pass enters the layers: in the last norm (a handful of float32
    tensors of the hidden states, counted: 24 bytes a number in float32, 22 under autocast), or in the last layer."""
    fused = setup.kernels.fused or setup.shape.model_type in saved.LAYER_NORM
    norm = (3 if fused else 6) * 4 - (0 if setup.dtype_bytes == 4 else 2)
    inside = transient(setup) if setup.recomputed < setup.shape.layers else 0
    return max(setup.tokens * setup.shape.hidden * norm - hidden_gradient(setup), inside)


def transient(setup: Setup) -> int:
    """What exists for a moment in the backward pass of one layer, beside all that the layer keeps: at its worst in the
    last linear of the MLP, when nothing has been given back yet.

    Bytes for each number of the hidden width and of the MLP's width, found by counting live storages through whole
    backward passes of layers of several widths (tests/plan/test_memory.py does it again). Where the scores of
    attention exist as a tensor, two of their size in float32 do so for a moment, when the MLP's are gone.
    """
    shape = setup.shape
    hidden, width = _TRANSIENT[_way(setup)]
    active = max(linear.active for linear in shape.linears)
    inside = setup.tokens * (hidden * shape.hidden + width * shape.intermediate * active)
    scores = saved.attention_squares(setup) if saved.scores_exist(setup) else 0
    squares = 2 * 4 * shape.heads * setup.micro_batch * setup.sequence**2 if scores else 0
    return max(inside, squares - setup.tokens * saved.mlp(setup))


_TRANSIENT = {
    ("rms", 4, False, False): (4, 8),
    ("rms", 4, True, False): (8, 12),
    ("rms", 4, False, True): (4, 8),
    ("rms", 4, True, True): (8, 16),
    ("rms", 2, False, False): (8, 6),
    ("rms", 2, True, False): (10, 6),
    ("rms", 2, False, True): (1, 4),
    ("rms", 2, True, True): (4, 8),
    ("layer", 4, False, False): (4, 8),
    ("layer", 4, False, True): (4, 4),
    ("layer", 2, False, False): (12, 6),
    ("layer", 2, False, True): (3, 2),
    ("wide", 2, False, False): (8, 10),
    ("wide", 2, False, True): (10, 6),
}
"""(norm, bytes of the compute dtype, fused SwiGLU, our LoRA) → bytes a number of the hidden width, of the MLP's width.
`wide`: LayerNorm whose hidden states are float32 in a 16-bit model (saved.py, `wide_residual`)."""


def _way(setup: Setup) -> tuple[str, int, bool, bool]:
    kind = "layer" if setup.shape.model_type in saved.LAYER_NORM else "rms"
    kind = "wide" if saved.wide_residual(setup) else kind
    return kind, setup.dtype_bytes, kind == "rms" and saved.swiglu_fused(setup), setup.kernels.lora
