"""GGUF files in the run: whole models with their Modelfile, or the adapter alone.

A whole model is made straight from base and adapter: there is no 16-bit copy on the disk on the way.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.console import Console, size
from finetune.data.template import choose_template
from finetune.data.tokenizer import load_tokenizer
from finetune.delivery.wishes import Standing, Wishes, base_of, clear, onto_of, prove_or_record, standing
from finetune.errors import StorageError
from finetune.export.gguf.encode import Quant
from finetune.proving import Exported
from finetune.runs.files import discard, partial_of, promote, require_space, storage_errors, write_text
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged
from finetune.runs.manifest import day_of

if TYPE_CHECKING:
    from finetune.export.gguf.convert import GgufPlan


def write_gguf(run: RunFolder, quants: Sequence[Quant], wishes: Wishes, console: Console) -> None:
    """One file per quant and the first one's Modelfile; room for all of them is asked for before the first is begun."""
    from finetune.export.gguf.convert import plan_file, write
    from finetune.export.merged import merged_model

    config, base = base_of(run)
    onto = onto_of(wishes, config)
    wanted = [_file(run, f"{run.name}-{quant}.gguf", quant) for quant in quants]
    _modelfile(run, wanted[0], (), wishes)  # what it cannot hold is found before the tokenizer is looked at
    found = standing(run, wanted, onto, verify=wishes.verify)
    with logged(run.log):
        # In float32: what the adapter adds is rounded once, by the quantiser.
        model = merged_model(base, run.adapter, tokenizer=run.adapter, dtype="float32", base_precision=onto)
        pairs = zip(wanted, quants, strict=True)
        plans = {one.name: plan_file(model, quant=quant, name=run.name) for one, quant in pairs}
        modelfile = _modelfile(run, wanted[0], plans[wanted[0].name].stop, wishes)
        made = [replace(one, path=partial_of(one.path)) for one in found.missing]
        _require_room(run, found.missing, sum(plans[one.name].nbytes for one in made))
        with _removed_on_failure(made):
            for one in made:
                with console.progress(f"writing {one.precision}", unit="tensors") as progress:
                    write(plans[one.name], one.path, on_tensor=progress.count)
            if made:
                model.require_change()
        prove_or_record(run, config, base, [*made, *found.unproven], onto, wishes, console)
        for one in found.missing:
            promote(partial_of(one.path), one.path)
        write_text(run.gguf / "Modelfile", modelfile)
    for note in _notes(plans):
        console.say(f"note: {note}")
    _say_written(wanted, found, wishes, console)
    console.say(f"next: `ollama create {run.name} -f {run.gguf / 'Modelfile'}`, or `ft chat {run.path}`")
    if line := _for_lm_studio(run, wanted[0].path):
        console.say(line)


def write_lora(run: RunFolder, wishes: Wishes, console: Console) -> None:
    """The adapter alone. It is proven on its base, which is made into a GGUF file for that and removed again."""
    from finetune.export.adapter import WEIGHTS
    from finetune.export.gguf.convert import plan_file, write
    from finetune.export.gguf.lora import write_lora as write_adapter
    from finetune.export.ollama import adapter_modelfile
    from finetune.export.source import Model, open_model

    config, base = base_of(run)
    stored = open_model(base)
    quant: Quant = "f16" if stored.config.get("dtype", stored.config.get("torch_dtype")) == "float16" else "bf16"
    wanted = _file(run, f"{run.name}-lora.gguf", quant)
    modelfile = adapter_modelfile(wishes.ollama_base or "BASE", wanted.path.name, system=wishes.system)
    found = standing(run, [wanted], "stored", verify=wishes.verify)
    whole = run.gguf / "base.gguf.partial"
    with logged(run.log):
        clear(whole)
        discard(whole)
        to_prove = [one for one in (*found.missing, *found.unproven) if wishes.verify]
        plan = None
        if to_prove:
            model = Model(base, stored.config, stored.weights, run.adapter)
            plan = plan_file(model, quant=quant, name=run.name)
        with storage_errors(run.adapter):
            adapter_bytes = 2 * (run.adapter / WEIGHTS).stat().st_size  # float32, however it was saved
        made = [replace(one, path=partial_of(one.path)) for one in found.missing]
        needed = adapter_bytes * len(made) + (plan.nbytes if plan else 0)
        _require_room(run, found.missing, needed, also=["the base that it is proven on"] if plan else [])
        for one in made:
            write_adapter(run.adapter, base, one.path, name=run.name)
        try:
            if plan:
                with console.progress("writing the base, to prove the adapter on", unit="tensors") as progress:
                    write(plan, whole, on_tensor=progress.count)
            exported = [replace(one, on=whole) for one in (*made, *found.unproven)]
            prove_or_record(run, config, base, exported, "stored", wishes, console)
        finally:
            discard(whole)
        for one in found.missing:
            promote(partial_of(one.path), one.path)
        if wishes.ollama_base:
            write_text(run.gguf / "Modelfile.lora", modelfile)
    _say_written([wanted], found, wishes, console)
    if wishes.ollama_base:
        console.say(f"next: `ollama create {run.name} -f {run.gguf / 'Modelfile.lora'}`")
    else:
        console.say(f"next: `llama-cli -m BASE.gguf --lora {wanted.path}`, or --ollama-base NAME for a Modelfile")


