"""A model, on disk or a base with its adapter, → one GGUF file, tensor by tensor."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import MissingExtraError
from finetune.export.gguf.encode import Encoding, Piece, Quant, cut, encode_all, nbytes, require_encoders
from finetune.export.gguf.families import family_of, load_config
from finetune.export.gguf.family import Family, Metadata, PlannedTensor, plan
from finetune.export.gguf.head import as_stored
from finetune.export.gguf.mix import QUANTS, Mix, ModelShape, choose
from finetune.export.gguf.tokenizer import read_tokenizer
from finetune.export.source import Model
from finetune.runs.files import partial_file, refuse_existing, require_space

if TYPE_CHECKING:
    import torch

ALIGNMENT = 32
"""Every tensor begins at a multiple of this many bytes: the format's default."""

_METADATA_BYTES = 64 * 2**20
"""Room for the vocabulary and the other metadata, beside the tensors."""


@dataclass(frozen=True)
class GgufReport:
    """What was made."""

    out: Path
    architecture: str
    quant: Quant
    tensors: int
    encodings: Mapping[Encoding, int]
    """How many tensors are stored in which way."""
    nbytes: int
    seconds: float
    stop: tuple[str, ...]
    """The tokens that end an answer, as text."""
    notes: tuple[str, ...]
    """In which rare respects llama.cpp will differ from the model as trained, and which tensors could not be stored as
    the quant would have it; empty when there is nothing to say."""


@dataclass(frozen=True)
class GgufPlan:
    """A file that is not written yet: everything about it but the tensors' values, from headers and the tokenizer."""

    place: str
    """The model's, for messages."""
    family: Family
    quant: Quant
    metadata: Metadata
    tensors: Sequence[PlannedTensor]
    mix: Mix
    stop: tuple[str, ...]
    notes: tuple[str, ...]
    """Both as in the report."""

    @property
    def nbytes(self) -> int:
        """Room that the file needs on the disk: up to 64 MiB more than it will have."""
        return sum(nbytes(tensor.shape, self.mix.encodings[tensor.target]) for tensor in self.tensors) + _METADATA_BYTES


def convert(
    model: Model,
    out: Path,
    *,
    quant: Quant,
    on_tensor: Callable[[int, int, str], None] | None = None,
    name: str | None = None,
) -> GgufReport:
    """Write `out`, a GGUF file that llama.cpp runs as transformers runs `model`.

    model  `open_model` of a folder, or `merged_model`; the chat template goes into the file unchanged
    quant  how matrices are stored: the mixture of encodings that llama.cpp makes (`mix.py`); vectors are float32
    name   for the file's metadata; None takes it from `out`

    Raises ExportError for what llama.cpp would run differently or not at all, for values that the quant cannot hold and
    for an `out` that exists; MissingExtraError without the `gguf` package, and for most quants without `xllamacpp`;
    BaseError and StorageError for what cannot be read or written.
    """
    refuse_existing(out)
    return write(plan_file(model, quant=quant, name=name or out.stem), out, on_tensor=on_tensor)


