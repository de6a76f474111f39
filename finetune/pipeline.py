"""What a command does when it takes more than one stage: `ft train` prepares, trains and evaluates in one process."""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.base_files import check_weights, read_model_config, resolved_revision, small_files, weight_files
from finetune.config.load import LoadedConfig, load
from finetune.config.reference import explain
from finetune.config.schema import Config, is_local_base
from finetune.console import Console, duration, size
from finetune.data.prepare import PreparedData, prepare
from finetune.errors import StorageError
from finetune.export.base_identity import fingerprint
from finetune.model.adapter import check_targets
from finetune.plan.estimate import as_written
from finetune.redaction import redacted
from finetune.resuming import Resumption, choose_run, nothing_to_do, reserved, resumption
from finetune.runs.files import write_json, write_text
from finetune.runs.folder import RunFolder, check_adapter
from finetune.runs.log import logged, stay_offline, without_compiler
from finetune.runs.manifest import day_of, provenance, resolved_yaml, timestamp
from finetune.runs.resolved import config_of
from finetune.runs.tracking import check_tracking, prepare_tracking
from finetune.stopping import Stopped, Stopper, stoppable
from finetune.train.length import steps_in_all

if TYPE_CHECKING:
    from finetune.evaluate.compare import Comparison
    from finetune.train.sft import Trained

CACHE = ".data"
"""Where prepared data is kept, below the folder of the runs: as private as they are, and gone with them."""


@dataclass(frozen=True)
class Finished:
    """What `ft train` leaves: the run, and whether it was trained just now or had been finished before."""

    run: RunFolder
    already: bool


def train(
    path: Path,
    overrides: Sequence[str],
    runs: Path,
    console: Console,
    *,
    fresh: bool = False,
    allow_changed: Sequence[str] = (),
) -> Finished:
    """Config file → finished run. The same call again goes on after a fault, and trains nothing twice.

    Raises `Stopped` where a signal asks for it, at the end of a training step at the latest.
    """
    with stoppable() as stopper:
        for key in allow_changed:
            explain(key)  # which says so if there is no such key
        loaded = load(path, overrides)
        stay_offline(loaded.config)
        without_compiler(loaded.config)
        run = choose_run(loaded, runs, console, fresh=fresh)
        # Everything that can be wrong with the input is found before anything is written and before torch is loaded.
        check_tracking(loaded.config)
        folder = small_files(loaded.config)
        if is_local_base(loaded.config.base):
            check_weights(folder)
        check_targets(loaded.config, folder, loaded.place("lora.targets"))
        with reserved(run):
            if nothing_to_do(run, loaded):
                return Finished(run, already=True)
            resuming = resumption(run, loaded, runs, tuple(allow_changed), console)
            data = prepare_shown(loaded.config, folder, runs / CACHE, console, resuming.day)
            resuming = resuming.compared(loaded, data, steps_in_all(loaded.config, data), console)
            base = weight_files(loaded.config)
            base_files = fingerprint(base)
            resuming = resuming.compared_base(loaded, base_files, console)
            exported = [path.name for path in (run.merged, run.gguf) if path.exists()]
            _begin(loaded, data, base, base_files, resuming)
            console.event("run", path=str(run.path), resuming=resuming.checkpoint is not None)
            try:
                with logged(run.log):
                    trained, comparison = _train_and_evaluate(
                        loaded.config, data, run, console, stopper, base, base_files
                    )
            except Stopped:
                with contextlib.suppress(StorageError):  # what was asked for is done, whether or not that is noted
                    run.update_manifest(state="interrupted", ended=timestamp())
                raise
            except BaseException as error:
                with contextlib.suppress(StorageError):  # a full disk must not hide what went wrong first
                    run.update_manifest(state="failed", ended=timestamp(), error=redacted(str(error).split("\n")[0]))
                raise
            _finish(run, trained, comparison, console)
            if exported:
                console.warn(
                    f"{' and '.join(exported)} in {run.path} may hold the adapter as it was before: remove what "
                    "`ft export` says is something else, and export again"
                )
    return Finished(run, already=False)


