"""A model, on disk or a base with its adapter, → one GGUF file, tensor by tensor."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.errors import BaseError, ExportError, MissingExtraError, Problem
from finetune.export.gguf.encode import FILE_TYPES, Quant, choose, encode, nbytes
from finetune.export.gguf.families import FAMILIES
from finetune.export.gguf.family import Config, Family, Metadata, PlannedTensor, plan
from finetune.export.gguf.tokenizer import read_tokenizer
from finetune.export.partial import partial_file, refuse_existing, require_space
from finetune.export.safetensors_io import largest
from finetune.export.source import Model

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
    nbytes: int
    seconds: float
    stop: tuple[str, ...]
    """The tokens that end an answer, as text."""
    notes: tuple[str, ...]
    """In which rare respects llama.cpp will differ from the model as trained; empty when none is known."""


@dataclass(frozen=True)
class _Target:
    """One tensor of the file: what it is called, how it is stored, where its rows come from."""

    name: str
    shape: tuple[int, ...]
    quant: Quant
    rows: Callable[[], Iterator[torch.Tensor]]


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
    quant  how matrices are stored (vectors are float32, matrices whose rows q8_0 cannot cut into 32s are float16)
    name   for the file's metadata; None takes it from `out`

    Raises ExportError for what llama.cpp would run differently or not at all, and for an `out` that exists;
    MissingExtraError without the `gguf` package; BaseError and StorageError for what cannot be read or written.
    """
    started = time.monotonic()
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("the GGUF format is not installed", hint='pip install "finetune[gguf]"')
    refuse_existing(out)
    config = _load_config(model)
    family = _family(config, model.place)
    targets = [_target(tensor, quant) for tensor in plan(family, config, model.weights)]
    targets += [_computed(target, tensor) for target, tensor in family.extra(config).items()]
    rows = next(target.shape[0] for target in targets if target.name == "token_embd.weight")
    tokenizer = read_tokenizer(model.tokenizer, rows)
    metadata: Metadata = {
        "general.type": "model",
        "general.name": _safe_name(name or out.stem, family),
        "general.file_type": FILE_TYPES[quant],
        "general.quantization_version": 2,
        f"{family.architecture}.vocab_size": rows,
    }
    size = sum(nbytes(target.shape, target.quant) for target in targets)
    require_space(out.parent, size + _METADATA_BYTES)
    with partial_file(out) as path:
        _write_head(path, family, metadata | family.metadata(config) | tokenizer.metadata, targets)
        with path.open("ab") as file:
            for done, target in enumerate(targets):
                if on_tensor:
                    on_tensor(done, len(targets), target.name)
                _write_tensor(file, target, model.place)
            total = file.tell()
    notes = (*family.notes(config), *tokenizer.notes)
    seconds = time.monotonic() - started
    return GgufReport(out, family.architecture, quant, len(targets), total, seconds, tokenizer.stop, notes)


def _load_config(model: Model) -> Config:
    from transformers import AutoConfig

    values = {key: value for key, value in model.config.items() if key != "auto_map"}  # that would run remote code
    place = str(model.place / "config.json")
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # transformers raises KeyError, ValueError and its validators' own
        raise BaseError(f"its configuration cannot be loaded: {error}", place=place) from error


def _family(config: Config, folder: Path) -> Family:
    place = str(folder / "config.json")
    names = list(getattr(config, "architectures", None) or [])
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ExportError(
            f"its architecture is {', '.join(names) or 'not stated'}; these can be converted: {', '.join(FAMILIES)}",
            place=place,
        )
    if problems := family.refusals(config):
        raise ExportError([Problem(message, place) for message in problems])
    return family


def _safe_name(name: str, family: Family) -> str:
    # llama.cpp treats the spaces after special tokens differently in any model with Phi-3 in its name, and does not
    # load it at all if it has no token `</s>`.
    return name if family.architecture == "phi3" else re.sub(r"(?i)phi-?3", "Phi 3", name)


# -- tensors ------------------------------------------------------------------------------------------------------


def _target(tensor: PlannedTensor, quant: Quant) -> _Target:
    return _Target(tensor.target, tensor.shape, choose(tensor.shape, quant), tensor.rows)


def _computed(name: str, tensor: torch.Tensor) -> _Target:
    return _Target(name, tuple(tensor.shape), "f32", lambda: iter([tensor]))


def _write_tensor(file: IO[bytes], target: _Target, model: Path) -> None:
    import torch

    file.write(bytes(-file.tell() % ALIGNMENT))
    limit = torch.finfo(torch.float16 if target.quant == "f16" else torch.float32).max
    for chunk in target.rows():
        found = largest(chunk)
        if not found <= limit:  # NaN is not less or equal either
            raise ExportError(
                f"`{target.name}` has values that {target.quant} cannot hold ({found:g})",
                place=str(model),
                hint="convert to bf16 or f32",
            )
        file.write(encode(chunk, target.quant))


# -- metadata -----------------------------------------------------------------------------------------------------


def _write_head(path: Path, family: Family, metadata: Mapping[str, Any], targets: list[_Target]) -> None:
    """Everything before the first tensor: sizes and places of the tensors are known from their shapes."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, family.architecture)
    for key, value in metadata.items():
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
    for target in targets:
        size = nbytes(target.shape, target.quant)
        kind = GGMLQuantizationType[target.quant.upper()]
        writer.add_tensor_info(target.name, target.shape, numpy.dtype(numpy.float32), size, kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
