"""How long a newcomer waits: from typing `ft train` to the first step, and to the end, of a small job.

    .venv/bin/python benchmarks/first_step.py --repeat 5

The job: 20 steps of LoRA on the shipped tiny Llama, 2,000 chat rows of about 60 tokens, CPU. Beside it, in
turn with it, a process that only imports what training needs: the part that no trainer on this stack can avoid.
Prints the median of each, and of their ratio pair by pair, and writes benchmarks/results/first_step.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
IMPORTS = (
    "import torch, transformers; from transformers import AutoModelForCausalLM; from trl import SFTConfig, SFTTrainer"
)
WORDS = "the contract party shall pay notice term fee within thirty days after signing unless agreed otherwise"


def write_job(folder: Path) -> Path:
    """2,000 rows of one question and one answer, and a config for 20 steps."""
    chance = random.Random(0)
    words = WORDS.split()
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(2000):
            question, answer = (" ".join(chance.choices(words, k=count)) for count in (12, 24))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    config = {
        "base": str(ROOT / "data" / "samples" / "quickstart-base"),
        "data": [{"path": "rows.jsonl"}],
        "evaluation": {"split": 0},
        "quantization": "none",
        "train": {"max_steps": 20, "sequence_length": 256, "micro_batch_size": 4, "gradient_accumulation_steps": 1},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path


def run_job(config: Path) -> tuple[float, float]:
    """Seconds to the first step's metrics, and to the end of the process."""
    command = [sys.executable, "-m", "finetune.cli", "train", str(config), "--fresh", "--json"]
    began = time.monotonic()
    first = float("nan")
    with subprocess.Popen(command, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if first != first and json.loads(line)["event"] == "metrics":
                first = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"ft train failed with exit code {process.returncode}")
    return first, time.monotonic() - began


def run_imports() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="pairs to run, after one that is not counted")
    repeat = parser.parse_args().repeat
    firsts, totals, imports = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        config = write_job(Path(folder))
        run_job(config), run_imports()
        for _ in range(repeat):
            first, total = run_job(config)
            firsts.append(first)
            totals.append(total)
            imports.append(run_imports())
    ratios = [first / alone for first, alone in zip(firsts, imports, strict=True)]
    result = {
        "pairs": repeat,
        "first_step_seconds": round(statistics.median(firsts), 2),
        "whole_process_seconds": round(statistics.median(totals), 2),
        "imports_alone_seconds": round(statistics.median(imports), 2),
        "first_step_over_imports": round(statistics.median(ratios), 2),
    }
    for name, value in result.items():
        print(f"{name:<26} {value}")
    path = ROOT / "benchmarks" / "results" / "first_step.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**result, "python": sys.version.split()[0]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
