"""How a family of models is described to the converter: one rule per kind of tensor.

A family is a small module with one `FAMILY` (see `llama.py`), named in `families.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError, Problem
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
    """One kind of tensor: its name in the model folder, its name in the GGUF file; `{layer}` stands for a number."""

    source: str
    target: str
    reorder: Callable[[torch.Tensor, Config], torch.Tensor] | None = None
    """For runtimes that keep the rows in another order. Shape and dtype stay."""
    when: Callable[[Config], bool] | None = None
    """Whether a model with this configuration has such tensors; None means always."""


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


def plan(family: Family, config: Config, weights: Weights) -> list[PlannedTensor]:
    """Pair every tensor with its rule, in the order of the files.

    Raises ExportError if a tensor has no rule, or a rule that applies lacks a tensor in some layer.
    """
    active = [rule for rule in family.rules if rule.when is None or rule.when(config)]
    patterns = [(re.compile(_pattern(rule.source)), rule) for rule in active]
    ignored = [re.compile(pattern) for pattern in family.ignored(config)]
    planned: list[PlannedTensor] = []
    found: set[str] = set()
    problems: list[str] = []
    for name in weights.tensors:
        if any(pattern.fullmatch(name) for pattern in ignored):
            continue
        for pattern, rule in patterns:
            if match := pattern.fullmatch(name):
                planned.append(_planned(name, rule.target.format(**match.groupdict()), rule, config, weights))
                found.add(name)
                break
        else:
            problems.append(f"`{name}` has no place in a GGUF file of the {family.architecture} architecture")
    for rule in active:
        layers = range(config.num_hidden_layers) if "{layer}" in rule.source else range(1)
        expected = (rule.source.format(layer=layer) for layer in layers)
        problems += [f"`{name}` is missing" for name in expected if name not in found]
    if problems:
        shown = problems[:5] + ([f"… and {len(problems) - 5} more of this kind"] if len(problems) > 5 else [])
        raise ExportError([Problem(message, str(weights.place)) for message in shown])
    return planned


def _planned(source: str, target: str, rule: Rule, config: Config, weights: Weights) -> PlannedTensor:
    stored = weights.tensors[source]
    if not stored.is_float:
        raise ExportError(
            f"`{source}` is stored as {stored.dtype}: this model is quantised",
            place=str(weights.place),
            hint="convert the 16-bit model",
        )

    def rows() -> Iterator[torch.Tensor]:
        if rule.reorder is None:
            yield from weights.chunks(source)
        else:
            yield rule.reorder(weights.read(source), config)

    return PlannedTensor(target, stored.shape, rows)


def _pattern(source: str) -> str:
    return re.escape(source).replace(r"\{layer\}", r"(?P<layer>\d+)")
