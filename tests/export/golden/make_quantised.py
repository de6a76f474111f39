"""Makes quantised.json: what llama.cpp's own quantiser makes of small GGUF files, tensor by tensor.

    python -m tests.export.golden.make_quantised PROGRAM

PROGRAM quantises: `PROGRAM in.gguf out.gguf NUMBER`, NUMBER being the `llama_ftype`. It is the few lines

    #include "llama.h"
    #include <cstdlib>
    int main(int, char ** argv) {
        llama_backend_init();
        auto settings = llama_model_quantize_default_params();
        settings.ftype = (llama_ftype) atoi(argv[3]);
        return llama_model_quantize(argv[1], argv[2], &settings);
    }

linked with llama.cpp 0.5.0 (ggml 0.25.3, from the source package llama-cpp-python 0.3.36), compiled by GCC 12 on x86-64
with -O3 -DGGML_NATIVE=OFF. llama.cpp chooses encodings from the tensors' names and rows and from a few keys, so the
files have no tokenizer and the matrices few rows: `models` lists them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from finetune.export.gguf.mix import QUANTS, ModelShape

GOLDEN = Path(__file__).with_name("quantised.json")

LETTERS = {
    "f32": "F", "f16": "H", "bf16": "B", "q8_0": "8", "q4_0": "4", "q4_1": "d", "q5_0": "5", "q5_1": "e",
    "q2_k": "J", "q3_k": "K", "q4_k": "L", "q5_k": "M", "q6_k": "N", "iq4_nl": "n", "iq4_xs": "x",
}  # fmt: skip
"""One letter per tensor, see `spell`."""


@dataclass(frozen=True)
class Model:
    """A file to quantise."""

    shape: ModelShape
    width: int
    """Weights per row."""
    tied: bool = False
    tall: bool = False
    """Matrices of 16 rows, of which the digests are kept, rather than of 2."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        rows = 16 if self.tall else 2
        matrix, vector = (rows, self.width), (self.width,)
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": matrix, "output_norm.weight": vector}
        if not self.tied:
            found["output.weight"] = matrix
        joint = self.shape.architecture in ("falcon", "phi3", "gptneox")
        for layer in range(self.shape.layers):
            block = {"attn_norm.weight": vector, "attn_output.weight": matrix}
            block |= {f"attn_{part}.weight": matrix for part in (["qkv"] if joint else "qkv")}
            if self.shape.architecture == "qwen2":
                block |= {f"attn_{part}.bias": vector for part in "qkv"}
            if self.shape.architecture == "gemma3":
                block |= {"attn_q_norm.weight": vector, "post_ffw_norm.weight": vector}
            if self.shape.experts:
                block["ffn_gate_inp.weight"] = (self.shape.experts, self.width)
                block |= {f"ffn_{part}_exps.weight": (self.shape.experts, *matrix) for part in ("gate", "down", "up")}
            else:
                parts = ["down", "up"] + (["gate"] if not joint else [])
                block |= {f"ffn_{part}.weight": matrix for part in parts}
            found |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        return found

    def keys(self) -> dict[str, Any]:
        """What llama.cpp insists on reading before it quantises."""
        plain = {
            "context_length": 64, "embedding_length": self.width, "block_count": self.shape.layers,
            "feed_forward_length": self.width, "attention.head_count": self.shape.heads,
            "attention.head_count_kv": self.shape.kv_heads, "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8, "attention.sliding_window": 32,
            "use_parallel_residual": True, "attention.key_length": 8, "attention.value_length": 8,
        }  # fmt: skip
        if self.shape.experts:
            plain |= {"expert_count": self.shape.experts, "expert_used_count": 2, "expert_feed_forward_length": 256}
        return {f"{self.shape.architecture}.{key}": value for key, value in plain.items()}