# -- what is on the disk ------------------------------------------------------------------------------------------


def _file(run: RunFolder, name: str, quant: Quant) -> Exported:
    """One of the run's GGUF files. Raises StorageError where they would lie elsewhere: runs may be a stranger's."""
    if run.gguf.is_symlink():
        hint = "move what it leads to here, or remove it"
        raise StorageError("is a link, and nothing is written through links", place=str(run.gguf), hint=hint)
    return Exported(f"gguf/{name}", run.gguf / name, quant)


def _require_room(run: RunFolder, missing: Sequence[Exported], needed: int, also: Sequence[str] = ()) -> None:
    """Clear the folder of an earlier attempt's files, and see that all that is to come fits."""
    clear(*(one.path for one in missing))
    require_space(run.gguf, needed, " and ".join([*(one.path.name for one in missing), *also]))


@contextlib.contextmanager
def _removed_on_failure(made: Sequence[Exported]) -> Iterator[None]:
    """What is whole when another file does not fit any more is not left behind: nobody would look for it."""
    try:
        yield
    except BaseException:
        for one in made:
            discard(one.path)
        raise


# -- what the person is told --------------------------------------------------------------------------------------


def _notes(plans: Mapping[str, GgufPlan]) -> list[str]:
    from finetune.export.runtimes import runtime_notes

    notes = [(*plan.notes, *runtime_notes(plan.family.architecture, plan.quant)) for plan in plans.values()]
    return list(dict.fromkeys(note for some in notes for note in some))


def _say_written(wanted: Sequence[Exported], found: Standing, wishes: Wishes, console: Console) -> None:
    for one in wanted:
        before = "" if one in found.missing else "from before, "
        console.say(f"wrote {one.path} ({size(one.path.stat().st_size)}, {before}{found.words(one, wishes)})")


def _for_lm_studio(run: RunFolder, file: Path) -> str | None:
    """How to show the file to LM Studio, where that is installed."""
    from finetune.export.runtimes import lm_studio_models, lm_studio_path

    models = lm_studio_models(Path.home())
    if not models.is_dir():
        return None
    place = lm_studio_path(models, "finetune", run.name, file.name)
    folder, source, target = (shlex.quote(str(path)) for path in (place.parent, file, place))
    return f"      LM Studio: `mkdir -p {folder} && cp {source} {target}`"


def _modelfile(run: RunFolder, one: Exported, stop: Sequence[str], wishes: Wishes) -> str:
    """The Modelfile of the file that was named first."""
    from finetune.export.ollama import modelfile

    template = _ollama_template(run) if wishes.ollama_template else None
    return modelfile(one.path.name, stop=stop, system=wishes.system, template=template)


def _ollama_template(run: RunFolder) -> str:
    """The run's chat template in Ollama's own language."""
    from finetune.export.ollama import ollama_template
    from finetune.export.verify.probes import CONVERSATIONS, render

    tokenizer = load_tokenizer(run.adapter)
    template = choose_template(None, tokenizer, day_of(run.read_manifest()))
    bos = template.special.get("bos_token", "")
    # The GGUF file has runtimes put the BOS before every text if the template begins with it.
    return ollama_template(template, adds_bos=bool(bos) and (render(template, CONVERSATIONS[0]) or "").startswith(bos))
