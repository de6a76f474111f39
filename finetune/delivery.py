"""Taking a trained model out: `ft merge` and `ft export`."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from finetune.base_files import weight_files
from finetune.config.schema import Config, is_local_base
from finetune.console import Console, size
from finetune.data.template import choose_template
from finetune.data.tokenizer import load_tokenizer
from finetune.errors import ConfigError, ExportError, Problem
from finetune.export.gguf.encode import Quant
from finetune.pipeline import config_of
from finetune.proving import Exported, Onto, forget, is_proven, prove
from finetune.runs.files import storage_errors, write_text
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged

FORMATS = ("gguf", "hf", "gguf-lora")
QUANTS: dict[str, Quant] = {quant: quant for quant in get_args(Quant)}


@dataclass(frozen=True)
class Wishes:
    """What a person may want otherwise."""

    onto: str = "stored"
    """The weights that the adapter is put onto: `stored`, or `nf4` as training held them."""
    verify: bool = True
    system: str | None = None
    ollama_template: bool = False
    ollama_base: str | None = None
    """The name that Ollama knows the base by, for a Modelfile of base and adapter."""


def merge(run: RunFolder, wishes: Wishes, console: Console) -> None:
    """`ft merge`: base + adapter in 16 bit, into the run folder, proven."""
    with run.lock():
        _merge(run, wishes, console)


def export(run: RunFolder, to: str, quants: Sequence[str], wishes: Wishes, console: Console) -> None:
    """`ft export`: a folder for transformers, GGUF files with their Modelfile, or the adapter alone as GGUF."""
    if to not in FORMATS:
        raise ConfigError(f"--to is one of {', '.join(FORMATS)}, not {to!r}", hint=f"`ft export {run.path} --to gguf`")
    chosen = _chosen(quants)
    with run.lock():
        if to == "hf":
            _write_folder(run, wishes, console)
        elif to == "gguf-lora":
            _write_lora(run, wishes, console)
        else:
            _write_gguf(run, chosen, wishes, console)


def _merge(run: RunFolder, wishes: Wishes, console: Console) -> None:
    from finetune.export.merge import merge as run_merge
    from finetune.export.partial import discard, partial_of, promote, refuse_existing

    config, base = _base_of(run)
    onto = _onto(wishes, config)
    refuse_existing(run.merged)
    partial = partial_of(run.merged)
    discard(partial)
    with logged(run.log):
        with console.progress("merging", unit="tensors") as progress:
            report = run_merge(
                base,
                run.adapter,
                partial,
                tokenizer=run.adapter,
                dtype=None,
                base_precision=onto,
                on_tensor=progress.count,
            )
        _prove_or_forget(run, config, base, [Exported("merged", partial, "")], onto, wishes, console)
        promote(partial, run.merged)
    tensors = report.merged + report.copied
    proven = "proven" if wishes.verify else "not proven"
    console.say(f"merged: {run.merged} ({size(report.nbytes)}; {report.merged} of {tensors} tensors changed; {proven})")


def _write_folder(run: RunFolder, wishes: Wishes, console: Console) -> None:
    if not run.merged.exists():
        _merge(run, wishes, console)
    elif wishes.verify and not is_proven(run, "merged", run.merged):
        config, base = _base_of(run)
        with logged(run.log):
            _require_proof(run, config, base, [Exported("merged", run.merged, "")], _onto(wishes, config), console)
        console.say(f"merged: {run.merged} (from before; proven)")
    else:
        console.say(f"merged: {run.merged} (from before{'; proven' if wishes.verify else ''})")
    console.say(f"next: {run.merged} loads with transformers, vLLM and mlx-lm")
    console.say(f"      {_adapter_in_vllm(run)}")


def _chosen(quants: Sequence[str]) -> list[Quant]:
    wanted = [name.strip().lower() for quant in quants for name in quant.split(",")]
    for name in wanted:
        if name not in QUANTS:
            raise ConfigError(f"--quant is one of {', '.join(QUANTS)}, not {name!r}", hint="q8_0 is the usual choice")
    return list(dict.fromkeys(QUANTS[name] for name in wanted))


def _onto(wishes: Wishes, config: Config) -> Onto:
    if wishes.onto not in ("stored", "nf4"):
        raise ConfigError(f"--base is stored or nf4, not {wishes.onto!r}", hint="stored is the usual choice")
    if wishes.onto == "nf4" and config.quantization != "nf4":
        raise ConfigError(
            f"--base nf4: this run was trained with quantization: {config.quantization}",
            hint="leave --base out: the stored weights are those that training saw",
        )
    return "nf4" if wishes.onto == "nf4" else "stored"


def _base_of(run: RunFolder) -> tuple[Config, Path]:
    """The run's config and the files of the very base that it was trained on."""
    from finetune.export.base_identity import check_base

    config, manifest = config_of(run), run.read_manifest()
    recorded = manifest.get("revision")
    if isinstance(recorded, str) and not is_local_base(config.base):
        config = config.model_copy(update={"revision": recorded})
    base = weight_files(config)
    check_base(manifest, base)
    return config, base


