"""base + adapter in 16 bit, as a folder in the run."""

from __future__ import annotations

from finetune.console import Console, size
from finetune.delivery.wishes import Wishes, base_of, clear, onto_of, prove_or_record, standing
from finetune.proving import Exported
from finetune.runs.files import partial_of, promote
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged


def write_merged(run: RunFolder, wishes: Wishes, console: Console) -> None:
    """Make `merged/`, or prove the one that is there where nobody has yet."""
    from finetune.export.merge import merge

    config, base = base_of(run)
    onto = onto_of(wishes, config)
    wanted = Exported("merged", run.merged, "")
    found = standing(run, [wanted], onto, verify=wishes.verify)
    proven = found.words(wanted, wishes)
    if not found.missing:
        with logged(run.log):
            prove_or_record(run, config, base, found.unproven, onto, wishes, console)
        console.say(f"merged: {run.merged} (from before; {proven})")
        return
    clear(run.merged)
    partial = partial_of(run.merged)
    with logged(run.log):
        with console.progress("merging", unit="tensors") as progress:
            report = merge(
                base,
                run.adapter,
                partial,
                tokenizer=run.adapter,
                dtype=None,
                base_precision=onto,
                on_tensor=progress.count,
            )
        prove_or_record(run, config, base, [Exported("merged", partial, "")], onto, wishes, console)
        promote(partial, run.merged)
    tensors = report.merged + report.copied
    console.say(f"merged: {run.merged} ({size(report.nbytes)}; {report.merged} of {tensors} tensors changed; {proven})")


def adapter_in_vllm(run: RunFolder) -> str:
    """Whether vLLM could serve the adapter without a merge."""
    from finetune.export.adapter import read_config
    from finetune.export.runtimes import vllm_rank, vllm_refusals

    config = read_config(run.adapter)
    if reasons := vllm_refusals(config):
        return f"vLLM cannot serve the adapter by itself: it has {', '.join(reasons)}"
    return f"vLLM can also serve {run.adapter} beside its base: `--enable-lora --max-lora-rank {vllm_rank(config)}`"
