"""Proving what was exported from a run: the run's own rows and tokenizer, the comparison, verification.json."""

from __future__ import annotations

import contextlib
import os
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
from finetune.runs.manifest import day_of, timestamp
from finetune.runs.verification import hashes, recorded

if TYPE_CHECKING:
    from finetune.data.store import TokenRow
    from finetune.export.verify.asked import Artifact
    from finetune.export.verify.proof import Subject

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
    on: Path | None = None
    """For an adapter as GGUF: the base as GGUF."""


def prove(
    run: RunFolder, config: Config, base: Path, exported: Sequence[Exported], onto: Onto, console: Console
) -> dict[str, list[str]]:
    """Compare with what was trained, print the table, write verification.json. Name → what is wrong with it."""
    from finetune.export.verify.proof import measure, needed_context
    from finetune.export.verify.verdict import as_dict, judge, table

    with contextlib.ExitStack() as stack, console.progress("proving") as progress:
        subject = _subject(run, config, base, onto, console)
        context = needed_context(subject)
        artifacts = [_open(one, subject.device, context, stack) for one in exported]
        reference, found = measure(subject, artifacts, lambda what, done, total: progress.count(done, total, what))
    if not console.json_events:
        console.say()
        console.table(*table(reference, found))
        console.say(
            f"compared on {reference.sequences} texts and {reference.rows_are} rows, {reference.positions:,} tokens"
            + (f", and at the end of {reference.long:,}" if reference.long else "")
        )
    known = recorded(run)
    problems = {}
    for one, measured in zip(exported, found, strict=True):
        verdict = judge(reference, measured)
        found_here = as_dict(reference, measured, verdict)
        changed = [f"{name} is not the one that was trained with" for name in _changed_files(run.adapter, one.path)]
        found_here["problems"] += changed
        found_here["proven"] = not found_here["problems"]
        known[one.name] = {"proven_at": timestamp(), **_made(run, one.path, onto), **found_here}
        console.event("verification", artifact=one.name, **known[one.name])
        for warning in verdict.warnings:
            console.warn(f"{one.name}: {warning}")
        problems[one.name] = found_here["problems"]
    write_json(run.verification, known)
    return problems


State = Literal["absent", "unknown", "other", "refuted", "not proven", "proven"]


def state_of(run: RunFolder, one: Exported, onto: Onto) -> State:
    """What verification.json knows about what carries this name.

    "unknown": it does not speak of these bytes. "other": they were made of another adapter, or onto other weights.
    "refuted": a proof found that they do not say what was trained. "not proven": nobody asked for a proof.
    """
    if not os.path.lexists(one.path):
        return "absent"
    entry, made = recorded(run).get(one.name), _made(run, one.path, onto)
    if not isinstance(entry, dict) or entry.get("sha256") != made["sha256"] or "adapter" not in entry:
        return "unknown"
    if any(entry.get(key) != value for key, value in made.items()):
        return "other"
    if entry.get("proven") is True:
        return "proven"
    return "refuted" if entry.get("problems") else "not proven"


def record_unproven(run: RunFolder, exported: Sequence[Exported], onto: Onto) -> None:
    """Note in verification.json what is about to get its name without a proof, so that it is known again."""
    known = recorded(run)
    for one in exported:
        known[one.name] = {"proven": False, "problems": [], **_made(run, one.path, onto)}
    write_json(run.verification, known)


def _made(run: RunFolder, path: Path, onto: Onto) -> dict[str, Any]:
    """Which bytes they are, and what of."""
    return {"sha256": hashes(path), "adapter": hashes(run.adapter), "merged_onto": onto}


def _subject(run: RunFolder, config: Config, base: Path, onto: Onto, console: Console) -> Subject:
    from finetune.export.source import open_model
    from finetune.export.verify.proof import Subject
    from finetune.model.hardware import detect

    tokenizer = load_tokenizer(run.adapter)
    template = choose_template(None, tokenizer, day_of(run.read_manifest())) if tokenizer.chat_template else None
    rows, rows_are = _rows(run, config, console)
    return Subject(
        base=open_model(base),
        adapter=run.adapter,
        tokenizer=tokenizer,
        template=template,
        stop_ids=end_of_turn(template, tokenizer)[0],
        rows=rows,
        rows_are=rows_are,
        nf4=config.quantization == "nf4",
        onto=onto,
        device="cuda:0" if detect().device == "cuda" else "cpu",
    )


def _open(one: Exported, device: str, context: int, stack: contextlib.ExitStack) -> Artifact:
    from finetune.export.verify.artifacts import open_folder, open_gguf

    if one.path.is_dir():
        return open_folder(one.path, one.name, device)
    model, lora = (one.path, ()) if one.on is None else (one.on, (one.path,))
    return stack.enter_context(open_gguf(model, one.name, one.precision, context, lora=lora))


def _rows(run: RunFolder, config: Config, console: Console) -> tuple[Sequence[TokenRow], str]:
    """Held-out rows, or else training rows; none if the data is not here any more, which a proof does not need."""
    try:
        data = prepare(config, small_files(config), cache=run.path.parent / CACHE, today=day_of(run.read_manifest()))
    except FinetuneError as error:
        console.say(f"note: compared on the project's own texts alone, since the run's data cannot be read: {error}")
        return (), "no"
    return (data.held_out, "held-out") if len(data.held_out) else (data.train, "training")


_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
"""What a merged folder takes from the adapter's folder, byte for byte: it decides how an answer begins and ends."""


def _changed_files(adapter: Path, folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    there = [name for name in _COPIED if (adapter / name).is_file()]
    return [name for name in there if not _same(adapter / name, folder / name)]


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()
