"""Makes what `ft train configs/quickstart.yaml` starts from: a tiny base model and a dataset of contract clauses.

    python data/samples/make_quickstart.py                    # the two .jsonl files and the base, about 6 minutes
    python data/samples/make_quickstart.py --only datasets    # the two .jsonl files, in a second

Every text is generated from `clause_grammar.py` and `pretraining_text.py`. The datasets come out byte for byte the same
from the same seed; the base does too on one machine, but another processor adds numbers in another order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import TypeAlias

import pretraining_text
from clause_grammar import CLAUSE_TYPES, HELDOUT_FILLERS, TRAINING_FILLERS
from invented import fill

HERE = Path(__file__).parent
QUESTION = "What type of clause is this?"
TRAINING_PER_TYPE = 48
HELDOUT_PER_TYPE = 10

Row: TypeAlias = dict[str, list[dict[str, str]]]


def clause(sentences: tuple[str, ...], fillers: tuple[str, ...], random: Random) -> str:
    """One or two sentences of a type, in any order, sometimes with one that says nothing about the type."""
    parts = random.sample(sentences, 1 if random.random() < 0.3 else 2)
    if random.random() < 0.3:
        parts.insert(random.randint(0, len(parts)), random.choice(fillers))
    return fill(" ".join(parts), random)


def dataset(split: str, per_type: int, seed: int) -> list[Row]:
    """`per_type` different clauses of each type, shuffled; `split` is `training` or `heldout`."""
    random = Random(f"{split} {seed}")
    fillers = TRAINING_FILLERS if split == "training" else HELDOUT_FILLERS
    rows: list[Row] = []
    for kind in CLAUSE_TYPES:
        sentences = kind.training if split == "training" else kind.heldout
        texts: dict[str, None] = {}
        while len(texts) < per_type:
            texts[clause(sentences, fillers, random)] = None
        rows.extend(row(text, kind.name) for text in texts)
    random.shuffle(rows)
    return rows


def row(text: str, name: str) -> Row:
    """A clause and its type as a conversation."""
    return {
        "messages": [
            {"role": "user", "content": f"{QUESTION}\n\n{text}"},
            {"role": "assistant", "content": name},
        ]
    }


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_datasets(folder: Path, seed: int) -> None:
    """Writes the training and the held-out rows."""
    write_rows(dataset("training", TRAINING_PER_TYPE, seed), folder / "contract-clauses.jsonl")
    write_rows(dataset("heldout", HELDOUT_PER_TYPE, seed), folder / "contract-clauses-heldout.jsonl")


def make_base(folder: Path, seed: int, documents: int, threads: int) -> float:
    """Pre-trains the base and writes it; the mean loss of its last steps."""
    import tiny_base
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    corpus = pretraining_text.corpus(documents, seed)
    tokenizer = tiny_base.train_tokenizer(corpus)
    model = tiny_base.build_model(tokenizer)
    rows = tiny_base.blocks(corpus, tokenizer)
    print(f"{len(corpus)} documents, {rows.numel():,} tokens, {model.num_parameters():,} parameters", file=sys.stderr)
    loss = tiny_base.pretrain(model, rows, seed)
    tiny_base.save(model, tokenizer, folder)
    return loss


def main() -> None:
    """Parses the command line and makes what it asks for."""
    parser = argparse.ArgumentParser(description="Makes the quickstart's dataset and tiny base model.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    parser.add_argument("--only", choices=("datasets", "base"), help="make only this part")
    parser.add_argument("--seed", type=int, default=7, help="seed of all texts and weights")
    parser.add_argument("--documents", type=int, default=24_000, help="documents of pre-training text")
    parser.add_argument("--threads", type=int, default=2, help="processor threads of the pre-training")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.only != "base":
        make_datasets(options.output, options.seed)
    if options.only != "datasets":
        loss = make_base(options.output / "quickstart-base", options.seed, options.documents, options.threads)
        print(f"mean loss of the last steps: {loss:.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
