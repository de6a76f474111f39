"""What QLoRA training saw of a base: its linear weights through 4-bit NormalFloat and back.

A LoRA that was trained on a quantised base has learned to make up for that base's rounding; put onto the 16-bit
weights, it makes up for errors that are not there. Which of the two is nearer is to be measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune.errors import BaseError, MissingExtraError
from finetune.model.families import quantisable_class

if TYPE_CHECKING:
    import torch

BLOCKSIZE = 64
"""Weights that share a scale; the scales are quantised in turn (double quantisation, arXiv:2305.14314)."""


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as a model loaded in NF4 computes with it. On the CPU; float32, bfloat16 or float16, as the result.

    The same two library calls as `bitsandbytes.nn.Params4bit` and its forward make. The scales' own scale depends on
    the whole weight, so this cannot be done in blocks. Raises MissingExtraError without bitsandbytes.
    """
    functional = _bitsandbytes()
    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
    )
    restored: torch.Tensor = functional.dequantize_4bit(codes, quant_state=state)
    return restored.to(weight.dtype)


def quantised_modules(config: Mapping[str, Any]) -> frozenset[str]:
    """The live names of the modules that loading a base of this configuration in NF4 quantises.

    Asked of transformers itself, with a model that has shapes and no weights: all linear layers but the output layer,
    what is tied to it and what the family keeps in float32. Fused experts are no linear layers. Raises BaseError for a
    configuration that transformers does not know.
    """
    _bitsandbytes()
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig, BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    values = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        known = AutoConfig.for_model(**values)
        with torch.device("meta"):
            model_class = quantisable_class(known)
            model = getattr(model_class, "from_config", model_class)(known)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseError(f"`model_type` {config.get('model_type')!r} cannot be loaded: {error}") from error
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, skipped, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    return frozenset(name for name, module in model.named_modules() if isinstance(module, Linear4bit))


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingExtraError(
            "bitsandbytes is not installed, and it does the 4-bit rounding", hint="`pip install bitsandbytes`"
        ) from error
    return functional