def _write_gguf(run: RunFolder, quants: Sequence[Quant], wishes: Wishes, console: Console) -> None:
    """Straight from base and adapter: there is no 16-bit copy on the disk on the way."""
    from finetune.export.gguf import convert
    from finetune.export.merged import merged_model
    from finetune.export.partial import discard, partial_of, promote, refuse_existing
    from finetune.export.runtimes import runtime_notes

    config, base = _base_of(run)
    onto = _onto(wishes, config)
    finals = {quant: run.gguf / f"{run.name}-{quant}.gguf" for quant in quants}
    for final in finals.values():
        refuse_existing(final)
    _modelfile(run, quants[0], finals[quants[0]], (), wishes)  # what it cannot hold is found before anything is written
    with storage_errors(run.gguf):
        run.gguf.mkdir(exist_ok=True)
    reports = {}
    with logged(run.log):
        for quant, final in finals.items():
            partial = partial_of(final)
            discard(partial)
            # In float32: what the adapter adds is rounded once, by the quantiser.
            model = merged_model(base, run.adapter, tokenizer=run.adapter, dtype="float32", base_precision=onto)
            with console.progress(f"writing {quant}", unit="tensors") as progress:
                report = convert(model, partial, quant=quant, name=run.name, on_tensor=progress.count)
            model.require_change()
            reports[quant] = report
        exported = [Exported(f"gguf/{final.name}", partial_of(final), quant) for quant, final in finals.items()]
        _prove_or_forget(run, config, base, exported, onto, wishes, console)
        first = quants[0]
        text = _modelfile(run, first, finals[first], reports[first].stop, wishes)
        for final in finals.values():
            promote(partial_of(final), final)
        write_text(run.gguf / "Modelfile", text)
    notes = (
        note
        for quant, report in reports.items()
        for note in (*report.notes, *runtime_notes(report.architecture, quant))
    )
    for note in dict.fromkeys(notes):
        console.say(f"note: {note}")
    proven = ", proven" if wishes.verify else ", not proven"
    for quant, final in finals.items():
        console.say(f"wrote {final} ({size(reports[quant].nbytes)}{proven})")
    console.say(f"next: `ollama create {run.name} -f {run.gguf / 'Modelfile'}`, or `ft chat {run.path}`")
    if line := _for_lm_studio(run, next(iter(finals.values()))):
        console.say(line)


def _ollama_template(run: RunFolder) -> str:
    """The run's chat template in Ollama's own language."""
    from finetune.export.ollama import ollama_template
    from finetune.export.verify.probes import CONVERSATIONS, render

    tokenizer = load_tokenizer(run.adapter)
    template = choose_template(None, tokenizer, datetime.datetime.now())
    bos = template.special.get("bos_token", "")
    # The GGUF file has runtimes put the BOS before every text if the template begins with it.
    return ollama_template(template, adds_bos=bool(bos) and (render(template, CONVERSATIONS[0]) or "").startswith(bos))


