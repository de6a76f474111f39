"""How a family of models is described to the converter: one rule per kind of tensor.

A family is a small module with one `FAMILY` (see `llama.py`), named in `families.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError, Problem, few
from finetune.export.source import Weights

if TYPE_CHECKING:
    import torch

Config = Any
"""A transformers configuration, as `AutoConfig` loads it: every default is filled in."""

MetadataValue = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
Metadata = dict[str, MetadataValue]
"""GGUF keys and values; whole numbers are written as uint32, others as float32."""


@dataclass(frozen=True)
class Rule:
    """One kind of tensor: its name in the model folder, its name in the GGUF file.

    `{layer}` stands for a number. With `{expert}` in its source, one tensor of the GGUF file is made of as many tensors
    as the model has experts, stacked along a new first dimension. Several rules may name the same source (each takes
    its part of it), and several may name the same target: a model folder has the sources of exactly one of them.
    """

    source: str
    target: str
    reorder: Callable[[torch.Tensor, Config], torch.Tensor] | None = None
    """For runtimes that keep the rows in another order. Shape and dtype stay."""
    when: Callable[[Config], bool] | None = None
    """Whether a model with this configuration has such tensors; None means always."""
    part: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Cuts this tensor out of a source that holds more, given any group of the source's rows (first dimension)."""


@dataclass(frozen=True)
class Family:
    """All that one architecture of llama.cpp needs to know about one architecture of transformers."""

    architecture: str
    """llama.cpp's name, which also begins the metadata keys."""
    rules: Sequence[Rule]
    metadata: Callable[[Config], Metadata]
    """The keys that describe the model (not its tokenizer)."""
    refusals: Callable[[Config], Sequence[str]]
    """What in a configuration llama.cpp would run differently, as messages; empty when it can be converted."""
    notes: Callable[[Config], Sequence[str]] = lambda config: ()
    """What a person should know although it can be converted."""
    extra: Callable[[Config], Mapping[str, torch.Tensor]] = lambda config: {}
    """Tensors that are computed from the configuration, float32."""
    ignored: Callable[[Config], Sequence[str]] = lambda config: ()
    """Patterns of tensor names that the model does not use."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the GGUF file: what it is called, what it looks like, where its rows come from."""

    target: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[torch.Tensor]]
    """The tensor in pieces along its first dimension, in its source's dtype."""


@dataclass(frozen=True)
class _Way:
    """By which rule, and of which tensors, one tensor of the GGUF file can be made."""

    rule: Rule
    sources: tuple[str, ...]


def plan(family: Family, config: Config, weights: Weights) -> list[PlannedTensor]:
    """Find the sources of every tensor of the GGUF file, in the order of the files.

    Raises ExportError if a tensor has no rule, if a rule that applies lacks a tensor in some layer, and for tensors
    that are quantised already or whose shape does not fit the configuration.
    """
    if config.num_hidden_layers > len(weights.tensors):  # before names are made up for each of them
        raise ExportError(
            f"its configuration has {config.num_hidden_layers} layers, its files have {len(weights.tensors)} tensors",
            place=str(weights.place),
            hint="config.json and the weights are of different models",
        )
    ignored = [re.compile(pattern) for pattern in family.ignored(config)]
    stored = {name: i for i, name in enumerate(weights.tensors) if not any(p.fullmatch(name) for p in ignored)}
    chosen: dict[str, _Way] = {}
    known: set[str] = set()
    missing: list[str] = []
    for target, ways in _ways(family, config).items():
        known.update(source for way in ways for source in way.sources)
        there = [way for way in ways if any(source in stored for source in way.sources)]
        if len(there) > 1:
            missing.append(f"`{there[0].sources[0]}` and `{there[1].sources[0]}` both hold `{target}`")
        chosen[target] = there[0] if there else ways[0]
        missing += [f"`{source}` is missing" for source in chosen[target].sources if source not in stored]
    homeless = [
        f"`{name}` has no place in a GGUF file of the {family.architecture} architecture"
        for name in stored
        if name not in known
    ]
    if problems := [*homeless, *missing]:
        raise ExportError([Problem(message, str(weights.place)) for message in few(problems)])
    ordered = sorted(chosen.items(), key=lambda item: min(stored[source] for source in item[1].sources))
    return [_planned(target, way, config, weights) for target, way in ordered]


def _ways(family: Family, config: Config) -> dict[str, list[_Way]]:
    """Every tensor that the GGUF file shall have, by name, and how it can be made: the usual way first."""
    ways: dict[str, list[_Way]] = {}
    for rule in family.rules:
        if rule.when is not None and not rule.when(config):
            continue
        for layer in range(config.num_hidden_layers if "{layer}" in rule.source else 1):
            experts = range(config.num_experts if "{expert}" in rule.source else 1)
            sources = tuple(rule.source.format(layer=layer, expert=expert) for expert in experts)
            ways.setdefault(rule.target.format(layer=layer), []).append(_Way(rule, sources))
    return ways


def _planned(target: str, way: _Way, config: Config, weights: Weights) -> PlannedTensor:
    rule, stacked = way.rule, "{expert}" in way.rule.source
    for source in way.sources:
        if not weights.tensors[source].is_float:
            raise ExportError(
                f"`{source}` is stored as {weights.tensors[source].dtype}: this model is quantised",
                place=str(weights.place),
                hint="convert the 16-bit model",
            )
    shapes = [_shape(source, rule, config, weights) for source in way.sources]
    for source, shape in zip(way.sources, shapes, strict=True):
        if shape != shapes[0]:
            raise ExportError(
                f"`{source}` has the shape {shape}, `{way.sources[0]}` has {shapes[0]}", place=str(weights.place)
            )

    def rows() -> Iterator[torch.Tensor]:
        for source in way.sources:
            if stacked:
                pieces: Iterable[torch.Tensor] = [weights.read(source).unsqueeze(0)]
            elif rule.reorder is not None:
                pieces = [rule.reorder(weights.read(source), config)]
            else:
                pieces = weights.chunks(source)
            yield from pieces if rule.part is None else map(rule.part, pieces)

    return PlannedTensor(target, (len(way.sources), *shapes[0]) if stacked else shapes[0], rows)


def _shape(source: str, rule: Rule, config: Config, weights: Weights) -> tuple[int, ...]:
    """The shape of what a rule makes of one source, found by trying it on a tensor without memory."""
    import torch

    shape = tuple(weights.tensors[source].shape)
    tensor = torch.empty(shape, device="meta")
    try:
        if rule.reorder is not None:
            tensor = rule.reorder(tensor, config)
        if rule.part is not None:
            tensor = rule.part(tensor)
    except (RuntimeError, IndexError, ZeroDivisionError) as error:
        raise ExportError(
            f"`{source}` has the shape {shape}, which does not fit the configuration",
            place=str(weights.place),
            hint="config.json and the weights are of different models",
        ) from error
    return tuple(tensor.shape)
