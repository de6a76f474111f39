"""What autograd keeps of one layer from its forward pass to its backward pass, in bytes for each token.

Counted, not guessed: tests/plan/test_memory.py builds small models of every family, puts PEFT's LoRA on them, and adds
up what `torch.autograd.graph.saved_tensors_hooks` sees, each storage once. Two worlds are told apart by
`Setup.dtype_bytes`:

4   a CPU: everything in float32. A tensor that two layers need is kept once.
2   a GPU: a base in 16 bit under autocast, with an adapter in float32. Three things follow. RMSNorm and LayerNorm
    compute in float32 and keep a float32 copy of their input. PEFT casts a LoRA's input to float32 and autocast casts
    it back, so every adapted linear keeps a 16-bit copy of its own (peft/tuners/lora/bnb.py, `_cast_input_dtype`). And
    16-bit copies of A and B are kept with the products that they were used in.

What a layer keeps does not depend on how the base is quantised, with two exceptions: bitsandbytes' int8 product keeps
its input, and a LayerNorm's float32 output makes a quantised linear answer in float32 (bitsandbytes/nn/modules.py,
`Linear4bit.forward`: `.to(inp_dtype)`), so that GPT-NeoX has a residual stream in float32.
"""

from __future__ import annotations

from finetune.plan.setup import Linear, Setup

NORM_BYTES = 4
"""Norms compute in float32 everywhere."""

DROPPED_BYTES = 1
"""Of what dropout keeps of each number on a GPU: whether it stayed."""

LAYER_NORM = {"gpt_neox", "falcon"}
"""Families with LayerNorm, GELU and joint matrices; all others have RMSNorm."""

JOINT = {"qkv_proj", "query_key_value"}
"""Matrices that give queries, keys and values together."""

QUERIES = JOINT | {"q_proj"}

