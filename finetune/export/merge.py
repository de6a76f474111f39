"""base + adapter = merged: a model folder that needs no PEFT.

Everything that can be refused is refused before the first byte is written, and the folder takes its name when it is
whole.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ExportError
from finetune.export.merged import BasePrecision, DType, MergedWeights, merged_model
from finetune.export.safetensors_io import CheckpointWriter
from finetune.runs.files import copy_file, partial_folder, refuse_existing, require_space, write_text

OnTensor = Callable[[int, int, str], None]
"""Called before each tensor is begun with how many were begun before, how many there are, and this one's name."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json",
)  # fmt: skip
"""What makes up a tokenizer on disk; those that exist are copied."""

_SMALL_FILES_BYTES = 64 * 2**20
"""Room for the configuration and the tokenizer, beside the weights."""


MAX_THREADS = 4
"""More only wait for the disk, and each holds a few pieces of weights."""


@dataclass(frozen=True)
class MergeReport:
    """What was made."""

    out: Path
    merged: int
    """Tensors that the adapter changed."""
    copied: int
    """Tensors taken over from the base (cast, if another dtype was asked for)."""
    nbytes: int
    """Size of the weights."""
    seconds: float


def merge(
    base: Path,
    adapter: Path | Sequence[Path],
    out: Path,
    *,
    tokenizer: Path,
    dtype: DType | None,
    base_precision: BasePrecision = "stored",
    recorded: Mapping[str, Any] | None = None,
    on_tensor: OnTensor | None = None,
) -> MergeReport:
    """Write the model folder `out`: the weights of `base` with `adapter` put in, and the run's own `tokenizer`.

    Arguments and errors as for `merged_model`; also ExportError for numbers that are not finite, for a merge that would
    change nothing and for an `out` that exists, StorageError for what cannot be written.
    """
    started = time.monotonic()
    refuse_existing(out)
    files = _tokenizer_files(tokenizer)
    model = merged_model(
        base, adapter, tokenizer=tokenizer, dtype=dtype, base_precision=base_precision, recorded=recorded
    )
    planned = list(model.weights.tensors.values())
    needed = sum(tensor.nbytes for tensor in planned) + _SMALL_FILES_BYTES
    require_space(out.parent, needed, "the merged model")
    with partial_folder(out, needed=needed) as folder:
        writer = CheckpointWriter(folder, planned)
        require_space(folder, needed, "the merged model", largest=writer.largest_bytes)
        with writer:
            _write_all(writer, model.weights, on_tensor)
        model.require_change()
        # What a stranger put into the base for others to execute is not handed on.
        config = {name: value for name, value in model.config.items() if name != "auto_map"}
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        # The run's own says which tokens end an answer under the template it was trained with.
        for source in (tokenizer, base):
            if (source / "generation_config.json").is_file():
                copy_file(source / "generation_config.json", folder / "generation_config.json")
                break
        for file in files:
            copy_file(file, folder / file.name)
    merged = len(model.weights.changes)
    return MergeReport(out, merged, len(planned) - merged, writer.total_bytes, time.monotonic() - started)


def _write_all(writer: CheckpointWriter, weights: MergedWeights, on_tensor: OnTensor | None) -> None:
    """Read, compute and write, a piece of a tensor at a time, on several threads: while one waits for the disk, another
    computes. Few pieces are begun ahead, so memory stays the same for any model."""
    threads = min(MAX_THREADS, os.cpu_count() or 1)

    def work(name: str, first: int, count: int, row: int) -> None:
        writer.write_at(name, first * row, weights.rows(name, first, count))

    with _one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        running: set[Future[None]] = set()
        try:
            for done, tensor in enumerate(writer.order):
                if on_tensor:
                    on_tensor(done, len(writer.order), tensor.name)
                for first, count in weights.pieces(tensor.name):
                    running.add(pool.submit(work, tensor.name, first, count, tensor.nbytes // max(1, tensor.rows)))
                    if len(running) > threads:
                        running = _some_done(running)
            while running:
                running = _some_done(running)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _some_done(running: set[Future[None]]) -> set[Future[None]]:
    """What is left of these when at least one is done. Raises what one of them raised."""
    done, left = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return left


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The pieces are the parallel work: torch's own threads on top of them would only fight for the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json") for file in found):
        raise ExportError("there is no tokenizer here", place=str(folder))
    return found
