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
from finetune.errors import ConfigError, Problem
from finetune.export.gguf.encode import Quant
from finetune.runs.folder import RunFolder
from finetune.stopping import stoppable

__all__ = ["Wishes", "export", "merge"]

FORMATS = ("gguf", "hf", "gguf-lora")
DEFAULT_QUANT: Quant = "q8_0"
QUANTS: dict[str, Quant] = {quant: quant for quant in get_args(Quant)}


def merge(run: RunFolder, wishes: Wishes, console: Console) -> None:
    """`ft merge`: base + adapter in 16 bit, into the run folder, proven."""
    with stoppable(), run.lock():
        write_merged(run, wishes, console)


def export(run: RunFolder, to: str, quants: Sequence[str], wishes: Wishes, console: Console) -> None:
    """`ft export`: a folder for transformers, GGUF files with their Modelfile, or the adapter alone as GGUF."""
    if to not in FORMATS:
        raise ConfigError(f"--to is one of {', '.join(FORMATS)}, not {to!r}", hint=f"`ft export {run.path} --to gguf`")
    chosen = _chosen(quants or [DEFAULT_QUANT])
    _refuse_ignored(to, quants, wishes)
    with stoppable(), run.lock():
        if to == "hf":
            write_merged(run, wishes, console)
            console.say(f"next: {run.merged} loads with transformers, vLLM and mlx-lm")
            console.say(f"      {adapter_in_vllm(run)}")
        elif to == "gguf-lora":
            write_lora(run, wishes, console)
        else:
            write_gguf(run, chosen, wishes, console)


def _refuse_ignored(to: str, quants: Sequence[str], wishes: Wishes) -> None:
    """Raise ConfigError for what was asked for and has no effect on this format: whoever asked expects one."""
    no_modelfile = {
        "gguf": None,
        "gguf-lora": None if wishes.ollama_base else "no Modelfile is written without --ollama-base",
        "hf": "no Modelfile is written",
    }[to]
    precision = {"hf": "the model is written in its base's precision", "gguf-lora": "the adapter is written in float32"}
    ignored = {
        "--quant": precision.get(to) if quants else None,
        "--base": "the adapter is put onto nothing" if to == "gguf-lora" and wishes.onto != "stored" else None,
        "--system": no_modelfile if wishes.system is not None else None,
        "--ollama-template": no_modelfile if wishes.ollama_template else None,
        "--ollama-base": no_modelfile if wishes.ollama_base else None,
    }
    if wishes.ollama_template and to == "gguf-lora" and not no_modelfile:
        ignored["--ollama-template"] = "Ollama takes the base's template"
    if wishes.ollama_base and to == "gguf":
        ignored["--ollama-base"] = "the file is a whole model"
    problems = [
        Problem(f"means nothing with --to {to}: {why}", option, "leave it out")
        for option, why in ignored.items()
        if why is not None
    ]
    if problems:
        raise ConfigError(problems)


def _chosen(quants: Sequence[str]) -> list[Quant]:
    wanted = [name.strip().lower() for quant in quants for name in quant.split(",")]
    for name in wanted:
        if name not in QUANTS:
            raise ConfigError(f"--quant is one of {', '.join(QUANTS)}, not {name!r}", hint="q8_0 is the usual choice")
    return list(dict.fromkeys(QUANTS[name] for name in wanted))
