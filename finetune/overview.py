"""What there is, shown without loading anything heavy: a config's validity, its data, the runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.base_files import check_weights, read_model_config, small_files
from finetune.config.load import load
from finetune.config.schema import DataSource, is_local_base, is_local_data
from finetune.console import Console, printable
from finetune.data.conversation import Message
from finetune.data.formats import convert, detect_format
from finetune.data.inspect import Wanted, show_rows
from finetune.data.jinja import TemplateRefusal
from finetune.data.prepare import DETECT_ROWS, held_out_source
from finetune.data.read import read_rows, shown_path
from finetune.data.template import choose_template
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import FinetuneError
from finetune.model.adapter import check_targets
from finetune.pipeline import CACHE, account, prepare_shown
from finetune.runs.folder import RunFolder, list_runs
from finetune.runs.manifest import resolved_yaml, today


def check(path: Path, overrides: Sequence[str], console: Console, *, show: bool) -> None:
    """`ft check`: the config, its files, the first rows of its data, a local base. No torch, no network."""
    loaded = load(path, overrides)
    config = loaded.config
    chat = False
    for source in (*config.data, held_out_source(config)):
        if source is not None and is_local_data(source.path):
            format_, rows = _check_rows(source)
            chat = chat or format_ != "text"
            console.say(f"{shown_path(Path(source.path))}: {format_}, by its first {rows} rows")
    if is_local_base(config.base):
        folder = Path(config.base)
        read_model_config(folder)
        check_weights(folder)
        check_targets(config, folder, loaded.place("lora.targets"))
        tokenizer = load_tokenizer(folder)
        if chat:
            template = choose_template(config.chat_template, tokenizer, today())
            with contextlib.suppress(TemplateRefusal):  # whether it takes the rows is found out with the rows
                template.render([Message("user", "a"), Message("assistant", "b")])
    if show:
        console.data(resolved_yaml(loaded, sources=True))
    console.say(f"{path} is valid")


def _check_rows(source: DataSource) -> tuple[str, int]:
    """The format of a file's first rows, and how many were looked at."""
    rows = list(islice(read_rows(source), DETECT_ROWS))
    format_ = detect_format(rows) if source.format == "auto" else source.format
    for row in rows:
        convert(row, format_)
    return format_, len(rows)


def show_data(path: Path, overrides: Sequence[str], runs: Path, console: Console, wanted: Wanted) -> None:
    """`ft data`: the account of all rows, and some of them as the model will see them."""
    config = load(path, overrides).config
    data = prepare_shown(config, small_files(config), runs / CACHE, console)
    show_rows(data, config, console, wanted, account(data))


def show_runs(runs: Path, console: Console) -> None:
    """`ft runs`: every run with its state and its loss before and after; a damaged one is named, not fatal."""
    found = list_runs(runs)
    if console.json_events:
        for run in found:
            try:
                manifest = run.read_manifest()
            except FinetuneError as error:
                console.event("run", name=run.name, path=str(run.path), state="damaged", problem=str(error))
                continue
            # What a manifest may call `name` or `event` is not what this line says of the run.
            ours = ("event", "kind", "name", "path")
            fields = {key: value for key, value in manifest.items() if key not in ours} | {
                "state": _state(run, manifest)
            }
            console.event("run", name=run.name, path=str(run.path), **fields)
        return
    if not found:
        console.say(f"no runs in {runs}/ yet; `ft train CONFIG` makes one")
        return
    header = ["run", "state", "base", "loss before", "after", "artifacts"]
    console.table(header, [describe_run(run) for run in found], stdout=True)


def describe_run(run: RunFolder) -> list[str]:
    """A run's line in `ft runs`: name, state, base, loss before and after, artifacts."""
    try:
        manifest = run.read_manifest()
    except FinetuneError:
        return [run.name, "damaged", "", "", "", ""]
    scores = _scores(run)
    artifacts = [name for name in ("adapter", "merged", "gguf") if (run.path / name).is_dir()]
    base = printable(str(manifest.get("base", ""))).rstrip("/").rpartition("/")[2]
    return [
        run.name,
        printable(_state(run, manifest)),
        base,
        scores.get("base", "–"),
        scores.get("tuned", "–"),
        " ".join(artifacts),
    ]


def _state(run: RunFolder, manifest: Mapping[str, Any]) -> str:
    """What the manifest says; but whoever kills a process gives it no time to write that down."""
    state = str(manifest.get("state", "?"))
    return "killed" if state == "running" and not run.in_use else state


def _scores(run: RunFolder) -> dict[str, str]:
    """The losses of evaluation.json, as far as it has them."""
    try:
        found: Any = json.loads(run.evaluation.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    scores: dict[str, str] = {}
    for who in ("base", "tuned"):
        entry = found.get(who) if isinstance(found, dict) else None
        if isinstance(entry, dict) and isinstance(entry.get("loss"), float):
            scores[who] = f"{entry['loss']:.4f}"
    return scores
