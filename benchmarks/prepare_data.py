"""How fast rows become packed tokens with their loss mask, against TRL's own preparation and a bare tokenizer.

    .venv/bin/python benchmarks/prepare_data.py --tokenizer ../shared/assets/tokenizers/qwen2 \
        --text ../shared/assets/data/medquad/medquad.jsonl --rows 5000 50000 --repeat 3

The rows: conversations of one or two exchanges, cut from the answers of a JSON Lines file of real prose (its column
`answer`). Three ways, each in a process of its own, in turn, timed after its imports:

    ours   `finetune.data.prepare.prepare`: load the tokenizer, read, check, render, tokenise, mask, look for secrets
           and duplicates, pack, write to disk
    trl    load the tokenizer and the rows, and SFTTrainer's preparation: template, assistant mask, packing (bfd)
    bare   `encode_batch` over the same rendered text, all of it in memory already, as the tokenizer is

Wall and CPU seconds are medians; ratios are medians of the pairs. `--memory` runs ours alone at the given sizes, with
rows a fifth as long, and prints its peak memory (of the largest of its processes). Writes
benchmarks/results/prepare_data.json, or prepare_data_memory.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LENGTH = 2048


def template() -> Path:
    """Qwen2.5's chat template, which TRL has a version with masks of."""
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "chat_templates" / "qwen2_5.jinja"


def write_rows(source: Path, path: Path, count: int, share: int = 1) -> None:
    """`count` conversations, each different, from the words of `source`; `share` divides their length."""
    with open(source, encoding="utf-8") as file:
        words = [word for line in file for word in json.loads(line)["answer"].split(" ") if word]
    with open(path, "w", encoding="utf-8") as out:
        at = 0
        for number in range(count):
            turns: list[dict[str, str]] = [{"role": "system", "content": "You answer questions about health."}]
            for _ in range(1 + number % 2):
                for role, length in (("user", 20), ("assistant", 60 if number % 2 else 120)):
                    length = (length + number * 7919 % 40) // share
                    taken = words[at : at + length]
                    if len(taken) < length:
                        # The text is used again from another place on, so that no row repeats another.
                        at = number % 9973 + 1
                        taken = words[at : at + length]
                    at += length
                    turns.append({"role": role, "content": " ".join(taken)})
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(work: Any) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    return result, {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}


def ours(rows: Path, tokenizer: Path) -> dict[str, float]:
    from finetune.config.schema import Config
    from finetune.data.prepare import prepare

    values = {
        "base": str(tokenizer),
        "chat_template": str(template()),
        "data": [{"path": str(rows)}],
        "evaluation": {"split": 0},
        "train": {"sequence_length": LENGTH},
    }
    config = Config.model_validate(values)
    with tempfile.TemporaryDirectory(dir=rows.parent) as cache:
        data, spent = timed(lambda: prepare(config, tokenizer, cache=Path(cache)))
        _, again = timed(lambda: prepare(config, tokenizer, cache=Path(cache)))
    spent["again"] = again["wall"]
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return spent | shape(data.tokens, data.supervised_tokens, data.sequences) | {"peak_mb": peak / 1024}


def trl(rows: Path, tokenizer: Path) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    shape_ = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=160_000, num_key_value_heads=1, **shape_))
    with tempfile.TemporaryDirectory(dir=rows.parent) as folder:
        arguments = SFTConfig(
            folder, max_length=LENGTH, packing=True, assistant_only_loss=True, report_to=[], bf16=False, use_cpu=True
        )

        def work() -> Any:
            processing = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
            processing.chat_template = template().read_text("utf-8")
            dataset = load_dataset("json", data_files=str(rows), split="train", cache_dir=folder)
            return SFTTrainer(model, arguments, train_dataset=dataset, processing_class=processing).train_dataset

        dataset, spent = timed(work)
        tokens = sum(len(ids) for ids in dataset["input_ids"])
        # Packing drops the mask's name but keeps the mask, under the name of the labels or its own.
        column = "assistant_masks" if "assistant_masks" in dataset.column_names else "labels"
        supervised = sum(sum(value not in (0, -100) for value in values) for values in dataset[column])
    return spent | shape(tokens, supervised, len(dataset))


def bare(rows: Path, tokenizer: Path) -> dict[str, float]:
    import datetime

    from finetune.data.conversation import Message
    from finetune.data.template import choose_template
    from finetune.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    chat_template = choose_template(str(template()), loaded, datetime.datetime.now())
    texts = []
    with open(rows, encoding="utf-8") as file:
        for line in file:
            texts.append(chat_template.render([Message(m["role"], m["content"]) for m in json.loads(line)["messages"]]))
    found, spent = timed(lambda: loaded.backend.encode_batch(texts, add_special_tokens=False))
    return spent | {"tokens": float(sum(len(encoding) for encoding in found))}


def shape(tokens: int, supervised: int, sequences: int) -> dict[str, float]:
    return {"tokens": tokens, "supervised": supervised, "sequences": sequences, "fill": tokens / (sequences * LENGTH)}


WAYS = {"ours": ours, "trl": trl, "bare": bare}


def in_a_process(way: str, rows: Path, tokenizer: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--in", str(rows), "--tokenizer", str(tokenizer)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(text: Path, tokenizer: Path, count: int, repeat: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(text, rows, count)
        runs: list[dict[str, dict[str, float]]] = []
        for _ in range(repeat):
            runs.append({way: in_a_process(way, rows, tokenizer) for way in WAYS})
            for way, run in runs[-1].items():
                print(way, {key: round(value, 2) for key, value in run.items()}, flush=True)
    result: dict[str, Any] = {"rows": count, "repeat": repeat}
    for way in WAYS:
        result[way] = {key: statistics.median(run[way][key] for run in runs) for key in runs[0][way]}
    for other in ("trl", "bare"):
        for what in ("wall", "cpu"):
            ratios = [run["ours"][what] / run[other][what] for run in runs]
            result[f"{what} of ours / {other}"] = round(statistics.median(ratios), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 50_000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--in", dest="rows_file", type=Path)
    chosen = parser.parse_args()
    if chosen.way:
        print(json.dumps(WAYS[chosen.way](chosen.rows_file, chosen.tokenizer.absolute())))
        return
    results = []
    for count in chosen.rows:
        if chosen.memory:
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "rows.jsonl"
                write_rows(chosen.text, rows, count, 5)
                results.append({"rows": count} | in_a_process("ours", rows, chosen.tokenizer.absolute()))
        else:
            results.append(compare(chosen.text, chosen.tokenizer.absolute(), count, chosen.repeat))
        print(json.dumps(results[-1], indent=2))
    name = "prepare_data_memory.json" if chosen.memory else "prepare_data.json"
    path = ROOT / "benchmarks" / "results" / name
    path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
