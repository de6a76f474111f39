"""Attention over rows that are laid end to end in one line: each row sees itself alone, and nothing else is computed.

A batch is one line of T tokens with `cu_seq_lens_q` (int32, where each row begins, and T), `max_length_q` (tokens of
the longest row) and position ids that start again in each row. These arguments of the model's forward are the ones that
transformers hands through to flash attention; here they reach an attention function of our own, registered by name
through its AttentionInterface and AttentionMaskInterface. On a GPU it is `torch.nn.attention.varlen.varlen_attn`,
elsewhere torch's fused attention row by row. Whatever comes without `cu_seq_lens_q` (evaluation, answers with a cache)
is computed by transformers' own sdpa functions, bit for bit.

The kernel on the GPU is chosen by what torch documents (2.11: no `enable_gqa`, the kernel shares heads by itself; 2.12
and later: it must be asked for). It has not been measured here.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "finetune_varlen"
"""The name in transformers' interfaces. Words that transformers looks for in names (sdpa, flash, flex) are avoided."""

OWN_MEANING = ("softcap", "s_aux", "position_bias")
"""Arguments by which a model asks for more than a softmax: a soft limit (Gemma 2), sinks (GPT-OSS), ALiBi (MPT)."""


def supports_varlen(model_or_config: PreTrainedModel | PeftModel | PretrainedConfig, device: str) -> tuple[bool, str]:
    """Whether rows may be laid end to end for this model on this device ("cpu", "cuda"), and the reason.

    A config is enough to know it before a base is loaded. What is asked: that attention goes through transformers'
    interface, that nothing but attention mixes tokens (no recurrent or convolutional layers), that scores are plain,
    and on a GPU that flash attention has a kernel for it. A model is tried as well, on two rows of three tokens.
    """
    from transformers import PretrainedConfig

    model = None if isinstance(model_or_config, PretrainedConfig) else model_or_config
    config = (model_or_config if model is None else model.config).get_text_config()
    if reason := _refused_by_model(config):
        return False, reason
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if device != "cpu" and (reason := _refused_by_gpu(head_dim)):
        return False, reason
    if model is not None and (reason := _refused_by_trial(model)):
        return False, reason
    kernel = "torch's fused attention, row by row" if device == "cpu" else "torch's varlen_attn"
    return True, f"{kernel}: no padding, and nothing computed across rows"


def _refused_by_model(config: PretrainedConfig) -> str | None:
    from transformers import AutoModelForCausalLM

    kind = config.model_type
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        return f"transformers has no causal language model of type {kind}"
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers or getattr(model_class, "_is_stateful", False):
        return f"{kind} has layers that carry a state from token to token, also into the next row"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{kind} caps its attention scores softly, which the fused kernels cannot"
    if not (model_class._supports_attention_backend and model_class._supports_sdpa):
        return f"the attention of {kind} is its own and takes no other (sinks, ALiBi, or written before the interface)"
    if getattr(config, "attention_dropout", 0.0):
        return f"{kind} is configured with attention_dropout, which varlen attention does not have"
    return None


