"""Small training jobs: a random Llama in a folder, chat rows, and the command lines of `ft train` and TRL's own CLI.

    python -m benchmarks.jobs FOLDER 25m

The tokenizer and the chat template are those of the shipped tiny base. As a command it writes a base, in a process of
its own, because that needs torch and the process that measures must not hold it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.measuring import ROOT, Line

TINY = ROOT / "data" / "samples" / "quickstart-base"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, RATE = 16, 32, 2e-4

SHAPES: dict[str, dict[str, int]] = {
    "25m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "1m": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""By name: a Llama of 25 million parameters, one of a billion, and one to see whether everything runs."""

TEXT = "the contract party shall pay notice term fee within thirty days after signing unless agreed otherwise"
WORDS = TEXT.split()


@dataclass(frozen=True)
class Job:
    """The same work for either trainer."""

    steps: int
    micro_batch: int
    length: int
    """The longest sequence, and the size of a pack, in tokens."""
    packing: bool = False
    quantization: Literal["none", "nf4"] = "none"
    recompute: bool | Literal["auto"] = False
    """Recompute all layers' activations in the backward pass; auto: as the trainer does by itself."""
    device: Literal["cpu", "cuda"] = "cpu"
    trl_bfloat16: bool = False
    """On a CPU, where ft computes in float32: have TRL load and compute in bfloat16."""


def write_base(folder: Path, shape: str) -> None:
    """A random base, in another process."""
    subprocess.run([sys.executable, "-m", "benchmarks.jobs", str(folder), shape], cwd=ROOT, check=True)


