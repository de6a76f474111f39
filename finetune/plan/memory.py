"""How many bytes a training needs on its device at its worst moment, part by part.

The peak is the largest of three moments, not the sum of all that ever exists (`training_memory`). What a layer keeps
is in `saved.py`; what exists beside it for a moment is `transient`. Proven on a CPU (tests/plan/test_memory.py):
parameters exactly, what is kept within 5 %, the peak of whole steps within 10 %. Nothing of this has been measured on
a GPU here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from finetune.errors import ConfigError
from finetune.plan import saved
from finetune.plan.setup import HEAD, Linear, Quantization, Setup, Shape, Targets

CONTEXT = round(0.55 * 2**30)
"""Bytes that CUDA's context, its libraries and cuBLAS's workspace take on a card before anything is computed. What the
issue gives as typical; it differs by driver and card."""

TRL_TILE_TOKENS, TRL_TILE_WORDS = 4096, 32768
"""TRL's chunked head computes logits in tiles of so many tokens and words (trl/kernels/chunked_logprob.py,
`TOKEN_CHUNK_SIZE`; trl/trainer/utils.py, `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""

HEAD_LOGITS, HEAD_LOGITS_CPU = 2**26, 2**24
"""Logits in one chunk of our head (model/kernels/head.py, `CHUNK_LOGITS`; a test holds them equal)."""

SMALLEST_IN_8_BIT, SMALLEST_PAGED = 4096, 100_000
"""Numbers of the smallest tensor whose optimizer state bitsandbytes keeps in 8 bit, and of the smallest that it pages
(0.50, optim/optimizer.py)."""

EVALUATION_SLICE = 256
"""Positions whose loss is computed at a time in an evaluation (evaluate/compare.py)."""


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
    # Until the forward pass ends, autocast keeps the copies that it made of A and B, those of recomputed layers too.
    casts = setup.recomputed * saved.cast_weights(setup)
    in_head = kept_layers * layer + outside + casts, head_bytes(setup)
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


def evaluation_memory(setup: Setup) -> int:
    """Bytes of the evaluation after a training: the least that it can do with, one row and one answer at a time.

    evaluate/compare.py takes more at once (2²⁸ logits, 16 answers), and halves that until memory suffices, so that one
    at a time is what has to fit. Three moments, each counted on small models (tests/plan/test_memory.py):

    a layer   PEFT computes its float32 adapter without autocast: the layer's input and two or three tensors of its
              output's size exist in float32 beside the 16-bit ones (`evaluated_layer`)
    the loss  all logits of the row in the compute dtype; 256 positions at a time as float32, and their logarithms
    answers   keys and values of the prompt (as long as the longest row) and of all that is written, with a copy of one
              layer's, because each token's are appended to it (transformers, `DynamicCache`)
    """
    shape, size, row = setup.shape, setup.dtype_bytes, setup.row
    weights = weight_bytes(shape, setup.quantization, size) + (CONTEXT if size == 2 else 0)
    adapter = 4 * adapter_parameters(shape, setup.rank, setup.targets)
    layer = evaluated_layer(setup) + dequantized(shape, setup.quantization, size)
    copies = 2 if size == 2 else 1  # float32 logits are not copied to be float32
    logits = shape.vocabulary * (size * row + copies * 4 * min(row, EVALUATION_SLICE))
    if shape.model_type == "gemma2":  # its soft limit on logits makes new ones
        logits = max(logits, 2 * size * row * shape.vocabulary)
    one_token = 2 * shape.kv_heads * shape.head_dim * size  # its key and value in one layer
    answers = 0
    if setup.answer:
        written = (row + setup.answer) * one_token * shape.layers + (row + setup.answer) * one_token // 2
        answers = max(row * one_token * shape.layers + layer, written)
    return weights + adapter + max(layer, logits, answers)


def evaluated_layer(setup: Setup) -> int:
    """What exists at once in one layer of one row without gradients, the hidden states between layers included: in the
    MLP, or in attention where the MLP is narrow or the scores exist as a tensor."""
    shape, size, row = setup.shape, setup.dtype_bytes, setup.row
    active = max(linear.active for linear in shape.linears)
    output, rest = (10, 12) if size == 2 else (12, 16)
    joint = shape.gated and any(linear.name == "gate_up_proj" for linear in shape.linears)
    # Beside a gate of its own stands the activation of the gate.
    wide = 2 * output if joint else output + (size if shape.gated else 0)
    mlp = wide * shape.intermediate * active + (rest + (4 if shape.model_type == "falcon" else 0)) * shape.hidden
    queries = max(linear.outputs for linear in shape.linears if linear.name in saved.QUERIES)
    if shape.linears[0].name in saved.JOINT:
        attention = output * (queries + shape.hidden)
    else:
        attention = (26 if size == 2 else 36) * max(queries, shape.hidden)
    squares = 0
    if saved.scores_exist(setup):
        by_model = setup.kernels.attention == "eager"
        squares = (11 if by_model else 10) * shape.heads * row  # counted: 10 to 11, and 8.75 to 9.25, bytes a pair
        attention = (26 if size == 2 else 36) * max(shape.hidden, shape.heads * shape.head_dim)
        # A model's own attention hands its probabilities out, and its masks (with a window and without) stay.
        mlp += size * row * (shape.heads + 2) if by_model else 0
    return row * (max(mlp, attention + squares) + 2 * shape.head_dim * size + 8)


# -- parameters ---------------------------------------------------------------------------------------------------


def parameters(shape: Shape) -> int:
    """All parameters of the base."""
    block = sum(linear.parameters for linear in shape.linears) + shape.vectors
    head = 0 if shape.tied else shape.vocabulary * shape.hidden
    return shape.layers * block + shape.vocabulary * shape.hidden + head + shape.outside


def adapter_parameters(shape: Shape, rank: int, targets: Targets) -> int:
    """Parameters of the adapter: rank × (inputs + outputs) for each adapted linear layer (arXiv 2106.09685).

    Raises ConfigError for a target that is no linear layer of the model.
    """
    return sum(numbers * count for numbers, count in adapter_tensors(shape, rank, targets))


@lru_cache(maxsize=256)
def adapter_tensors(shape: Shape, rank: int, targets: Targets) -> tuple[tuple[int, int], ...]:
    """The adapter's tensors: how many numbers, and how many tensors of that size. A and B of each adapted linear layer.

    Of experts, gate and up are one matrix, to which PEFT gives the rank of both (peft/utils, transformers_weight_
    conversion.py, `_convert_peft_config_moe`). Raises ConfigError for a target that is no linear layer of the model.
    """
    linears = [linear for linear in shape.linears if linear.adapted]
    found = []
    if not isinstance(targets, str):
        # GPT-NeoX calls its head embed_out, which lora.targets does not know (model/adapter.py).
        names = {linear.name for linear in shape.linears} | ({HEAD} if shape.model_type != "gpt_neox" else set())
        wanted = {_EXPERT_NAMES.get(target, target) for target in targets} if _has_experts(shape) else set(targets)
        unknown = sorted(wanted - names)
        if unknown:
            known = ", ".join(sorted(names))
            raise ConfigError(f"lora.targets: the base has no layer named {unknown[0]}", hint=f"it has: {known}")
        linears = [linear for linear in shape.linears if linear.name in wanted]
        if HEAD in wanted:
            found += [(rank * shape.hidden, 1), (rank * shape.vocabulary, 1)]
    for linear in linears:
        doubled = 2 if linear.name == "gate_up_proj" and linear.copies > 1 else 1
        each = linear.copies * doubled * rank
        found += [(each * linear.inputs, shape.layers), (each * linear.outputs, shape.layers)]
    return tuple(found)


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

    bitsandbytes decides tensor by tensor (optim/optimizer.py): fewer than 4,096 numbers stay in float32
    (`min_8bit_size`), and fewer than 100,000 are not paged (`get_state_buffer`). What is paged lies in memory that the
    driver moves out of the GPU when room is needed, and is not counted there; the float32 for each 256 stays. On a CPU
    nothing is paged.
    """
    eight, paged = setup.optimizer.endswith("8bit"), setup.optimizer.startswith("paged") and setup.dtype_bytes == 2
    found = 0
    for numbers, count in adapter_tensors(setup.shape, setup.rank, setup.targets):
        in_eight = eight and numbers >= SMALLEST_IN_8_BIT
        moments = 2 * numbers * (1 if in_eight else 4)
        scales = 2 * 4 * math.ceil(numbers / 256) if in_eight else 0
        found += count * (scales + (0 if paged and numbers >= SMALLEST_PAGED else moments))
    return found


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
    return setup.pairs if saved.has_mask(setup) else 0


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
    squares = 2 * 4 * shape.heads * setup.pairs if scores else 0
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
