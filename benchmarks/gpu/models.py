"""Models with the shape of real ones and random weights, built on the device, quantised layer by layer.

Speed and memory do not depend on the values of weights. There are no files, and never a 16-bit copy of the whole: at
most one linear layer is in 16 bit while bitsandbytes turns it into nf4, as it does when it loads a real base.
"""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.jobs import TINY, TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

Quantization = Literal["nf4", "none"]

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
_MISTRAL = {"model_type": "mistral", "rms_norm_eps": 1e-5, "sliding_window": None}
_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "use_sliding_window": False}


def _sized(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": _LLAMA | _sized(4096, 14336, 32, 32, 8, 128256, False),
    "mistral-7b": _MISTRAL | _sized(4096, 14336, 32, 32, 8, 32768, False),
    "qwen2.5-7b": _QWEN2 | _sized(3584, 18944, 28, 28, 4, 152064, False),
    "llama3.2-3b": _LLAMA | _sized(3072, 8192, 28, 24, 8, 128256, True),
    "llama3.2-1b": _LLAMA | _sized(2048, 8192, 16, 32, 8, 128256, True),
    "qwen2.5-1.5b": _QWEN2 | _sized(1536, 8960, 28, 12, 2, 151936, True),
    # For correctness: large enough for every kernel, small enough for a reference in float32.
    "small-llama": _LLAMA | _sized(512, 1408, 4, 8, 4, 2048, False),
    "small-mistral": _MISTRAL | _sized(512, 1408, 4, 8, 2, 2048, False) | {"sliding_window": 96},
    "small-qwen2": _QWEN2 | _sized(512, 1408, 4, 8, 2, 2048, True),
    # To see on a CPU whether everything runs.
    "tiny": _LLAMA | _sized(128, 256, 4, 4, 2, 2048, False),
}
"""The facts of config.json, as the models of these names have them on the Hub (rotary bases left at the default)."""


@dataclass(frozen=True)
class Device:
    """What is measured on."""

    name: Literal["cuda", "cpu"]
    tiny: bool
    """Small shapes and few steps, to see whether everything runs. Such numbers mean nothing."""

    def shape(self, name: str) -> str:
        """The shape of this name, or the tiny one."""
        return "tiny" if self.tiny else name

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.name == "cuda" else torch.float32

    def synchronize(self) -> None:
        import torch

        if self.name == "cuda":
            torch.cuda.synchronize()

    def peak(self, *, reset: bool = False) -> int:
        """Peak bytes of tensors on the GPU since the last reset; 0 on a CPU, where nobody counts them."""
        import torch

        if self.name == "cpu":
            return 0
        peak = int(torch.cuda.max_memory_allocated())
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak

    def reserved(self) -> int:
        """Peak bytes that torch's allocator has taken from the GPU, what it kept for later included."""
        import torch

        return 0 if self.name == "cpu" else int(torch.cuda.max_memory_reserved())

    def outside(self) -> int:
        """Bytes of the GPU that are taken, but not by torch's allocator: context, kernels, libraries."""
        import torch

        if self.name == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info()
        return int(total - free - torch.cuda.memory_reserved())

    def clear(self) -> None:
        """Give back what nobody holds any more."""
        import torch

        gc.collect()
        if self.name == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def facts(shape: str) -> dict[str, Any]:
    """config.json of a shape."""
    known = json.loads((TINY / "config.json").read_text("utf-8"))
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[SHAPES[shape]["model_type"]]
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "dtype": "bfloat16",
        "eos_token_id": known["eos_token_id"],
        "pad_token_id": known["pad_token_id"],
        "bos_token_id": None,
        **SHAPES[shape],
    }


def write_folder(folder: Path, shape: str) -> Path:
    """A base without weights: config.json and the tiny tokenizer, which has fewer tokens than there is room for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts(shape), indent=1), "utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY / name, folder / name)
    return folder


def build(shape: str, quantization: Quantization, device: Device, *, seed: int = 0) -> Any:
    """A model as `model.base.load_base` leaves it: frozen, on the device, its linear layers quantised."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    values = facts(shape)
    config = AutoConfig.for_model(**values)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=device.dtype, attn_implementation="sdpa")
    generator = torch.Generator(device.name).manual_seed(seed)
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and child is not head and quantization == "nf4":
                setattr(module, name, _quantised(child, device, generator))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module.register_parameter(name, _filled(parameter, device, generator))
    model.tie_weights()
    model.to(device.name)  # only buffers are still elsewhere
    if quantization == "nf4":
        _mark_quantised(model, device)
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _filled(parameter: torch.nn.Parameter, device: Device, generator: torch.Generator) -> torch.nn.Parameter:
    import torch

    values = torch.empty(parameter.shape, dtype=device.dtype, device=device.name)
    if parameter.ndim == 1:
        values.normal_(1.0, 0.05, generator=generator)  # norms; biases of the same size do no harm
    else:
        values.normal_(0.0, 0.02, generator=generator)
    return torch.nn.Parameter(values, requires_grad=False)


def _quantised(linear: torch.nn.Linear, device: Device, generator: torch.Generator) -> torch.nn.Module:
    """A random nf4 layer with double quantisation, of the shape of a linear layer that has no weights yet."""
    import bitsandbytes as bnb
    import torch

    made: torch.nn.Module = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=device.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = torch.empty(linear.weight.shape, dtype=device.dtype, device=device.name)
    weight.normal_(0.0, 0.02, generator=generator)
    packed = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made)
    made.weight = packed.to(device.name)
    made.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # as model/base.py does, and for its reason
    if linear.bias is not None:
        made.bias = _filled(linear.bias, device, generator)
    return made


def _mark_quantised(model: Any, device: Device) -> None:
    """What loading a quantised model leaves on it, and what trainers and PEFT look for."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device.dtype,
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    model.config.quantization_config = settings
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.hf_device_map = {"": 0 if device.name == "cuda" else "cpu"}  # or accelerate would move what is quantised
    model.is_quantized = model.is_loaded_in_4bit = True