def write_rows(folder: Path, count: int = 2000, seed: int = 0) -> None:
    """Rows of one question and one answer: `rows.jsonl` for ft, `trl/rows.jsonl` as TRL's prompts and completions."""
    chance = random.Random(seed)
    (folder / "trl").mkdir()
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as ours, open(folder / "trl" / "rows.jsonl", "w") as trl:
        for _ in range(count):
            # Between a third and three times the middle: as uneven as chats are, so that padding costs what it does.
            question, answer = (
                {"role": role, "content": " ".join(chance.choices(WORDS, k=chance.randint(middle // 3, middle * 3)))}
                for role, middle in (("user", 12), ("assistant", 24))
            )
            ours.write(json.dumps({"messages": [question, answer]}) + "\n")
            trl.write(json.dumps({"prompt": [question], "completion": [answer]}) + "\n")


def ours(job: Job, folder: Path, base: Path) -> list[str]:
    """Write the config and say the command. JSON is YAML too."""
    config: dict[str, Any] = {
        "base": str(base),
        "data": [{"path": "rows.jsonl"}],
        "evaluation": {"split": 0},
        "quantization": job.quantization,
        "lora": {"rank": RANK, "alpha": ALPHA},
        "train": {
            "max_steps": job.steps,
            "learning_rate": RATE,
            "schedule": "constant",
            "warmup": 0.0,
            "micro_batch_size": job.micro_batch,
            "gradient_accumulation_steps": 1,
            "sequence_length": job.length,
            "packing": job.packing,
            "gradient_checkpointing": job.recompute,
            "log_every": 1,
        },
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(config, indent=1), "utf-8")
    return [sys.executable, "-m", "finetune.cli", "train", str(path), "--fresh", "--json"]


def trl(job: Job, folder: Path, base: Path) -> list[str]:
    """TRL's own command line: the same rows, batch, rank, targets, rate and dtype."""
    options: dict[str, Any] = {
        "model_name_or_path": base,
        "dataset_name": folder / "trl",
        "output_dir": folder / "trl-out",
        "use_peft": True,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "max_steps": job.steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": 1,
        "max_length": job.length,
        "packing": job.packing,
        "gradient_checkpointing": job.recompute is not False,  # which is its own default
        "use_cpu": job.device == "cpu",
        "bf16": job.device == "cuda" or job.trl_bfloat16,
        "dtype": "bfloat16" if job.device == "cuda" or job.trl_bfloat16 else "float32",
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if job.quantization == "nf4":
        options |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    command = (
        [sys.executable, "-m", "trl.cli", "sft"] if _has_main() else [str(Path(sys.executable).with_name("trl")), "sft"]
    )
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return [*command, "--lora_target_modules", *TARGETS]


@dataclass(frozen=True)
class Steps:
    """What a trainer's output says of its steps."""

    times: list[float]
    """When each was reported, in seconds after the start of the process."""
    losses: list[float]
    tokens: list[float]
    """All tokens trained on up to each step, padding left out, where the trainer says so; else empty."""

    @property
    def per_step(self) -> float | None:
        """Tokens of a step, the first left out; None where the trainer does not say."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def seconds(self) -> float:
        """A step without the first, which is slower everywhere."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


def steps_of_ours(lines: list[Line]) -> Steps:
    events = [(line.at, json.loads(line.text)) for line in lines if line.text.startswith("{")]
    logged = [(at, event) for at, event in events if event["event"] == "metrics" and "loss" in event]
    return Steps([at for at, _ in logged], [event["loss"] for _, event in logged], [])


def data_of_ours(lines: list[Line]) -> dict[str, Any]:
    """The event that says how many tokens, tokens with loss and sequences there are."""
    events = (json.loads(line.text) for line in lines if line.text.startswith("{"))
    found: dict[str, Any] = next(event for event in events if event["event"] == "data")
    return found


def amount_of_ours(lines: list[Line]) -> dict[str, int]:
    """How many tokens, tokens with loss and sequences there are."""
    data = data_of_ours(lines)
    return {key: data[key] for key in ("tokens", "supervised_tokens", "sequences")}


def error_of_ours(lines: list[Line]) -> str:
    """What ft said went wrong, if it did."""
    events = (json.loads(line.text) for line in lines if line.text.startswith("{"))
    return "; ".join(event["message"] for event in events if event["event"] == "error")


def messages_of_ours(lines: list[Line]) -> list[str]:
    """What ft said to the person: its estimate of memory and time among it."""
    events = (json.loads(line.text) for line in lines if line.text.startswith("{"))
    return [event["text"] for event in events if event["event"] in ("message", "warning")]


def steps_of_trl(lines: list[Line]) -> Steps:
    """transformers prints a dict a step, its numbers as text or as numbers, by version; `nan` and `inf` bare too."""
    found = []
    for line in lines:
        if not (line.text.startswith("{") and "'loss'" in line.text):
            continue
        literal = re.sub(r"(?<=: )(-?(?:nan|inf))(?=[,}])", r"'\1'", line.text)
        found.append((line.at, ast.literal_eval(literal)))
    return Steps(
        [at for at, _ in found],
        [float(logged["loss"]) for _, logged in found],
        [float(logged["num_tokens"]) for _, logged in found if "num_tokens" in logged],
    )


def _has_main() -> bool:
    """Whether `python -m trl.cli` works, which it does not in every version; there is the script then."""
    import importlib.util

    spec = importlib.util.find_spec("trl")
    places = list(spec.submodule_search_locations or []) if spec else []
    return any((Path(place) / "cli" / "__main__.py").is_file() for place in places)


def _write_base(folder: Path, shape: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = json.loads((TINY / "config.json").read_text("utf-8"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary["vocab_size"],
        num_key_value_heads=SHAPES[shape]["num_attention_heads"],
        max_position_embeddings=2048,
        eos_token_id=vocabulary["eos_token_id"],
        pad_token_id=vocabulary["pad_token_id"],
        bos_token_id=None,
        tie_word_embeddings=True,
        **SHAPES[shape],
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("shape", choices=SHAPES)
    chosen = parser.parse_args()
    _write_base(chosen.folder, chosen.shape)


if __name__ == "__main__":
    main()
