"""Export a small model of every family in every quantisation, run it in llama.cpp, and write docs/export.md's table.

    .venv/bin/python scripts/export_table.py

Each cell is the mean Kullback-Leibler divergence, in nats, of the file in llama.cpp from the model in transformers
(float32), over the positions of a few sequences. Takes a few minutes on two cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from finetune.export.gguf import Quant, convert
from finetune.export.gguf.families import FAMILIES
from finetune.export.source import open_model
from finetune.export.verify.metrics import Logits, distance, joined
from finetune.export.verify.streamed import StreamedModel
from finetune.llamacpp.logits import Scorer

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
BEGIN, END = "<!-- made by scripts/export_table.py -->\n", "<!-- end -->\n"
VOCABULARY = 512
QUANTS: tuple[Quant, ...] = get_args(Quant)

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Rows of 256 and 512, so that every type of block fits."""

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}

MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": None},
    "MixtralForCausalLM": {"num_local_experts": 8, "sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": MOE,
    "Qwen3ForCausalLM": {"head_dim": 64},
    "Qwen3MoeForCausalLM": MOE | {"head_dim": 64, "norm_topk_prob": True},
    "Gemma2ForCausalLM": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "Gemma3ForCausalLM": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "Phi3ForCausalLM": {"sliding_window": None},
    "FalconForCausalLM": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "GPTNeoXForCausalLM": {},
}
"""transformers architecture → what its configuration needs beside SHAPE."""


def make_model(architecture: str, folder: Path) -> None:
    """Save a random model, its norms shaken so that they count, and a byte-level tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    known = model_class.config_class()
    values = SHAPE | MODELS[architecture]
    config = model_class.config_class(
        **{k: v for k, v in values.items() if hasattr(known, k) or k in known.attribute_map}
    )
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    _save_tokenizer(folder)


def distances(architecture: str, quants: Sequence[Quant], folder: Path) -> dict[Quant, float]:
    """Quantisation → mean divergence of the file in llama.cpp from the model in transformers."""
    make_model(architecture, folder / "model")
    model = open_model(folder / "model")
    sequences = [[(7 * step * step + 3 * start) % VOCABULARY for step in range(64)] for start in range(4)]
    expected = StreamedModel(model, None, device="cpu").logits(sequences)
    return {quant: _distance(architecture, quant, folder, sequences, expected) for quant in quants}


def _distance(
    architecture: str, quant: Quant, folder: Path, sequences: Sequence[Sequence[int]], expected: Sequence[Logits]
) -> float:
    path = folder / f"{quant}.gguf"
    convert(open_model(folder / "model"), path, quant=quant, name=architecture)
    with Scorer(path, context=128) as scorer:
        found = joined(distance(p, scorer.logits(ids)) for ids, p in zip(sequences, expected, strict=True))
    path.unlink()
    return found.mean


def _save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of all bytes and one merge, which every family's file can carry."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {character: index + 1 for index, character in enumerate(alphabet)}
    vocabulary["th"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def table(found: dict[str, dict[Quant, float]]) -> str:
    """The table in Markdown: a row for each quantisation, a column for each family."""
    names = [name.removesuffix("ForCausalLM") for name in found]
    lines = ["| nats | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for quant in QUANTS:
        lines.append(f"| {quant} | " + " | ".join(f"{cells[quant]:.1g}" for cells in found.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    assert set(MODELS) == set(FAMILIES)
    found = {}
    for number, architecture in enumerate(MODELS):
        print(f"{number + 1}/{len(MODELS)} {architecture}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            found[architecture] = distances(architecture, QUANTS, Path(folder))
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(found) + END + after, "utf-8")


if __name__ == "__main__":
    main()