def _refused_by_gpu(head_dim: int) -> str | None:
    """Limits of FlashAttention 2 in torch (aten/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if _varlen() is None or not torch.backends.cuda.is_flash_attention_available():
        return "this torch has no varlen attention with windows (2.11 and later have, built with flash attention)"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"flash attention needs compute capability 8.0 (Ampere), this GPU has {major}.{minor}"
    if head_dim > 256 or head_dim % 8:
        return f"flash attention has no kernel for heads of {head_dim}"
    # Shared memory: the backward pass of wide heads was only built for the large chips.
    if head_dim > 192 and (major, minor) not in {(8, 0), (9, 0), (10, 0)}:
        return f"flash attention has no backward pass for heads of {head_dim} on compute capability {major}.{minor}"
    return None


def _refused_by_trial(model: PeftModel | PreTrainedModel) -> str | None:
    """Whether a row behind another has the logits that it has alone, with this attention."""
    import torch

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    begins = torch.tensor([0, 3, 6], dtype=torch.int32, device=base.device)
    use_varlen(base)
    try:
        return sees_neighbour(
            base, {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": 3, "max_length_k": 3}
        )
    finally:
        base.set_attn_implementation(before)


def sees_neighbour(model: PeftModel | PreTrainedModel, layout: dict[str, Any]) -> str | None:
    """Whether a row of a line of two (3 tokens each) is computed otherwise for its neighbour or its place; None if not.

    layout  what the model is told of the line besides its tokens and position ids, which start again

    A row must keep its logits when only the row before it is another one (nothing is seen of it), and when the two
    change places (nor is a row behind another a continuation of it). All lines are of one shape, so that no kernel is
    chosen anew. Sums in another order differ by up to 3 % of the largest logit in 32 layers of bfloat16 (measured with
    random weights); a row that is seen changes logits by as much as they are large.
    """
    import torch

    was_training = model.training
    row, neighbour, stranger = [3, 1, 2], [1, 2, 0], [2, 3, 3]
    lines = torch.tensor([neighbour + row, stranger + row, row + neighbour], device=model.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device)
    model.eval()
    try:
        with torch.no_grad(), _rows_rounded_alone(model):
            behind, behind_another, before = (
                model(input_ids=line.unsqueeze(0), position_ids=positions, use_cache=False, **layout).logits[0].double()
                for line in lines
            )
            if not all(logits.isfinite().all() for logits in (behind, behind_another, before)):
                alone = model(input_ids=lines[:1, 3:], use_cache=False).logits
                if not alone.isfinite().all():
                    return None  # a base that is broken in itself shows nothing here; its first step says what it is
    except Exception as error:  # a model may do anything with arguments that it does not know
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"{type(model).__name__} does not take rows end to end: {said[0]}"
    finally:
        model.train(was_training)
    limit = 0.1 * before.abs().max()
    seen, moved = (behind - behind_another)[3:], behind - before.roll(3, 0)
    if not (seen.abs().max() <= limit and moved.abs().max() <= limit):
        return f"rows end to end see each other in {type(model).__name__}"
    return None


@contextmanager
def _rows_rounded_alone(model: torch.nn.Module) -> Iterator[None]:
    """LLM.int8 without its outliers: the columns that stay in 16 bit are chosen over the whole batch
    (bitsandbytes/backends, `int8_vectorwise_quant`), so that a row's rounding depends on its neighbours, by right."""
    states: list[Any] = [module.state for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def use_varlen(model: PeftModel | PreTrainedModel, on: bool = True) -> None:
    """Switch a loaded model, with its adapter or without, to this attention, or back to sdpa.

    Padded batches are computed as before; it is the arguments of a batch that say how it is laid out.
    """
    register()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(NAME if on else "sdpa")


def register() -> None:
    """Make the name known to transformers. Doing so again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


@dataclass
class LaterMask:
    """The mask that sdpa would need, made only if somebody does need it.

    The mask function is called before the layers are and knows nothing of `cu_seq_lens`. A mask of T × T for one line
    is what varlen attention is there to avoid, so it is promised instead, and made once for all layers on demand.
    """

    window: int | None
    """Tokens that a token sees, itself included; None if all before it."""
    make: Callable[[], torch.Tensor | None]
    _made: list[torch.Tensor | None] = field(default_factory=list)

    def mask(self) -> torch.Tensor | None:
        if not self._made:
            self._made.append(self.make())
        return self._made[0]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> torch.Tensor | LaterMask | None:
    """transformers' `sdpa_mask`, promised where the batch may be a line of rows: one line, no cache, only causal.

    A model that adds to the mask by a function of its own (`use_vmap`) gets it at once.
    """
    from transformers.masking_utils import sdpa_mask

    def make() -> torch.Tensor | None:
        made: torch.Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **others,
        )
        return made

    one_line = batch_size == 1 and q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    if one_line and attention_mask is None and not use_vmap and not allow_is_bidirectional_skip:
        return LaterMask(local_size, make)
    return make()


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | LaterMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer. query (1, heads, T, width), key and value with as many heads or fewer.

    Returns (1, T, heads, width). Rows end to end are taken for such only if mask, window and arguments say nothing that
    the kernels do not do; otherwise sdpa computes the layer with the whole mask, which is slower and as right.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # The layer's own window and the mask's must be the same thing (Llama 4's chunks are in the mask alone).
    promised = isinstance(attention_mask, LaterMask) and attention_mask.window == sliding_window
    plain = promised and not dropout and is_causal is not False
    asks_more = any(others.get(name) is not None for name in OWN_MEANING)
    if cu_seq_lens_q is not None and max_length_q is not None and plain and not asks_more:
        window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
        if query.is_cuda:
            return _on_gpu(query, key, value, cu_seq_lens_q, max_length_q, scaling, window), None
        return _row_by_row(query, key, value, cu_seq_lens_q, scaling, window), None
    whole = attention_mask.mask() if isinstance(attention_mask, LaterMask) else attention_mask
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, whole, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return result


def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begins: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """torch's fused attention for each row alone. (1, heads, T, width) → (1, T, heads, width).

    `split` and not slices: its backward pass is one concatenation, where every slice's is a tensor as long as the line.
    Against one call with a mask over the line, forward and backward of 2,048 tokens took 1/6 (rows of 300) to 1/13 (30
    and 128) on one core. Rows of equal length in one call would save another 5 to 15 % where all are equal, and cost
    copies where they are not.
    """
    import torch

    lengths = begins.diff().tolist()
    shared = query.shape[1] != key.shape[1]
    outputs = []
    rows = zip(*(torch.split(tensor, lengths, 2) for tensor in (query, key, value)), lengths, strict=True)
    for row_query, row_key, row_value, length in rows:
        band = _band(length, window, query.device) if window is not None and length > window else None
        output = torch.nn.functional.scaled_dot_product_attention(
            row_query,
            row_key,
            row_value,
            attn_mask=band,
            is_causal=band is None,
            scale=scaling,
            enable_gqa=shared,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a token of a row sees another: itself and the `window - 1` before it. (length, length)"""
    import torch

    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)


def _on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begins: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One call for the whole line. (1, heads, T, width) → (1, T, heads, width), in 16 bit.

    The kernel counts the tokens before a token, so a window of w is (w - 1, 0); (-1, 0) is all before it.
    """
    import torch

    if query.dtype == torch.float32 or key.dtype == torch.float32:
        # Rotary embeddings in float32 leave queries and keys so; torch's own sdpa is cast by autocast, a custom op not.
        dtype = value.dtype if value.dtype != torch.float32 else torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    arguments: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0) if window is None else (window - 1, 0)}
    if query.shape[1] != key.shape[1] and _asks_for_gqa():
        arguments["enable_gqa"] = True
    kernel = _varlen()
    assert kernel is not None
    line = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output: torch.Tensor = kernel(*line, begins, begins, longest, longest, **arguments)
    return output.unsqueeze(0)


@cache
def _varlen() -> Callable[..., Any] | None:
    """torch's function, if it can be told a window (2.10 could not)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


@cache
def _asks_for_gqa() -> bool:
    """Whether fewer key heads must be allowed by an argument (2.12); before, the kernel takes them as they are."""
    kernel = _varlen()
    return kernel is not None and "enable_gqa" in inspect.signature(kernel).parameters