def _for_lm_studio(run: RunFolder, file: Path) -> str | None:
    """How to show the file to LM Studio, where that is installed."""
    from finetune.export.runtimes import lm_studio_models, lm_studio_path

    models = lm_studio_models(Path.home())
    if not models.is_dir():
        return None
    place = lm_studio_path(models, "finetune", run.name, file.name)
    folder, source, target = (shlex.quote(str(path)) for path in (place.parent, file, place))
    return f"      LM Studio: `mkdir -p {folder} && cp {source} {target}`"


def _adapter_in_vllm(run: RunFolder) -> str:
    """Whether vLLM could serve the adapter without a merge."""
    from finetune.export.adapter import read_config
    from finetune.export.runtimes import vllm_rank, vllm_refusals

    config = read_config(run.adapter)
    if reasons := vllm_refusals(config):
        return f"vLLM cannot serve the adapter by itself: it has {', '.join(reasons)}"
    return f"vLLM can also serve {run.adapter} beside its base: `--enable-lora --max-lora-rank {vllm_rank(config)}`"


def _modelfile(run: RunFolder, quant: Quant, final: Path, stop: Sequence[str], wishes: Wishes) -> str:
    """The Modelfile of the file that was named first."""
    from finetune.export.ollama import modelfile

    template = _ollama_template(run) if wishes.ollama_template else None
    return modelfile(final.name, stop=stop, system=wishes.system, template=template)


def _prove_or_forget(
    run: RunFolder,
    config: Config,
    base: Path,
    exported: Sequence[Exported],
    onto: Onto,
    wishes: Wishes,
    console: Console,
) -> None:
    if wishes.verify:
        _require_proof(run, config, base, exported, onto, console)
    else:
        forget(run, [one.name for one in exported])


def _require_proof(
    run: RunFolder, config: Config, base: Path, exported: Sequence[Exported], onto: Onto, console: Console
) -> None:
    """Raise ExportError with everything that is wrong; the files keep their `.partial` names then."""
    found = prove(run, config, base, exported, onto, console)
    paths = {one.name: str(one.path) for one in exported}
    problems = [
        Problem(message, paths[name], f"{run.verification} has the numbers")
        for name in found
        for message in found[name]
    ]
    if problems:
        raise ExportError(problems)


def _write_lora(run: RunFolder, wishes: Wishes, console: Console) -> None:
    """The adapter alone. It is proven on its base, which is made into a GGUF file for that and removed again."""
    from finetune.export.gguf import convert
    from finetune.export.gguf.lora import write_lora
    from finetune.export.ollama import adapter_modelfile
    from finetune.export.partial import discard, partial_of, promote, refuse_existing
    from finetune.export.source import Model, open_model

    config, base = _base_of(run)
    final = run.gguf / f"{run.name}-lora.gguf"
    refuse_existing(final)
    modelfile = adapter_modelfile(wishes.ollama_base or "BASE", final.name, system=wishes.system)
    with storage_errors(run.gguf):
        run.gguf.mkdir(exist_ok=True)
    partial, whole = partial_of(final), run.gguf / "base.gguf.partial"
    stored = open_model(base)
    quant: Quant = "f16" if stored.config.get("dtype", stored.config.get("torch_dtype")) == "float16" else "bf16"
    with logged(run.log):
        for path in (partial, whole):
            discard(path)
        write_lora(run.adapter, base, partial, name=run.name)
        try:
            if wishes.verify:
                model = Model(base, stored.config, stored.weights, run.adapter)
                with console.progress("writing the base, to prove the adapter on", unit="tensors") as progress:
                    convert(model, whole, quant=quant, name=run.name, on_tensor=progress.count)
            exported = [Exported(f"gguf/{final.name}", partial, quant, on=whole)]
            _prove_or_forget(run, config, base, exported, "stored", wishes, console)
        finally:
            discard(whole)
        promote(partial, final)
        if wishes.ollama_base:
            write_text(run.gguf / "Modelfile.lora", modelfile)
    proven = "proven" if wishes.verify else "not proven"
    console.say(f"wrote {final} ({size(final.stat().st_size)}, {proven})")
    if wishes.ollama_base:
        console.say(f"next: `ollama create {run.name} -f {run.gguf / 'Modelfile.lora'}`")
    else:
        console.say(f"next: `llama-cli -m BASE.gguf --lora {final}`, or --ollama-base NAME for a Modelfile")
