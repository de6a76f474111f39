"""The base model in memory, quantised as the config says, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.schema import Config
from finetune.errors import BaseError, TrainingError
from finetune.model.families import quantisable_class
from finetune.model.hardware import Hardware
from finetune.model.memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and what it runs on. `model` is a PeftModel once an adapter is on it."""

    model: PreTrainedModel
    hardware: Hardware


def load_base(config: Config, folder: Path, hardware: Hardware) -> LoadedModel:
    """Load the base from a folder with config.json and safetensors.

    nf4 means: 4-bit NormalFloat with double quantisation (arXiv 2305.14314), computing in the hardware's own dtype;
    the library's defaults are fp4, float32 and no double quantisation. Nothing in the folder is executed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        described = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        quantised = config.quantization != "none"
        model = (quantisable_class(described) if quantised else AutoModelForCausalLM).from_pretrained(
            str(folder),
            dtype=hardware.torch_dtype(),
            quantization_config=_quantization(config, hardware),
            device_map={"": 0 if hardware.device == "cuda" else "cpu"},
            attn_implementation=_attention(described),
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except Exception as error:  # whatever a config.json can say makes the library raise whatever there is
        if is_out_of_memory(error):
            raise TrainingError(
                f"the base does not fit into the memory of {hardware.name}",
                place=config.base,
                hint="use a smaller base, or quantization: nf4",
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise BaseError(
            f"cannot be loaded: {reason}", place=config.base, hint="log.txt has the whole message"
        ) from error
    _keep_trainable_on_cpu(model)
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return LoadedModel(model, hardware)


def _attention(config: PretrainedConfig) -> str:
    """torch's fused attention, or the model's own where that cannot do what the model needs (Gemma 2 caps its scores).

    Neither keeps the packed rows of every family apart: `model/kernels/layout.py` tries that on the model.
    """
    from transformers import AutoModelForCausalLM

    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "sdpa" if model_class is None or model_class._supports_sdpa else "eager"


def _quantization(config: Config, hardware: Hardware) -> Any:
    from transformers import BitsAndBytesConfig

    if config.quantization == "none":
        return None
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.torch_dtype(),
    )


def _keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 the first forward pass in eval mode would repack them, and every later training step would
    silently get no gradient through the base (seen with bitsandbytes 0.50; a test trains, evaluates and trains again).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