def _begin(
    loaded: LoadedConfig, data: PreparedData, base: Path, base_files: dict[str, str], resuming: Resumption
) -> None:
    """Write down what is about to be trained."""
    run = resuming.run
    write_text(run.config, redacted(loaded.path.read_text("utf-8")))
    write_text(run.resolved, resolved_yaml(loaded))
    began = run.read_manifest() if resuming.checkpoint is not None else {}
    fields = provenance(loaded) | {
        "day": resuming.day.date().isoformat(),
        "changes": list(resuming.changes),
        "revision": resolved_revision(base) or loaded.config.revision,
        "base_files": base_files,
        "accounting": data.accounting.as_dict(),
        "prepared": data.store.folder.name,
    }
    if "started" in began:
        fields["started"] = began["started"]
    ended = dict.fromkeys(("ended", "error", "steps", "final_loss", "train_seconds", "peak_memory_bytes"))
    run.update_manifest(**ended, **fields)
    prepare_tracking(loaded.config, run)


def evaluate(run: RunFolder, console: Console) -> Comparison | None:
    """Evaluate a finished run again, from disk."""
    from finetune.evaluate.compare import compare
    from finetune.export.adapter import read_adapter
    from finetune.model.adapter import load_adapter
    from finetune.model.base import LoadedModel, load_base
    from finetune.model.hardware import detect

    check_adapter(run)
    read_adapter(run.adapter)  # which refuses what PEFT would take, and did not train here
    config = config_of(run)
    folder = small_files(config)
    cache = run.path.parent / CACHE
    # A run that was moved elsewhere leaves no copy of its data there.
    kept = cache if cache.is_dir() else None
    data = prepare_shown(config, folder, kept, console, day_of(run.read_manifest()))
    with logged(run.log), console.progress("evaluating") as progress:
        loaded = load_base(config, weight_files(config), detect())
        loaded = LoadedModel(load_adapter(loaded, run.adapter), loaded.hardware)
        comparison = compare(config, data, loaded, lambda what, done, total: progress.update(done, what))
    if comparison is not None:
        write_json(run.evaluation, comparison.as_dict())
    return comparison


def prepare_shown(
    config: Config, folder: Path, cache: Path | None, console: Console, day: datetime.datetime | None = None
) -> PreparedData:
    """Prepare the data, with progress and an account of what was read. `day` is what chat templates are told."""
    with console.progress("tokenising", unit="rows") as progress:
        data = prepare(config, folder, cache=cache, today=day, on_progress=progress.update)
    console.event(
        "data",
        cached=data.cached,
        tokens=data.tokens,
        supervised_tokens=data.supervised_tokens,
        sequences=data.sequences,
        accounting=data.accounting.as_dict(),
    )
    if not console.json_events:
        for line in account(data):
            console.say(line)
    return data


def account(data: PreparedData) -> list[str]:
    """Where the rows went and what was found on the way, in a few lines."""
    accounting = data.accounting
    formats = ", ".join(f"{name} ({format_})" for name, format_ in accounting.formats.items())
    share = data.supervised_tokens / max(data.tokens, 1)
    known = ", prepared before" if data.cached else ""
    lost = f"which lost {accounting.lost_supervised_tokens:,} tokens with loss"
    lines = [
        f"data: {accounting.read:,} rows from {formats}{known}",
        f"      {accounting.used:,} to train on in {data.sequences:,} sequences "
        f"({data.tokens:,} tokens, {share:.0%} with loss), {accounting.held_out:,} held out",
    ]
    if accounting.template is not None and "; " in accounting.template:
        lines.append(f"      chat template {accounting.template}")
    for reason, count in accounting.dropped.items():
        lines.append(f"      {count:,} dropped: {reason} (the first: {accounting.first_dropped[reason]})")
    if accounting.truncated:
        lines.append(f"      {accounting.truncated:,} cut to train.sequence_length, {lost}")
    if accounting.split:
        lines.append(f"      {accounting.split:,} split to fit train.sequence_length, {lost}")
    exact, near = accounting.exact_duplicates, accounting.near_duplicates
    if exact or near:
        first = accounting.first_duplicate
        lines.append(f"      {exact:,} repeat an earlier row exactly, {near:,} nearly (the first: {first})")
    if accounting.leaked:
        lines.append(
            f"      {accounting.leaked:,} held-out rows are also trained on, as allowed: their loss says little"
        )
    for kind, count in accounting.found.items():
        lines.append(f"      {count:,} with {kind} (the first: {accounting.first_found[kind]})")
    return lines