_FOUR_NORMS = {"gemma2", "gemma3_text"}
_HEAD_NORMS = {"qwen3", "qwen3_moe", "gemma3_text", "olmo2"}
_OWN_GATE = {"gemma", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"}
"""Families whose MLP no fused kernel of ours computes: GELU, a joint matrix, experts."""


def adapted(linear: Linear, setup: Setup) -> bool:
    """Whether the adapter is on this linear layer."""
    return linear.adapted if setup.targets == "all-linear" else linear.name in setup.targets


def wide_residual(setup: Setup) -> bool:
    """Whether the hidden states between layers are float32 although the model is in 16 bit (see above)."""
    quantized = setup.quantization != "none" and all(linear.quantized for linear in setup.shape.linears)
    return setup.dtype_bytes == 2 and setup.shape.model_type in LAYER_NORM and quantized


def residual_bytes(setup: Setup) -> int:
    """Bytes of a number in the hidden states between layers."""
    return 4 if wide_residual(setup) else setup.dtype_bytes


def has_mask(setup: Setup) -> bool:
    """Whether transformers makes a mask of sequence × sequence (masking_utils.py): where a sequence holds several rows
    or padding, or where a window is shorter than the sequence. Without one, attention is plainly causal."""
    if setup.kernels.attention == "varlen":
        return False
    window = setup.shape.window or setup.shape.local  # a layer without the window is counted as if it had it
    several = setup.row < setup.sequence or setup.micro_batch > 1
    return several or (window is not None and window < setup.sequence)


def layer_saved(setup: Setup) -> int:
    """Bytes that one layer keeps for the whole micro batch."""
    per_token = norms(setup) + lora_inputs(setup) + attention(setup) + mlp(setup) + int8_inputs(setup)
    return setup.tokens * per_token + attention_squares(setup) + cast_weights(setup)


def shared_with_checkpoint(setup: Setup) -> int:
    """Bytes of `layer_saved` that are the layer's input itself, which a recomputed layer's checkpoint is already."""
    itself = setup.dtype_bytes == 4 or wide_residual(setup) or (setup.kernels.fused and not _layer_norm(setup))
    return setup.tokens * setup.shape.hidden * residual_bytes(setup) if itself else 0


def norms(setup: Setup) -> int:
    """Inputs of the norms, and one float32 (RMSNorm) or two (LayerNorm: mean and deviation) for each.

    A LayerNorm's input in 16 bit is copied for each norm; two that read the same float32 share it.
    """
    shape = setup.shape
    if _layer_norm(setup):
        count = _layer_norms(setup)
        shared = setup.dtype_bytes == 4 or wide_residual(setup)
        return NORM_BYTES * (shape.hidden * (1 if shared and shape.parallel else count) + 2 * count)
    wide = setup.dtype_bytes if setup.kernels.fused else NORM_BYTES
    count = 4 if shape.model_type in _FOUR_NORMS else 2
    found = count * (wide * shape.hidden + NORM_BYTES)
    if shape.model_type in _HEAD_NORMS:
        queries, keys = _widths(setup)
        heads = 2 if shape.model_type == "olmo2" else shape.heads + shape.kv_heads
        found += wide * (queries + keys) + NORM_BYTES * heads
    return found


def lora_inputs(setup: Setup) -> int:
    """Inputs of the adapted linears, and the small products XA.

    What attention keeps anyway (its output) is not counted again unless it is copied; the activation's result that the
    last linear of an MLP reads is counted here. Dropout copies too, and keeps which numbers it dropped: a byte each on
    a GPU, on a CPU a number by which each is multiplied (aten/native/Dropout.cpp).
    """
    size, found = setup.dtype_bytes, 0
    copies = _copies(setup)
    mask = 0 if not setup.dropout else DROPPED_BYTES if size == 2 else size
    for linear in setup.shape.linears:
        if adapted(linear, setup):
            found += size * setup.rank * linear.active
            if copies:
                found += (size + mask) * linear.inputs * linear.active
    if copies:
        return found
    for group in _same_input(setup):
        kept = _is_attention_output(setup, group[0]) or _remembered(setup, group[0])
        if any(adapted(linear, setup) for linear in group) and not kept:
            found += size * group[0].inputs * group[0].active
    return found


def cast_weights(setup: Setup) -> int:
    """16-bit copies of the A and B of one layer, under autocast. Ours makes them when it needs them."""
    if setup.dtype_bytes == 4 or setup.kernels.lora:
        return 0
    linears = (linear for linear in setup.shape.linears if adapted(linear, setup))
    return sum(2 * linear.copies * setup.rank * (linear.inputs + linear.outputs) for linear in linears)


def attention(setup: Setup) -> int:
    """Queries and keys after rotation, values, the result, and the logarithm of each head's sum (float32).

    Joint matrices keep the queries and keys before rotation as well, because the values are a view of the whole. With a
    mask, keys and values are repeated for every head (transformers/integrations/sdpa_attention.py, `repeat_kv`).
    """
    shape, size = setup.shape, setup.dtype_bytes
    queries, keys = _widths(setup)
    if scores_exist(setup):
        # One sequence of Falcon 7B keeps its one key and value; of more sequences they are copied for every head.
        alone = setup.kernels.attention != "eager" and setup.micro_batch == 1
        return _by_hand_bytes(setup) * (queries + 2 * (keys if alone else queries)) + _result_of_hand(setup)
    log_sums = NORM_BYTES * shape.heads
    together = size * queries if setup.kernels.attention == "varlen" and size == 4 else 0  # a CPU's rows, put together
    if wide_residual(setup):  # float32, cast for the kernel
        return size * (2 * queries + 2 * keys) + log_sums
    if _joint(setup) and not has_mask(setup):
        return size * (queries + keys + (queries + 2 * keys) + queries) + log_sums + together
    if has_mask(setup) and shape.kv_heads != shape.heads:
        return size * 4 * queries + log_sums
    joint = queries + keys if _joint(setup) else 0
    return size * (2 * queries + 2 * keys + joint) + log_sums + together


def attention_squares(setup: Setup) -> int:
    """What grows with the square of the sequence, for the whole micro batch.

    sdpa turns the mask into numbers of the compute dtype for each layer, and the fused kernels keep that. Attention by
    hand keeps the probabilities of every head: in float32, under autocast again in 16 bit, and with a soft limit on the
    scores (Gemma 2) its hyperbolic tangent.
    """
    shape, size = setup.shape, setup.dtype_bytes
    square = setup.pairs
    if not scores_exist(setup):
        return size * square if has_mask(setup) else 0
    scores = NORM_BYTES
    if setup.kernels.attention == "eager":
        scores += (size if size == 2 else 0) + (size if shape.model_type == "gemma2" else 0)
    return scores * shape.heads * square


def mlp(setup: Setup) -> int:
    """Gate, up and the activation of the gate, or without a gate the activation's input.

    The fused SwiGLU computes the activation again. Experts: as many as are active, and their inputs and outputs, which
    are sorted by expert (an estimate: what experts keep has not been counted).
    """
    shape, size = setup.shape, setup.dtype_bytes
    active = max(linear.active for linear in shape.linears)
    if not shape.gated:
        return (4 if wide_residual(setup) else size) * shape.intermediate
    kept = 2 if swiglu_fused(setup) else 3
    experts = 2 * shape.hidden * active if any(linear.copies > 1 for linear in shape.linears) else 0
    return size * (kept * shape.intermediate * active + experts)


def int8_inputs(setup: Setup) -> int:
    """bitsandbytes' int8 product keeps its input outside of autograd's sight (autograd/_functions.py, MatMul8bitLt).

    Ours, and a CPU, share that with the LoRA's input; PEFT's LoRA has a copy beside it.
    """
    if setup.quantization != "int8" or setup.dtype_bytes == 4 or setup.kernels.lora:
        return 0
    groups = (g for g in _same_input(setup) if g[0].quantized and not _is_attention_output(setup, g[0]))
    return sum(setup.dtype_bytes * group[0].inputs for group in groups)


# -- what a family is like ----------------------------------------------------------------------------------------


def _copies(setup: Setup) -> bool:
    """Whether every adapted linear keeps an input of its own: cast by PEFT and autocast, or with some of it dropped."""
    return (setup.dtype_bytes == 2 or setup.dropout) and not setup.kernels.lora


def _layer_norm(setup: Setup) -> bool:
    return setup.shape.model_type in LAYER_NORM


def swiglu_fused(setup: Setup) -> bool:
    """Whether gate and up meet in one kernel, which saves neither the activation nor the product."""
    return setup.kernels.fused and setup.shape.gated and setup.shape.model_type not in _OWN_GATE


def _remembered(setup: Setup, linear: Linear) -> bool:
    """Whether our LoRA linear computes its input again from what is saved anyway (model/kernels/lora.py, `remember`):
    a fused norm of the hidden state, a fused SwiGLU. OLMo 2 reads the hidden state itself, and norms afterwards."""
    if not (setup.kernels.fused and setup.kernels.lora) or _layer_norm(setup):
        return False
    if linear.name == "down_proj":
        return swiglu_fused(setup)
    return linear.name in _READS and setup.shape.model_type != "olmo2"


def _layer_norms(setup: Setup) -> int:
    """LayerNorms in a block, each of which has two vectors of the hidden width."""
    biases = sum(linear.copies * linear.outputs for linear in setup.shape.linears if linear.bias)
    return (setup.shape.vectors - biases) // (2 * setup.shape.hidden)


def _widths(setup: Setup) -> tuple[int, int]:
    """Width of all queries, and of all keys."""
    shape = setup.shape
    return shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim


def _joint(setup: Setup) -> bool:
    return setup.shape.linears[0].name in JOINT


def _same_input(setup: Setup) -> list[list[Linear]]:
    """The linears of a block, grouped by the tensor that they read."""
    groups: dict[str, list[Linear]] = {}
    for linear in setup.shape.linears:
        groups.setdefault(_READS.get(linear.name, linear.name), []).append(linear)
    if setup.shape.parallel and _layer_norms(setup) == 1:  # Falcon 7B: attention and MLP read the same norm
        groups["attention"] += groups.pop("mlp")
    return list(groups.values())


_READS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "qkv_proj": "attention",
    "query_key_value": "attention",
    "gate": "mlp",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "gate_up_proj": "mlp",
    "dense_h_to_4h": "mlp",
}
"""Linears that read the same tensor as others; each of the rest reads its own."""


