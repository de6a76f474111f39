"""Proving what was exported from a run: the run's own rows and tokenizer, the comparison, verification.json."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.base_files import small_files
from finetune.config.schema import Config
from finetune.console import Console
from finetune.data.prepare import prepare
from finetune.data.template import choose_template, end_of_turn
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import FinetuneError
from finetune.pipeline import CACHE
from finetune.runs.files import write_json
from finetune.runs.folder import RunFolder
from finetune.runs.manifest import sha256, timestamp

if TYPE_CHECKING:
    from finetune.data.store import TokenRow
    from finetune.export.verify.proof import Artifact

Onto = Literal["stored", "nf4"]


@dataclass(frozen=True)
class Exported:
    """A file or folder that is written and not yet proven."""

    name: str
    """What it will be called, relative to the run folder."""
    path: Path
    """Where it is now."""
    precision: str
    """For a GGUF file: its quantisation."""


def prove(
    run: RunFolder, config: Config, base: Path, exported: Sequence[Exported], onto: Onto, console: Console
) -> dict[str, tuple[str, ...]]:
    """Compare with what was trained, print the table, write verification.json. Name → what is wrong with it."""
    from finetune.export.source import open_model
    from finetune.export.verify.proof import Subject, measure
    from finetune.export.verify.verdict import as_dict, judge, table
    from finetune.model.hardware import detect

    tokenizer = load_tokenizer(run.adapter)
    template = choose_template(None, tokenizer, datetime.datetime.now()) if tokenizer.chat_template else None
    rows, rows_are = _rows(run, config, console)
    device = "cuda:0" if detect().device == "cuda" else "cpu"
    subject = Subject(
        base=open_model(base),
        adapter=run.adapter,
        tokenizer=tokenizer,
        template=template,
        stop_ids=end_of_turn(template, tokenizer)[0],
        rows=rows,
        rows_are=rows_are,
        nf4=config.quantization == "nf4",
        onto=onto,
        device=device,
    )
    with contextlib.ExitStack() as stack, console.progress("proving") as progress:
        artifacts = [_open(one, device, stack) for one in exported]
        reference, found = measure(subject, artifacts, lambda what, done, total: _show(progress, what, done, total))
    if not console.json_events:
        console.say()
        console.table(*table(reference, found))
        console.say(f"compared on {reference.sequences} texts and {rows_are} rows, {reference.positions:,} tokens")
    known = _known(run.verification)
    problems = {}
    for one, measured in zip(exported, found, strict=True):
        verdict = judge(reference, measured)
        known[one.name] = {"proven_at": timestamp(), "sha256": _hashes(one.path)} | as_dict(
            reference, measured, verdict
        )
        console.event("verification", artifact=one.name, **known[one.name])
        for warning in verdict.warnings:
            console.warn(f"{one.name}: {warning}")
        problems[one.name] = verdict.problems
    write_json(run.verification, known)
    return problems


def _open(one: Exported, device: str, stack: contextlib.ExitStack) -> Artifact:
    from finetune.export.verify.artifacts import open_folder, open_gguf

    if one.path.is_dir():
        return open_folder(one.path, one.name, device)
    return stack.enter_context(open_gguf(one.path, one.name, one.precision))


def _rows(run: RunFolder, config: Config, console: Console) -> tuple[Sequence[TokenRow], str]:
    """Held-out rows, or else training rows; none if the data is not here any more, which a proof does not need."""
    try:
        data = prepare(config, small_files(config), cache=run.path.parent / CACHE)
    except FinetuneError as error:
        console.say(f"note: compared on the project's own texts alone, since the run's data cannot be read: {error}")
        return (), "held-out"
    return (data.held_out, "held-out") if len(data.held_out) else (data.train, "training")


def _show(progress: Any, what: str, done: int, total: int) -> None:
    progress.total = total
    progress.update(done, what)


def _hashes(path: Path) -> str | dict[str, str]:
    return (
        sha256(path)
        if path.is_file()
        else {file.name: sha256(file) for file in sorted(path.iterdir()) if file.is_file()}
    )


def _known(path: Path) -> dict[str, Any]:
    """What was proven before about other artifacts. A file that cannot be read is written anew."""
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}
