"""Makes the small datasets that the example configs name, one per domain and one per layout of rows.

    python data/samples/make_domain_samples.py

Each file's text comes from the module of the same name (`domain_legal.py` writes `legal.jsonl`), and the same
seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import domain_code
import domain_finance
import domain_legal
import domain_medical
import domain_notes
import domain_support

HERE = Path(__file__).parent


def write_jsonl(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_csv(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A header and one line per row, as spreadsheets write it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Parses the command line and writes all six files."""
    parser = argparse.ArgumentParser(description="Makes the sample datasets of the example configs.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to (default: beside this file)")
    parser.add_argument("--seed", type=int, default=7, help="seed of all texts")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    seed = options.seed
    write_jsonl(domain_legal.rows(Random(f"legal {seed}")), options.output / "legal.jsonl")
    write_jsonl(domain_medical.rows(Random(f"medical {seed}")), options.output / "medical.jsonl")
    write_csv(domain_finance.rows(Random(f"finance {seed}")), options.output / "finance.csv")
    write_jsonl(domain_support.rows(Random(f"support {seed}")), options.output / "support.jsonl")
    write_jsonl(domain_code.rows(Random(f"code {seed}")), options.output / "code.jsonl")
    write_jsonl(domain_notes.rows(Random(f"notes {seed}")), options.output / "notes.jsonl")


if __name__ == "__main__":
    main()
