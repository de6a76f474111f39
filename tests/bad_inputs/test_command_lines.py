"""Command lines that cannot be meant: said before anything is read, or at least before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Refused

QUANTS = (
    "f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k, "
    "iq4_nl, iq4_xs"
)


def usage(command: str) -> str:
    return f"`ft {command} --help` shows how it is used"


LINES: dict[str, str] = {
    "train": f"Missing argument 'CONFIG'. | {usage('train')}",
    "check": f"Missing argument 'CONFIG'. | {usage('check')}",
    "export": f"Missing argument 'RUN'. | {usage('export')}",
    "check a.yaml b.yaml": f"Got unexpected extra argument (b.yaml) | {usage('check')}",
    "check c.yaml --shwo": f"No such option '--shwo'. Did you mean '--show'? | {usage('check')}",
    "check c.yaml -s lora.rank": "-s lora.rank: expected KEY=VALUE | for instance -s lora.rank=32",
    "check c.yaml -s =3": "-s =3: expected KEY=VALUE | for instance -s lora.rank=32",
    "check c.yaml -s lora.rank=[": "-s lora.rank: '[' is not a YAML value | quote it, or write a list as [a, b]",
    "check c.yaml -s lora.rank=sixteen": (
        "-s lora.rank: lora.rank: expected a whole number, got 'sixteen' | `ft config explain lora.rank` says more"
    ),
    "train c.yaml -s lora.rnak=32": "-s lora.rnak: lora.rnak: unknown key | did you mean `rank`?",
    "check c.yaml -s lora=3": (
        "-s lora: lora: expected a mapping (`key: value` lines), got 3 | `ft config explain lora` says more"
    ),
    "check c.yaml -s data.5.path=x": "-s data.5.path: data.5: there is no such key | see `ft config explain`",
    "check c.yaml -s base.x.y=1": "-s base.x.y: base.x: there is no such key | see `ft config explain`",
    "check c.yaml -s extends=c.yaml": ("-s extends: extends: can only stand in a file | write it into the config"),
    "check c.yaml -s lora.rank=!!python/name:os.system": (
        "-s lora.rank: the tag !!python/name:os.system is not allowed | a config holds plain values only"
    ),
    "check c.yaml -s train.epochs=1:30": (
        "-s train.epochs: train.epochs: expected a number, got '1:30' | `ft config explain train.epochs` says more"
    ),
    "check c.yaml -s base=./bsae": (
        "-s base: base: no such folder: bsae | name a model folder, or a Hub id: owner/name"
    ),
    "check c.yaml -s base=./rows.jsonl": (
        "-s base: base: no such folder: rows.jsonl | name a model folder, or a Hub id: owner/name"
    ),
    "data c.yaml --row x": f"Invalid value for '--row': 'x' is not a valid integer. | {usage('data')}",
    "data c.yaml --row 0": "--row 0: there is no such row to train on | name one from 1 to 19",
    "data c.yaml --row 99": "--row 99: there is no such row to train on | name one from 1 to 19",
    "data c.yaml --find zzz": (
        "--find zzz: no row to train on holds this text | it is looked for as the model sees it, upper and lower case "
        "alike"
    ),
    "export runs/good --quant q9": f"--quant is one of {QUANTS}, not 'q9' | q8_0 is the usual choice",
    "export runs/good --quant q8_0,": f"--quant is one of {QUANTS}, not '' | q8_0 is the usual choice",
    "export runs/good --to onnx": "--to is one of gguf, hf, gguf-lora, not 'onnx' | `ft export runs/good --to gguf`",
    "merge runs/good --base fp8": "--base is stored or nf4, not 'fp8' | stored is the usual choice",
    "export runs/good --base nf4": (
        "--base nf4: this run was trained with quantization: none | leave --base out: the stored weights are those "
        "that training saw"
    ),
    "chat runs/good --using onnx": (
        "--using is one of auto, adapter, merged, gguf, not 'onnx' | `ft chat runs/good --using adapter`"
    ),
    "chat runs/good --using gguf": "runs/good: this run has no gguf | `ft export runs/good --to gguf` makes it",
    "chat runs/good --using merged": "runs/good: this run has no merged | `ft merge runs/good` makes it",
    "chat runs/good --max-tokens 0": f"Invalid value for '--max-tokens': 0 is not in the range x>=1. | {usage('chat')}",
    "chat runs/good --temperature -1": (
        f"Invalid value for '--temperature': -1.0 is not in the range x>=0. | {usage('chat')}"
    ),
    "chat runs/good --temperature nan": "--temperature: nan is no temperature | 0 is sober, 1 is lively",
    "chat runs/good --prompt=": "--prompt: the prompt is empty | give a text, or `-` and a text on stdin",
    "serve runs/good --port 0": f"Invalid value for '--port': 0 is not in the range 1<=x<=65535. | {usage('serve')}",
    "serve runs/good --port 65536": (
        f"Invalid value for '--port': 65536 is not in the range 1<=x<=65535. | {usage('serve')}"
    ),
    "serve runs/good --host 0.0.0.0": (
        "--host 0.0.0.0: without a key, everybody who reaches this address could use the model | put a key into the "
        "environment as FT_API_KEY (or give --api-key), or leave --host out"
    ),
    "serve runs/good --using gguf": "runs/good: this run has no gguf | `ft export runs/good --to gguf` makes it",
    "serve runs/good --context -1": f"Invalid value for '--context': -1 is not in the range x>=0. | {usage('serve')}",
    "serve runs/good --threads 0": f"Invalid value for '--threads': 0 is not in the range x>=1. | {usage('serve')}",
    "config explain lora.rnk": "there is no key 'lora.rnk' | did you mean `lora.rank`?",
    # What is named is something else.
    "chat c.yaml": (
        "c.yaml: this is a config, not a run | name the run that `ft train c.yaml` made; `ft runs` lists them"
    ),
    "merge c.yaml": (
        "c.yaml: this is a config, not a run | name the run that `ft train c.yaml` made; `ft runs` lists them"
    ),
    "export rows.jsonl": "rows.jsonl: this is a file, not a run folder | `ft runs` lists the runs",
    "eval base": "base: not a run folder: it has no manifest.json | `ft runs` lists the runs",
    "chat runs": "runs: not a run folder: it has no manifest.json | `ft runs` lists the runs",
    "chat god": "god: no such run | did you mean runs/good?",
    "export nothing-like-it": ("nothing-like-it: no such run | `ft runs` lists the runs; `ft train CONFIG` makes one"),
    "runs --runs c.yaml": "c.yaml: this is a file, not a folder of runs | `--runs FOLDER` names another",
    # ft init
    "init c.yaml": "c.yaml: this file exists | name another file, or remove this one",
    "init new.yaml --data row.jsonl": (
        "row.jsonl: no such data file | known endings: .jsonl, .json, .csv, .tsv, .parquet, .arrow (also packed: .gz, "
        ".zst)"
    ),
    "init new.yaml --data base": (
        'base/config.json: row 1: expected an object with named fields, got text | a row looks like {"prompt": "…", …}'
    ),
    "init new.yaml --base ./bsae": "./bsae: no such folder | name a model folder, or a Hub id: owner/name",
}


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_that_cannot_be_meant(run: Path, folder: Path, refused: Refused, line: str) -> None:
    assert refused(*line.split(" ")) == LINES[line]
    assert not (folder / "new.yaml").exists()


@pytest.mark.parametrize("word", ["trian", "c.yaml"])
def test_a_command_that_does_not_exist(folder: Path, refused: Refused, word: str) -> None:
    assert refused(word).startswith(f"No such command '{word}'.")


def test_an_empty_prompt_on_stdin(run: Path, refused: Refused) -> None:
    said = "--prompt: the prompt is empty | give a text, or `-` and a text on stdin"
    assert refused("chat", "runs/good", "--prompt", "-", stdin=b" \n") == said


def test_an_override_too_long_to_show(folder: Path, refused: Refused) -> None:
    said = "-s lora: nested too deep to be a config | see `ft config explain` for what can stand"
    assert refused("check", "c.yaml", "-s", f"lora={'[' * 50_000}") == said
