"""`ft chat`: talk to a run's newest artifact, through llama.cpp for a GGUF file, else through transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from finetune.console import Console
from finetune.data.conversation import Message
from finetune.errors import RunError
from finetune.runs.folder import RunFolder
from finetune.runs.log import logged

Answer = Callable[[list[Message]], Iterator[str]]

USING = ("auto", "adapter", "merged", "gguf")


@dataclass(frozen=True)
class Settings:
    using: str
    system: str | None
    max_tokens: int
    temperature: float


def talk(run: RunFolder, settings: Settings, prompt: str | None, console: Console) -> None:
    """Answer one prompt, or converse until an empty line. Answers go to stdout, everything else to stderr."""
    kind, path = newest_artifact(run, settings.using)
    history = [Message("system", settings.system)] if settings.system else []
    with ExitStack() as stack:
        with logged(run.log):
            console.say(f"loading {path}")
            answer = _open(kind, path, run, settings, stack)
        while True:
            text = prompt if prompt is not None else _ask(console)
            if not text:
                return
            history.append(Message("user", text))
            said = ""
            for piece in answer(history):
                said += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()
            history.append(Message("assistant", said))
            if prompt is not None:
                return


def newest_artifact(run: RunFolder, using: str) -> tuple[str, Path]:
    """The artifact that was written last (or the one that is asked for), and its kind."""
    if using not in USING:
        raise RunError(
            f"--using is one of {', '.join(USING)}, not {using!r}", hint=f"`ft chat {run.path} --using adapter`"
        )
    candidates = [("adapter", run.adapter), ("merged", run.merged)]
    candidates += [("gguf", path) for path in run.gguf.glob("*.gguf")]
    present = [(kind, path) for kind, path in candidates if path.exists() and using in ("auto", kind)]
    if not present:
        how = {"merged": f"`ft merge {run.path}`", "gguf": f"`ft export {run.path} --to gguf`"}.get(using, "`ft train`")
        raise RunError(f"this run has no {using}", place=str(run.path), hint=f"{how} makes it")
    return max(present, key=lambda pair: pair[1].stat().st_mtime)


def _ask(console: Console) -> str:
    try:
        if sys.stdin.isatty():
            sys.stderr.write(console.style("you › ", "cyan"))
            sys.stderr.flush()
        return sys.stdin.readline().strip()
    except KeyboardInterrupt:
        return ""


def _open(kind: str, path: Path, run: RunFolder, settings: Settings, stack: ExitStack) -> Answer:
    if kind == "gguf":
        from finetune.llamacpp import LlamaCpp

        # 0: as much context as the model was trained with.
        runtime = LlamaCpp(path, context=0, log=run.log)
        stack.callback(runtime.close)
        return lambda history: runtime.chat(
            [message.as_dict() for message in history],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
        )
    return _transformers(kind, path, run, settings)


def _transformers(kind: str, path: Path, run: RunFolder, settings: Settings) -> Answer:
    import datetime

    from finetune.base_files import weight_files
    from finetune.config.load import load
    from finetune.data.template import choose_template, end_of_turn
    from finetune.data.tokenizer import load_tokenizer
    from finetune.model.adapter import load_adapter
    from finetune.model.base import LoadedModel, load_base
    from finetune.model.generate import stream
    from finetune.model.hardware import detect

    config = load(run.resolved, references=False).config
    # The adapter's own folder holds the tokenizer and the template that it was trained with.
    tokenizer = load_tokenizer(run.adapter)
    template = choose_template(None, tokenizer, datetime.datetime.now())
    stop_ids, _ = end_of_turn(template, tokenizer)
    if kind == "merged":
        plain = config.model_copy(update={"base": str(path), "quantization": "none"})
        loaded = load_base(plain, path, detect())
    else:
        loaded = load_base(config, weight_files(config), detect())
        loaded = LoadedModel(load_adapter(loaded, run.adapter), loaded.hardware)

    def answer(history: list[Message]) -> Iterator[str]:
        prompt = tokenizer.encode(template.render(history, add_generation_prompt=True), special=False)
        ids: list[int] = []
        shown = ""
        for token in stream(
            loaded.model,
            prompt,
            max_new_tokens=settings.max_tokens,
            stop_ids=stop_ids,
            temperature=settings.temperature,
        ):
            ids.append(token)
            text = tokenizer.decode(ids)
            # A character of several tokens is shown once it is complete.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text

    return answer