def _train_and_evaluate(
    config: Config,
    data: PreparedData,
    run: RunFolder,
    console: Console,
    stopper: Stopper,
    base: Path,
    base_files: dict[str, str],
) -> tuple[Trained, Comparison | None]:
    """Load, train, evaluate. The heavy imports happen here, inside the log."""
    console.say(f"loading {config.base}")
    began = time.monotonic()
    # Importing makes a million objects that stay: looking for garbage among them, again and again, is wasted time.
    gc.disable()
    from finetune.evaluate.compare import compare, try_longest
    from finetune.model.base import load_base
    from finetune.model.hardware import choose_optimizer, detect
    from finetune.model.recompute import blocks
    from finetune.train.fitting import expected
    from finetune.train.sft import train as run_training

    hardware = detect()
    gc.enable()
    gc.freeze()
    plan = expected(config, data, read_model_config(base), hardware, run)
    for line in plan.lines():
        console.say(line)
    console.event("plan", **plan.as_dict())
    optimizer, why_optimizer = choose_optimizer(config, hardware)
    loaded = load_base(config, base, hardware)
    fit = plan.fit or as_written(config, len(blocks(loaded.model)), hardware.device)
    choices = {
        "device": hardware.name,
        "compute": hardware.dtype_reason,
        "quantization": config.quantization,
        "optimizer": why_optimizer,
    }
    planned = {name: part for name, part in plan.as_dict().items() if name != "why"}  # that is in `fit`
    run.update_manifest(choices=choices, plan=planned)
    console.say(
        f"loaded in {duration(time.monotonic() - began)}: {config.quantization} on {hardware.name}, {optimizer}"
    )
    console.say(f"      compute: {hardware.dtype_reason}")
    console.say(f"training: {steps_in_all(config, data):,} steps of {fit}")
    try_longest(data, loaded)
    trained = run_training(config, data, loaded, run, console, stopper, base_files, fit, plan.why)
    time_planned = f" (estimated {duration(plan.estimate.seconds)})" if plan.estimate is not None else ""
    memory_planned = f" (estimated {size(plan.memory)})" if plan.memory is not None else ""
    console.say(
        f"trained {trained.steps:,} steps in {duration(trained.seconds)}{time_planned}, "
        f"peak memory {size(trained.peak_memory)}{memory_planned}"
    )
    with console.progress("evaluating") as progress:
        comparison = compare(config, data, trained.loaded, lambda what, done, total: progress.update(done, what))
    return trained, comparison


def _finish(run: RunFolder, trained: Trained, comparison: Comparison | None, console: Console) -> None:
    if comparison is not None:
        write_json(run.evaluation, comparison.as_dict())
        show_comparison(comparison, console)
        if math.isfinite(comparison.base.loss) and not math.isfinite(comparison.tuned.loss):
            console.warn("the tuned model's loss is not a number: its answers are worth nothing")
    run.update_manifest(
        state="finished",
        ended=timestamp(),
        steps=trained.steps,
        train_seconds=round(trained.seconds, 1),
        peak_memory_bytes=trained.peak_memory,
        final_loss=trained.final_loss,
    )


def show_comparison(comparison: Comparison, console: Console) -> None:
    """The closing table, base against tuned, and a few answers by both."""
    base, tuned = comparison.base, comparison.tuned
    rows = [
        ["loss", f"{base.loss:.4f}", f"{tuned.loss:.4f}"],
        ["perplexity", f"{base.perplexity:,.2f}", f"{tuned.perplexity:,.2f}"],
    ]
    if base.exact_match is not None and tuned.exact_match is not None:
        rows.append(["exact match", f"{base.exact_match:.1%}", f"{tuned.exact_match:.1%}"])
    console.event("evaluation", **comparison.as_dict())
    if console.json_events:
        return
    console.say()
    console.table([f"{comparison.rows} held-out rows", "base", "tuned"], rows)
    for sample in comparison.samples:
        console.say()
        for label, text in (
            ("prompt", sample.prompt),
            ("expected", sample.reference),
            ("base", sample.base),
            ("tuned", sample.tuned),
        ):
            console.say(f"{console.style(f'{label:>9}', 'dim')}  {one_line(text)}")


def one_line(text: str, width: int = 100) -> str:
    """A text on one line, cut to a width."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
