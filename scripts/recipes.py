"""Write into each recipe, and into recipes/README.md, what the plan says of its memory.

    .venv/bin/python -m scripts.recipes

The worst case: all sequences as long as the recipe allows, each of one row, loss on every token; the step as written,
every layer recomputed, with the kernels that a card of the recipe's size has.
"""

from __future__ import annotations

import re
import tempfile
import textwrap
from pathlib import Path

from finetune.config.load import load
from finetune.config.schema import Config
from finetune.plan.bases import shape_for
from finetune.plan.estimate import expected_kernels, setup_of
from finetune.plan.gpus import card_of_vram
from finetune.plan.memory import evaluation_memory, training_memory

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
README = RECIPES / "README.md"


def main() -> None:
    readme = README.read_text("utf-8")
    for path in sorted(RECIPES.glob("*.yaml")):
        config = loaded(path)
        text = path.read_text("utf-8")
        path.write_text(re.sub(r"# Memory: .*\n(#         .*\n)*", header(path, config), text), "utf-8")
        row = re.escape(f"| [{path.stem}]({path.name}) |") + r".*\n"
        readme = re.sub(row, f"{line(path, config)}\n", readme)
    README.write_text(readme, "utf-8")


def header(path: Path, config: Config) -> str:
    """The lines of a recipe that say what it needs."""
    training, parts, evaluation = memory(path, config)
    said = ", ".join(f"{name} {gigabytes(part)}" for name, part in parts.items())
    text = (
        f"about {gigabytes(max(training, evaluation))} GB by the plan, not measured (recipes/README.md): "
        f"training {gigabytes(training)} ({said}), evaluation up to {gigabytes(evaluation)}"
    )
    lines = textwrap.wrap(text, 108, initial_indent="# Memory: ", subsequent_indent="#         ")
    return "".join(f"{line}\n" for line in lines)


def line(path: Path, config: Config) -> str:
    """A recipe's line in the table."""
    train = config.train
    training, _, evaluation = memory(path, config)
    batch = f"{train.micro_batch_size} × {train.gradient_accumulation_steps}"
    needed = f"{gigabytes(max(training, evaluation))} GB"
    return f"| [{path.stem}]({path.name}) | `{config.base}` | {train.sequence_length} | {batch} | {needed} |"


def memory(path: Path, config: Config) -> tuple[int, dict[str, int], int]:
    """Bytes at the peak of the training, what they are made of, and bytes of the evaluation."""
    card = card_of_vram(path.stem.rpartition("-")[2])
    shape, length = shape_for(config.base), config.train.sequence_length
    kernels = expected_kernels(config, shape, card)
    setup = setup_of(config, shape, kernels=kernels, longest_row=length, sequence=length, supervised=1.0, device="cuda")
    found = training_memory(setup)
    parts = {
        "weights": found.weights,
        "adapter": found.adapter + found.gradients + found.optimizer,
        "activations": found.checkpoints + found.activations + found.buffers,
        "logits": found.logits,
        "CUDA": found.context,
    }
    return found.total, parts, evaluation_memory(setup)


def gigabytes(count: int) -> str:
    """Of 10⁹ bytes, as cards are sold."""
    return f"{count / 1e9:.1f}"


def loaded(path: Path) -> Config:
    """A recipe with some data, without which it is no config."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text('{"question": "Why?", "answer": "Because."}\n', "utf-8")
        return load(path, [f"data=[{{path: {rows}}}]"]).config


if __name__ == "__main__":
    main()
