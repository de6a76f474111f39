"""An adapter by itself → a GGUF file that llama.cpp (and Ollama's ADAPTER) puts on top of a base it has already.

llama.cpp adds  s · B(A x)  to what a weight gives, with  s = what the user asks for × `adapter.lora.alpha` / rank,  the
rank being that of the tensor and alpha one number for the whole file (`llama_adapter_lora_weight::get_scale` in
llama-adapter.h). PEFT's scaling is that only in the plainest case: rsLoRA divides by the rank's root, and patterns give
modules alphas and ranks of their own. So alpha is the largest rank here, and what each module still lacks is in its B.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import ExportError, MissingExtraError, Problem, few
from finetune.export.adapter import Adapter, LoraLayer, read_adapter
from finetune.export.gguf.convert import ALIGNMENT, finish_head
from finetune.export.gguf.families import family_of, load_config
from finetune.export.gguf.family import Config, Family, Rule
from finetune.export.renaming import renaming
from finetune.export.safetensors_io.writer import as_bytes
from finetune.export.source import read_config
from finetune.runs.files import partial_file, refuse_existing, require_space

if TYPE_CHECKING:
    import torch

_METADATA_BYTES = 2**20

_PAIR = re.compile(r".+\.lora_[AB](?:\.default)?\.weight")

_EMBEDDING = "changes the embedding, over which llama.cpp aborts where the output layer shares that weight"

_NOT_CARRIED = (
    ("lora_magnitude_vector", "is a magnitude of DoRA, which llama.cpp does not know"),
    ("lora_embedding_", _EMBEDDING),
    ("trainable_tokens", "holds trained tokens"),
    ("token_adapter", "holds trained tokens"),
    (".bias", "is a trained bias"),
)
"""What may be in a name of the adapter's file, and why it has no place in a GGUF adapter."""


@dataclass(frozen=True)
class LoraReport:
    """What was made."""

    out: Path
    architecture: str
    """llama.cpp's name of the family; the base must be of the same."""
    modules: int
    """How many weights of the base the adapter changes."""
    rank: int
    """The largest."""
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class _Change:
    """One weight's part of the file."""

    target: str
    """The weight's name in the base's GGUF file."""
    layer: LoraLayer
    rows: torch.Tensor
    """Which row of the trained B each row in the file is, (out,) int64."""


def write_lora(adapter: Path, base: Path, out: Path, *, name: str | None = None) -> LoraReport:
    """Write `out`, a GGUF adapter that changes a GGUF file of `base` as the trained adapter changes `base`.

    adapter  folder as PEFT saves it
    base     folder with the base's config.json; its weights are not needed
    name     for the file's metadata; None takes it from `out`

    The numbers are float32, as trained but for the scale, which is multiplied into B and rounded once.

    Raises ExportError for what llama.cpp cannot do with an adapter, or would do differently, and for an `out` that
    exists; MissingExtraError without the `gguf` package; BaseError, RunError and StorageError for what cannot be read
    or written.
    """
    started = time.monotonic()
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("the GGUF format is not installed", hint='pip install "finetune[gguf]"')
    refuse_existing(out)
    trained = read_adapter(adapter)
    if refused := [f"`{tensor}` {_reason(tensor)}" for tensor in trained.stored.tensors if not _PAIR.fullmatch(tensor)]:
        raise _refusal(refused, trained)
    config = load_config(read_config(base), base)
    family = family_of(config, base)
    changes = _changes(trained, family, config)
    rank = max(_rank(change.layer) for change in changes)
    size = sum(4 * math.prod(change.layer.shape(part)) for change in changes for part in "AB")
    require_space(out.parent, size + _METADATA_BYTES, out.name, largest=size)
    with partial_file(out, needed=size + _METADATA_BYTES) as path:
        _write_head(path, family.architecture, name or out.stem, rank, changes)
        with path.open("ab") as file:
            for change in changes:
                for half in _halves(change, trained, rank):
                    file.write(bytes(-file.tell() % ALIGNMENT))
                    file.write(as_bytes(half))
            nbytes = file.tell()
    return LoraReport(out, family.architecture, len(changes), rank, nbytes, time.monotonic() - started)


# -- what can be carried over -------------------------------------------------------------------------------------


def _reason(tensor: str) -> str:
    return next((reason for part, reason in _NOT_CARRIED if part in tensor), "was trained in full, or saved along")


def _changes(trained: Adapter, family: Family, config: Config) -> list[_Change]:
    """Every layer of the adapter with its place in the GGUF file."""
    modules = [layer.module for layer in trained.layers]
    places = _places(family, config, modules)
    rename = renaming(modules, places)
    changes: dict[str, _Change] = {}
    problems: list[str] = []
    for layer in trained.layers:
        ways = places.get(rename(layer.module) + ".weight", [])
        problem = _problem(layer, ways, config)
        if problem is None:
            target, rule = ways[0]
            rows = _row_order(rule, layer.shape("B")[0], config)
            if rows is None:
                problem = "is rearranged in a GGUF file as no adapter can be"
            elif target in changes:
                problem = f"changes the same weight as `{changes[target].layer.module}`"
            else:
                changes[target] = _Change(target, layer, rows)
        if problem:
            problems.append(f"`{layer.module}` {problem}")
    if problems:
        raise _refusal(problems, trained)
    return list(changes.values())