def plan_file(model: Model, *, quant: Quant, name: str) -> GgufPlan:
    """The file that `convert` would write; errors as there, but for values. No weight is read."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("the GGUF format is not installed", hint='pip install "finetune[gguf]"')
    config = load_config(model.config, model.place)
    config = as_stored(family_of(config, model.place), config, model.weights)
    family = family_of(config, model.place)  # again: it may refuse an output head of its own
    planned = plan(family, config, model.weights)
    planned += [_computed(target, tensor) for target, tensor in family.extra(config).items()]
    vocabulary = next(tensor.shape[0] for tensor in planned if tensor.target == "token_embd.weight")
    tokenizer = read_tokenizer(model.tokenizer, vocabulary)
    described = family.metadata(config)
    mix = choose(quant, [(t.target, t.shape) for t in planned], _shape(family.architecture, described))
    require_encoders(set(mix.encodings.values()))
    metadata: Metadata = {
        "general.type": "model",
        "general.name": _safe_name(name, drops_space=tokenizer.drops_space),
        "general.file_type": QUANTS[quant][1],
        "general.quantization_version": 2,
        f"{family.architecture}.vocab_size": vocabulary,
    }
    notes = (*family.notes(config), *mix.notes(), *tokenizer.notes)
    metadata = metadata | described | tokenizer.metadata
    return GgufPlan(str(model.place), family, quant, metadata, planned, mix, tokenizer.stop, notes)


def write(planned: GgufPlan, out: Path, *, on_tensor: Callable[[int, int, str], None] | None = None) -> GgufReport:
    """Write a planned file. Raises ExportError for values that the quant cannot hold and for an `out` that exists,
    StorageError for what cannot be written."""
    started = time.monotonic()
    encodings = planned.mix.encodings
    needed = planned.nbytes
    require_space(out.parent, needed, out.name, largest=needed - _METADATA_BYTES)
    with partial_file(out, needed=needed) as path:
        _write_head(path, planned)
        with path.open("ab") as file:
            for piece, data in encode_all(_pieces(planned.tensors, encodings, planned.place, on_tensor)):
                if piece.first:
                    file.write(bytes(-file.tell() % ALIGNMENT))
                file.write(data)
            total = file.tell()
    return GgufReport(
        out,
        planned.family.architecture,
        planned.quant,
        len(planned.tensors),
        planned.mix.counts(),
        total,
        time.monotonic() - started,
        planned.stop,
        planned.notes,
    )


def _safe_name(name: str, *, drops_space: bool) -> str:
    """A name that llama.cpp draws the right conclusions from: only in a model with Phi-3 in its name does it drop the
    white space after special tokens, and it does not load such a model without a token `</s>`."""
    plain = re.sub(r"(?i)phi-?3", "Phi 3", name)
    return f"{plain} (Phi-3)" if drops_space else plain


# -- tensors ------------------------------------------------------------------------------------------------------


def _computed(name: str, tensor: torch.Tensor) -> PlannedTensor:
    return PlannedTensor(name, tuple(tensor.shape), lambda: iter([tensor]))


def _shape(architecture: str, described: Metadata) -> ModelShape:
    """What the choice of encodings depends on, from the keys that llama.cpp reads it from."""

    def number(key: str, missing: int) -> int:
        value = described.get(f"{architecture}.{key}", missing)
        first = value[0] if isinstance(value, Sequence) else value  # one for each layer: the first one's counts
        return int(first)

    heads = number("attention.head_count", 0)
    return ModelShape(
        architecture,
        layers=number("block_count", 0),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        experts=number("expert_count", 0),
    )


def _pieces(
    planned: Sequence[PlannedTensor],
    encodings: Mapping[str, Encoding],
    place: str,
    on_tensor: Callable[[int, int, str], None] | None,
) -> Iterator[Piece]:
    for done, tensor in enumerate(planned):
        if on_tensor:
            on_tensor(done, len(planned), tensor.target)
        yield from cut(tensor.target, tensor.rows(), encodings[tensor.target], place)


# -- metadata -----------------------------------------------------------------------------------------------------


def _write_head(path: Path, planned: GgufPlan) -> None:
    """Everything before the first tensor: sizes and places of the tensors are known from their shapes."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, planned.family.architecture)
    for key, value in planned.metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor in planned.tensors:
        encoding = planned.mix.encodings[tensor.target]
        kind = GGMLQuantizationType[encoding.upper()]
        size = nbytes(tensor.shape, encoding)
        writer.add_tensor_info(tensor.target, tensor.shape, numpy.dtype(numpy.float32), size, kind)
    finish_head(writer, path)


def finish_head(writer: Any, path: Path) -> None:
    """Write what a GGUFWriter was told, up to where the first tensor begins, and close it."""
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
