"""How fast base + adapter become a quantised GGUF file, against PEFT's merge and the `gguf` package's quantiser.

    .venv/bin/python benchmarks/quantize.py --tokenizer ../shared/assets/models/stories260K --repeat 3

The model: random weights in bfloat16 with TinyLlama's shape (1.07 billion, 2048 wide, 22 layers) and a LoRA adapter of
rank 16 on every linear layer. Each way in a process of its own, in turn, timed after its imports:

    q8_0, q4_k_m   `convert(merged_model(…))`: merged and quantised tensor by tensor, no 16-bit copy on disk
    peft           PEFT's `merge_and_unload`, `save_pretrained`, then every matrix through `gguf.quants.quantize` (q8_0)
                   into a file

`inside` is the CPU time of the threads in ggml's function as a share of all CPU time; `cores` the CPU time per second.
Wall times are medians; the ratio is the median of the pairs. Writes benchmarks/results/quantize.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path, tokenizer: Path) -> None:
    """Write `base` and `adapter`. The vocabulary is the tokenizer's, filled up to 32,000 rows."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.LlamaConfig(vocab_size=32_000, **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    for file in tokenizer.glob("*token*"):
        shutil.copyfile(file, folder / "base" / file.name)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LAYERS, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.01)
    wrapped.save_pretrained(folder / "adapter")


def ours(folder: Path, quant: Literal["q8_0", "q4_k_m"]) -> dict[str, float]:
    import torch
    import transformers  # noqa: F401

    from finetune.export.gguf import convert
    from finetune.export.merged import merged_model
    from finetune.llamacpp import quantize

    inside = _Clock(quantize._tested_chunk())
    quantize._tested_chunk = lambda: inside
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def work() -> None:
        base = folder / "base"
        convert(merged_model(base, folder / "adapter", tokenizer=base, dtype=None), folder / "out.gguf", quant=quant)

    spent = timed(work)
    return spent | {"inside": inside.seconds / spent["cpu"]}


class _Clock:
    """A function that adds up its threads' CPU time."""

    def __init__(self, function: Callable[..., int]) -> None:
        self.function, self.seconds, self.lock = function, 0.0, threading.Lock()

    def __call__(self, *arguments: Any) -> int:
        started = time.thread_time()
        result = self.function(*arguments)
        with self.lock:
            self.seconds += time.thread_time() - started
        return result


def peft_and_gguf(folder: Path) -> dict[str, float]:
    import gguf
    import numpy
    import peft
    import torch
    import transformers
    from safetensors import safe_open

    def work() -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        merged.save_pretrained(folder / "merged")
        del model, merged
        with safe_open(folder / "merged" / "model.safetensors", "pt") as tensors, (folder / "out").open("wb") as out:
            for name in tensors.keys():  # noqa: SIM118
                values: numpy.ndarray[Any, Any] = tensors.get_tensor(name).float().numpy()
                if values.ndim > 1:
                    values = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                out.write(values.data)
            out.flush()
            os.fsync(out.fileno())

    return timed(work)


def timed(work: Callable[[], None]) -> dict[str, float]:
    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    wall, before = time.perf_counter(), cpu()
    work()
    wall, used = time.perf_counter() - wall, cpu() - before
    return {"wall": wall, "cpu": used, "cores": used / wall, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The most memory this process has had (Linux). Not `ru_maxrss`, which begins with the parent's."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


WAYS: dict[str, Callable[[Path], dict[str, float]]] = {
    "q8_0": lambda folder: ours(folder, "q8_0"),
    "q4_k_m": lambda folder: ours(folder, "q4_k_m"),
    "peft": peft_and_gguf,
}


def in_a_process(way: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--in", str(folder), "--tokenizer", "unused"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    for made in ("out.gguf", "out"):
        (folder / made).unlink(missing_ok=True)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--in", dest="folder", type=Path)
    chosen = parser.parse_args()
    if chosen.way:
        print(json.dumps(WAYS[chosen.way](chosen.folder)))
        return
    runs: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), chosen.tokenizer)
        for _ in range(chosen.repeat):
            runs.append({})
            for way in WAYS:
                runs[-1][way] = in_a_process(way, Path(name))
                print(way, {key: round(value, 2) for key, value in runs[-1][way].items()}, flush=True)
    result: dict[str, Any] = {"repeat": chosen.repeat, "load": os.getloadavg()[1]}
    for way in WAYS:
        result[way] = {key: round(statistics.median(run[way][key] for run in runs), 3) for key in runs[0][way]}
    for what in ("wall", "cpu"):
        ratios = [run["q8_0"][what] / run["peft"][what] for run in runs]
        result[f"{what} of q8_0 / peft"] = round(statistics.median(ratios), 3)
    print(json.dumps(result, indent=2))
    path = ROOT / "benchmarks" / "results" / "quantize.json"
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
