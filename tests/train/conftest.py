"""Small real models for training tests: made here, or lying in ../shared/assets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.prepare import PreparedData, prepare
from finetune.plan.estimate import as_written
from finetune.plan.setup import Fit
from finetune.runs.folder import RunFolder
from finetune.train.length import remembered

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
TINY = SAMPLES / "quickstart-base"


def tiny_config(tmp_path: Path, *, rows: int = 24, **overrides: object) -> Config:
    """A config on the shipped base and some of the shipped rows, small enough for a second of training."""
    lines = (SAMPLES / "contract-clauses.jsonl").read_text("utf-8").splitlines()[:rows]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines) + "\n", "utf-8")
    train = {
        "max_steps": 4,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "sequence_length": 256,
        "learning_rate": 1e-3,
        "log_every": 1,
        **overrides.pop("train", {}),  # type: ignore[dict-item]
    }
    values = {
        "base": str(TINY),
        "data": [{"path": str(data)}],
        "evaluation": {"split": 4, "samples": 1, "max_new_tokens": 8},
        "train": train,
        **overrides,
    }
    return Config.model_validate(values)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


@pytest.fixture
def console() -> Console:
    return Console()


def prepared(config: Config) -> PreparedData:
    return prepare(config, Path(config.base))


def fit_of(config: Config, run: RunFolder) -> Fit:
    """How `ft train` cuts a step on a CPU."""
    return remembered(config, run) or as_written(config, 99, "cpu")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the quickstart's tokenizer, so small that a step takes some milliseconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "base"
    config = json.loads((TINY / "config.json").read_text("utf-8"))
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(llama).to(torch.bfloat16).save_pretrained(folder)
    for path in TINY.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(path, folder / path.name)
    return folder


def random_qwen2(folder: Path, tokenizer: Path) -> Path:
    """A small random Qwen2 with a real tokenizer; saved as a user's base would be."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
    added = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    size = max(vocabulary, max(token["id"] for token in added) + 1)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder
