"""How long a merge takes and how much memory, against PEFT's own and against copying the base.

    .venv/bin/python benchmarks/merge.py --sizes 0.5B 1B --repeat 3
    .venv/bin/python benchmarks/merge.py --sizes 3B 8B --ways ours cp --repeat 1

Random bf16 Llamas, written tensor by tensor, and a LoRA of rank 16 on all their linear layers. Each way runs in a
process of its own, in turn, imports included, on files that were read before:

    ours  `finetune.export.merge.merge`, to synced files
    peft  load, `merge_and_unload`, `save_pretrained`, then sync what it wrote, with torch's own number of threads
    cp    `cp` of the base and a sync

Wall and CPU seconds are medians; ratios are medians of the pairs. Peak memory is the process's `ru_maxrss`. `same` says
whether every tensor has the bits that PEFT's has. Writes benchmarks/results/merge.json. Needs three times the model's
size on the disk of `--folder`, and twice in memory for PEFT.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RANK = 16

SIZES: dict[str, dict[str, int]] = {
    "0.5B": {"hidden": 1024, "layers": 30, "inner": 3520, "heads": 16, "kv": 16, "vocab": 32_000},
    "1B": {"hidden": 2048, "layers": 22, "inner": 5632, "heads": 32, "kv": 4, "vocab": 32_000},
    "3B": {"hidden": 3072, "layers": 28, "inner": 8192, "heads": 24, "kv": 8, "vocab": 64_000},
    "8B": {"hidden": 4096, "layers": 32, "inner": 14_336, "heads": 32, "kv": 8, "vocab": 128_256},
}


def shapes(size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner = size["hidden"], size["inner"]
    kv = hidden // size["heads"] * size["kv"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size["vocab"], hidden)}
    for layer in range(size["layers"]):
        name = f"model.layers.{layer}"
        for part, shape in (("q", (hidden, hidden)), ("k", (kv, hidden)), ("v", (kv, hidden)), ("o", (hidden, hidden))):
            found[f"{name}.self_attn.{part}_proj.weight"] = shape
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            found[f"{name}.mlp.{part}_proj.weight"] = shape
        found[f"{name}.input_layernorm.weight"] = found[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (size["vocab"], hidden)}


def write_model(folder: Path, size: dict[str, int]) -> None:
    """A random base and adapter."""
    import torch
    from safetensors.torch import save_file

    from finetune.export.safetensors_io import CheckpointWriter, TensorInfo

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    planned = [TensorInfo(name, "BF16", shape) for name, shape in shapes(size).items()]
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(2**22).normal_(0, 0.02, generator=generator).to(torch.bfloat16)
    with CheckpointWriter(base, planned) as writer:
        for number, tensor in enumerate(writer.order):
            count, done = math.prod(tensor.shape), 0
            while done < count:
                piece = noise.roll(number * 7919 + done)[: count - done]
                done += writer.write_at(tensor.name, done * 2, piece) // 2
    lora = {}
    for name, shape in shapes(size).items():
        if "_proj" in name:
            key = "base_model.model." + name.removesuffix(".weight")
            lora[f"{key}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.02
            lora[f"{key}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.02
    save_file(lora, adapter / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": size["vocab"],
        "hidden_size": size["hidden"], "intermediate_size": size["inner"], "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"], "num_key_value_heads": size["kv"], "tie_word_embeddings": False,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer.json").write_text("{}")


def ours(base: Path, adapter: Path, out: Path) -> None:
    from finetune.export.merge import merge

    merge(base, adapter, out, tokenizer=base, dtype=None)


def peft(base: Path, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    sync(out)


def cp(base: Path, adapter: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    sync(out)


def sync(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {"ours": ours, "peft": peft, "cp": cp}


def in_a_process(way: str, folder: Path) -> dict[str, float]:
    """Wall and CPU seconds of a whole process, and the most memory that it held."""
    out = folder / way
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, __file__, "--way", way, "--folder", str(folder)], env=environment, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{way} ended with {child.returncode}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


def same_bits(one: Path, other: Path) -> bool:
    import torch

    from finetune.export.safetensors_io import open_checkpoint

    left, right = open_checkpoint(one), open_checkpoint(other)
    return set(left.tensors) == set(right.tensors) and all(
        torch.equal(mine, theirs)
        for name in left.tensors
        for mine, theirs in zip(left.chunks(name), right.chunks(name), strict=True)
    )


def compare(size: str, ways: list[str], repeat: int, where: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        # In a process of its own: a child's peak begins with what its parent holds, so this one loads nothing.
        command = [sys.executable, __file__, "--write", size, "--folder", name]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, check=True)
        parameters = sum(math.prod(shape) for shape in shapes(SIZES[size]).values())
        runs: list[dict[str, dict[str, float]]] = []
        for number in range(repeat):
            # The other way round every second time: what one leaves to the disk, the next one waits for.
            order = ways if number % 2 == 0 else ways[::-1]
            runs.append({way: in_a_process(way, folder) for way in order})
            for way, run in runs[-1].items():
                print(size, way, {key: round(value, 2) for key, value in run.items()}, flush=True)
        command = [sys.executable, __file__, "--same", "--folder", name]
        found = (
            subprocess.run(command, env=environment, check=True, capture_output=True).stdout
            if "peft" in ways
            else "null"
        )
        same = json.loads(found)
    result: dict[str, Any] = {"size": size, "parameters": parameters, "repeat": repeat, "same": same}
    for way in ways:
        result[way] = {key: round(statistics.median(run[way][key] for run in runs), 2) for key in runs[0][way]}
    for other in ways:
        if other != "ours":
            ratios = [run["ours"]["wall"] / run[other]["wall"] for run in runs]
            result[f"wall of ours / {other}"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5B", "1B"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--write", choices=SIZES)
    parser.add_argument("--same", action="store_true")
    chosen = parser.parse_args()
    if chosen.write:
        write_model(chosen.folder, SIZES[chosen.write])
        return
    if chosen.same:
        print(json.dumps(same_bits(chosen.folder / "ours", chosen.folder / "peft")))
        return
    if chosen.way:
        WAYS[chosen.way](chosen.folder / "base", chosen.folder / "adapter", chosen.folder / chosen.way)
        return
    path = ROOT / "benchmarks" / "results" / "merge.json"
    results = {entry["size"]: entry for entry in (json.loads(path.read_text("utf-8")) if path.is_file() else [])}
    for size in chosen.sizes:
        results[size] = compare(size, chosen.ways, chosen.repeat, chosen.folder)
        print(json.dumps(results[size], indent=2), flush=True)
    path.write_text(json.dumps([results[size] for size in SIZES if size in results], indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