MODELS: dict[str, Model] = {
    "llama": Model(ModelShape("llama", 3, 8, 2, 0), 256, tall=True),
    "llama of 16 layers": Model(ModelShape("llama", 16, 8, 2, 0), 256),
    "llama tied, a key head for each query head": Model(ModelShape("llama", 9, 8, 8, 0), 256, tied=True),
    "llama 70B": Model(ModelShape("llama", 80, 64, 8, 0), 256),
    "llama 65B": Model(ModelShape("llama", 80, 64, 64, 0), 256),
    "qwen2 72B": Model(ModelShape("qwen2", 80, 64, 8, 0), 256),
    "qwen2 tied, three queries a key": Model(ModelShape("qwen2", 24, 12, 4, 0), 256, tied=True),
    "qwen3": Model(ModelShape("qwen3", 28, 16, 8, 0), 512),
    "gemma3": Model(ModelShape("gemma3", 26, 4, 1, 0), 256, tied=True),
    "phi3": Model(ModelShape("phi3", 32, 32, 8, 0), 256),
    "gptneox": Model(ModelShape("gptneox", 6, 8, 8, 0), 256),
    "falcon": Model(ModelShape("falcon", 32, 71, 1, 0), 256),
    "falcon tied": Model(ModelShape("falcon", 17, 8, 8, 0), 256, tied=True),
    "mixtral": Model(ModelShape("llama", 32, 32, 8, 8), 256),
    "four experts": Model(ModelShape("llama", 10, 8, 2, 4), 256),
    "qwen3moe": Model(ModelShape("qwen3moe", 48, 32, 4, 128), 256),
    "qwen2moe": Model(ModelShape("qwen2moe", 24, 16, 16, 60), 256, tied=True),
    "rows of 288": Model(ModelShape("llama", 4, 8, 2, 0), 288, tall=True),
    "rows of 288, tied": Model(ModelShape("llama", 4, 8, 8, 0), 288, tied=True),
    "rows of 172": Model(ModelShape("llama", 4, 4, 2, 0), 172),
    "rows of 172, tied": Model(ModelShape("llama", 4, 4, 2, 0), 172, tied=True),
}


def weights(name: str, shape: tuple[int, ...]) -> numpy.ndarray[Any, Any]:
    """float32 values that every machine makes alike: bell-shaped, exact multiples of 2**-12, from the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    parts = numpy.random.RandomState(seed).randint(-64, 65, size=(4, *shape))
    return (parts.sum(axis=0) / 4096).astype(numpy.float32)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def spell(kinds: Mapping[str, str]) -> str:
    """Tensor → encoding as text: a letter for each, sorted by name, a word for the tensors in no layer and one for each
    layer; `3*FHH` for three layers alike."""
    words: dict[str, str] = {}
    for name in sorted(kinds):
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        words[layer] = words.get(layer, "") + LETTERS[kinds[name]]
    rest = words.pop("")
    runs = [(word, len(list(run))) for word, run in itertools.groupby(words[str(i)] for i in range(len(words)))]
    return " ".join([rest, *(f"{count}*{word}" for word, count in runs)])


def _write(model: Model, path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, model.shape.architecture)
    for key, value in model.keys().items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, shape in model.tensors().items():
        writer.add_tensor(name, weights(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(program: str) -> None:
    from gguf import GGUFReader

    spelt: dict[str, dict[str, str]] = {}
    digests: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, model in MODELS.items():
            source, out = Path(folder, "source.gguf"), Path(folder, "out.gguf")
            _write(model, source)
            spelt[title] = {}
            for quant, (_, number) in QUANTS.items():
                subprocess.run([program, source, out, str(number)], check=True, capture_output=True)
                made = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
                kinds = {name: tensor.tensor_type.name.lower() for name, tensor in made.items()}
                spelt[title][quant] = spell(kinds)
                for name, tensor in made.items():
                    if model.tall and not name.startswith(("blk.1.", "blk.2.", "blk.3.")):
                        digests.setdefault(f"{model.width}/{name}", {})[kinds[name]] = digest(tensor.data.tobytes())
    GOLDEN.write_text(json.dumps({"encodings": spelt, "digests": digests}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