def _is_attention_output(setup: Setup, linear: Linear) -> bool:
    """Whether a linear reads what attention keeps anyway.

    The fused kernels lay their result out as the queries are. Those of joint matrices are new tensors (rotation ends
    with a concatenation), whose heads stand first: the next linear then reads a copy. Fused rotation keeps the layout.
    """
    as_queries = not _joint(setup) or (setup.kernels.fused and not _layer_norm(setup))
    return linear.name in {"o_proj", "dense"} and (scores_exist(setup) or as_queries)


def scores_exist(setup: Setup) -> bool:
    """Whether the scores of all heads exist as a tensor: attention in plain torch, or sdpa without a fused kernel.

    Falcon 7B's one key for all heads is broadcast inside sdpa, which only its unfused form does
    (aten/native/transformers/cuda/sdp_utils_cpp.h, check_batch_size_and_num_heads_dense).
    """
    falcon = setup.shape.model_type == "falcon" and setup.shape.kv_heads == 1 and setup.shape.heads > 1
    return setup.kernels.attention == "eager" or falcon


def _by_hand_bytes(setup: Setup) -> int:
    """sdpa's unfused form computes in float32 (_scaled_dot_product_attention_math), a model's own in its dtype."""
    return setup.dtype_bytes if setup.kernels.attention == "eager" else NORM_BYTES


def _result_of_hand(setup: Setup) -> int:
    """The result of attention by hand, which only the next linear's LoRA keeps, if it does not copy it."""
    shape = setup.shape
    output = next(linear for linear in shape.linears if linear.name in {"o_proj", "dense"})
    keeps = adapted(output, setup) and not _copies(setup)
    return setup.dtype_bytes * output.inputs if keeps else 0
