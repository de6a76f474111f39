"""Taking a trained model out: `ft merge` and `ft export`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from finetune.base_files import weight_files
from finetune.console import Console, Progress, size
from finetune.errors import ConfigError
from finetune.pipeline import config_of
from finetune.runs.files import storage_errors, write_text
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged

Quant = Literal["f32", "f16", "bf16", "q8_0"]
QUANTS: dict[str, Quant] = {"f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8_0"}


def merge(run: RunFolder, console: Console) -> None:
    """`ft merge`: base + adapter in 16 bit, into the run folder."""
    from finetune.export.merge import merge as run_merge

    config = config_of(run)
    with logged(run.log), console.progress("merging", unit="tensors") as progress:
        report = run_merge(
            weight_files(config),
            run.adapter,
            run.merged,
            tokenizer=run.adapter,
            dtype=None,
            on_tensor=_shown_on(progress),
        )
    tensors = report.merged + report.copied
    console.say(f"merged: {run.merged} ({size(report.nbytes)}; {report.merged} of {tensors} tensors changed)")


def export(run: RunFolder, to: str, quant: str, console: Console) -> None:
    """`ft export`: a folder for transformers, or a GGUF file with its Modelfile."""
    if to not in ("hf", "gguf"):
        raise ConfigError(f"--to is hf or gguf, not {to!r}", hint=f"`ft export {run.path} --to gguf`")
    chosen = QUANTS.get(quant)
    if to == "gguf" and chosen is None:
        raise ConfigError(f"--quant is one of {', '.join(QUANTS)}, not {quant!r}", hint="q8_0 is the usual choice")
    if run.merged.exists():
        console.say(f"merged: {run.merged} (from before)")
    else:
        merge(run, console)
    if to == "gguf" and chosen is not None:
        _write_gguf(run, chosen, console)
    else:
        console.say(f"next: {run.merged} loads with transformers and vLLM")


def _write_gguf(run: RunFolder, quant: Quant, console: Console) -> None:
    from finetune.export.gguf import convert
    from finetune.export.runtimes import modelfile
    from finetune.export.source import open_model

    path = run.gguf / f"{run.name}-{quant}.gguf"
    with logged(run.log), console.progress("writing", unit="tensors") as progress:
        with storage_errors(run.gguf):
            run.gguf.mkdir(exist_ok=True)
        report = convert(open_model(run.merged), path, quant=quant, name=run.name, on_tensor=_shown_on(progress))
        write_text(run.gguf / "Modelfile", modelfile(path.name, stop=report.stop))
    for note in report.notes:
        console.say(f"note: {note}")
    console.say(f"wrote {path} ({size(report.nbytes)}) and {run.gguf / 'Modelfile'}")
    console.say(f"next: `ollama create {run.name} -f {run.gguf / 'Modelfile'}`, or `ft chat {run.path}`")


def _shown_on(progress: Progress) -> Callable[[int, int, str], None]:
    def show(done: int, total: int, name: str) -> None:
        progress.total = total
        progress.update(done, name)

    return show
