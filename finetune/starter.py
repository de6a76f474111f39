"""`ft init`: a config to start from, fitted to the data that is there."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from finetune.config.yaml_source import dump
from finetune.console import printable
from finetune.errors import ConfigError
from finetune.runs.files import storage_errors, write_text

DEFAULT_BASE = "meta-llama/Llama-3.2-3B-Instruct"
"""Small enough for an 8 GB card in 4 bit, good enough to be useful."""

TEMPLATE = """\
# yaml-language-server: $schema={schema}
# Check it: ft check {path}    Train it: ft train {path}
base: {base}
data:
  - path: {data}
    format: {format}          # {note}
evaluation: {{split: 0.05}}    # 5 % of the rows are held out to compare base and tuned
quantization: nf4             # nf4 | int8 | none
lora: {{rank: 16, alpha: 32, dropout: 0.0, targets: all-linear}}
train:
  epochs: 3
  learning_rate: 2.0e-4
  micro_batch_size: 2
  gradient_accumulation_steps: 8
  sequence_length: 2048
  packing: true
  seed: 42
"""


def write_starter(path: Path, data: Path | None, base: str | None) -> list[str]:
    """Write the config; returns what to tell the person. Raises ConfigError if the file exists."""
    if path.exists():
        raise ConfigError("this file exists", place=str(path), hint="name another file, or remove this one")
    format_, note = "auto", "auto | messages | sharegpt | alpaca | prompt-completion | question-answer | text"
    if data is not None:
        format_, note = _look_at(data)
    folder = path.parent
    text = TEMPLATE.format(
        schema=os.path.relpath(Path(__file__).parent / "config" / "config.schema.json", folder),
        path=printable(shlex.quote(str(path))),
        # Quoted where it has to be: a path may hold a colon or a `#`.
        base=dump(_base(base, folder) if base is not None else DEFAULT_BASE, flow=True),
        data=dump(_relative(data, folder) if data is not None else "my-data.jsonl", flow=True),
        format=format_,
        note=note,
    )
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    told = [f"wrote {path}"]
    if data is None:
        told.append("put your data file into it, under `data:`")
    return [*told, f"next: `ft check {path}`, then `ft train {path}`"]


def _look_at(data: Path) -> tuple[str, str]:
    from itertools import islice

    from finetune.config.files import KNOWN_ENDINGS, is_pattern
    from finetune.config.schema import DataSource, data_kind
    from finetune.data.formats import detect_format
    from finetune.data.prepare import DETECT_ROWS
    from finetune.data.read import read_rows

    path = os.path.abspath(data)
    several = os.path.isdir(path) or is_pattern(path)
    if not several and (not os.path.isfile(path) or data_kind(path) is None):
        raise ConfigError("no such data file", place=str(data), hint=KNOWN_ENDINGS)
    rows = list(islice(read_rows(DataSource(path=path)), DETECT_ROWS))
    return detect_format(rows), f"found in the first {len(rows)} rows"


def _base(base: str, folder: Path) -> str:
    """A folder as the config will find it; anything else is taken for a Hub id."""
    if Path(base).is_dir():
        return _relative(Path(base), folder)
    if base.startswith((".", "/", "~")):
        raise ConfigError("no such folder", place=base, hint="name a model folder, or a Hub id: owner/name")
    return base


def _relative(path: Path, folder: Path) -> str:
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith(".") else f"./{relative}"
