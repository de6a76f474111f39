"""Taking a trained model out: `ft merge` and `ft export`.

The same command again takes what is there and proven as it is, and makes what is missing: a process may be killed
between any two files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from finetune.console import Console
from finetune.delivery.gguf import write_gguf, write_lora
from finetune.delivery.merged import adapter_in_vllm, write_merged
from finetune.delivery.wishes import Wishes
from finetune.errors import ConfigError
from finetune.export.gguf.encode import Quant
from finetune.runs.folder import RunFolder
from finetune.stopping import stoppable

__all__ = ["Wishes", "export", "merge"]

FORMATS = ("gguf", "hf", "gguf-lora")
QUANTS: dict[str, Quant] = {quant: quant for quant in get_args(Quant)}


def merge(run: RunFolder, wishes: Wishes, console: Console) -> None:
    """`ft merge`: base + adapter in 16 bit, into the run folder, proven."""
    with stoppable(), run.lock():
        write_merged(run, wishes, console)


def export(run: RunFolder, to: str, quants: Sequence[str], wishes: Wishes, console: Console) -> None:
    """`ft export`: a folder for transformers, GGUF files with their Modelfile, or the adapter alone as GGUF."""
    if to not in FORMATS:
        raise ConfigError(f"--to is one of {', '.join(FORMATS)}, not {to!r}", hint=f"`ft export {run.path} --to gguf`")
    chosen = _chosen(quants)
    with stoppable(), run.lock():
        if to == "hf":
            write_merged(run, wishes, console)
            console.say(f"next: {run.merged} loads with transformers, vLLM and mlx-lm")
            console.say(f"      {adapter_in_vllm(run)}")
        elif to == "gguf-lora":
            write_lora(run, wishes, console)
        else:
            write_gguf(run, chosen, wishes, console)


def _chosen(quants: Sequence[str]) -> list[Quant]:
    wanted = [name.strip().lower() for quant in quants for name in quant.split(",")]
    for name in wanted:
        if name not in QUANTS:
            raise ConfigError(f"--quant is one of {', '.join(QUANTS)}, not {name!r}", hint="q8_0 is the usual choice")
    return list(dict.fromkeys(QUANTS[name] for name in wanted))