def _places(family: Family, config: Config, modules: list[str]) -> dict[str, list[tuple[str, Rule]]]:
    """Tensor of the base → the tensors of the GGUF file that are made of it, and how; of those layers and experts only
    whose numbers occur in the names of the modules (the configuration may speak of any number of them)."""
    numbers = sorted({int(number) for module in modules for number in re.findall(r"(?<=\.)\d+(?=\.)", module)})
    places: dict[str, list[tuple[str, Rule]]] = {}
    for rule in family.rules:
        if rule.when is not None and not rule.when(config):
            continue
        layers = [i for i in numbers if i < config.num_hidden_layers] if "{layer}" in rule.source else [0]
        experts = [i for i in numbers if i < config.num_experts] if "{expert}" in rule.source else [0]
        for layer, expert in itertools.product(layers, experts):
            place = (rule.target.format(layer=layer), rule)
            places.setdefault(rule.source.format(layer=layer, expert=expert), []).append(place)
    return places


def _problem(layer: LoraLayer, ways: list[tuple[str, Rule]], config: Config) -> str | None:
    """Why llama.cpp cannot apply this layer, or None."""
    if layer.parameters:
        return "is a LoRA of a stack of experts, which no adapter in a GGUF file can be"
    if not ways:
        return "has no weight of its own in a GGUF file of this base"
    target, rule = ways[0]
    if "{expert}" in rule.source:
        return "is an expert, which lies in one tensor with all others in a GGUF file"
    if len(ways) > 1 or rule.part is not None:
        return "becomes several tensors in a GGUF file, or a part of one"
    if target == "token_embd.weight":
        return _EMBEDDING
    if layer.fan_in_fan_out:
        return "is stored the other way round (in, out), which no GGUF file is"
    shape = (layer.shape("B")[0], layer.shape("A")[1])
    if config.hidden_size not in shape:
        return f"was trained on a weight of the shape {shape}; this base's hidden size is {config.hidden_size}"
    return None


def _refusal(problems: list[str], trained: Adapter) -> ExportError:
    hint = "export the merged model instead: it carries everything"
    return ExportError([Problem(message, str(trained.stored.place), hint) for message in few(problems)])


# -- what becomes of a layer --------------------------------------------------------------------------------------


def _row_order(rule: Rule, rows: int, config: Config) -> torch.Tensor | None:
    """Which row of the base's weight each row of the GGUF tensor is, (rows,) int64.

    Where rows only change places, B's do so with them: P(B·A) = (P·B)·A. None if that is not all that the rule does, or
    if it cannot be done to as many rows. Found by moving a matrix of two columns, which holds the numbers of its cells.
    """
    import torch

    cells = torch.arange(2 * rows).view(rows, 2)
    try:
        moved = cells if rule.reorder is None else rule.reorder(cells, config)
    except (RuntimeError, IndexError, ZeroDivisionError):
        return None
    order = moved.flatten()[::2] // 2
    whole = moved.shape == cells.shape and torch.equal(order.sort().values, torch.arange(rows))
    return order if whole and torch.equal(moved, cells[order]) else None


def _halves(change: _Change, trained: Adapter, alpha: int) -> Iterator[torch.Tensor]:
    """A, (rank, in), and B', (out, rank), float32: alpha / rank · B'·A is PEFT's scaling · B·A in the file's order."""
    yield _finite(change.layer.read("A"), change, trained, "in float32")
    factor = trained.scaling(change.layer.module) * _rank(change.layer) / alpha
    b = (change.layer.read("B")[change.rows].double() * factor).float()
    yield _finite(b, change, trained, f"once its scale is multiplied in ({factor:g})")


def _finite(half: torch.Tensor, change: _Change, trained: Adapter, when: str) -> torch.Tensor:
    if not bool(half.isfinite().all()):
        raise ExportError(
            f"`{change.layer.module}` has numbers that are not finite {when}",
            place=str(trained.stored.place),
            hint="use a checkpoint from before the loss went wrong",
        )
    return half


def _rank(layer: LoraLayer) -> int:
    return layer.shape("A")[0]


# -- the base, and the file ---------------------------------------------------------------------------------------


def _write_head(path: Path, architecture: str, name: str, alpha: int, changes: list[_Change]) -> None:
    """Everything before the first tensor."""
    import numpy
    from gguf import GGUFWriter

    writer = GGUFWriter(None, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("general.name", name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for change in changes:
        for part in "AB":
            shape = change.layer.shape(part)
            tensor = f"{change.target}.lora_{part.lower()}"
            writer.add_tensor_info(tensor, shape, numpy.dtype(numpy.float32), 4 * math.prod(shape))
    finish_head(writer, path)
