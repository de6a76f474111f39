"""How each tensor of the merged model comes about: where it is read, and what adapters do to it.

Headers only: nothing of the base's weights is read here. Every part of every adapter finds its tensor, or nothing is
merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.errors import ExportError, Problem, few
from finetune.export.adapter import Adapter, LoraLayer
from finetune.export.changes import AddBias, AddLora, AddToExperts, Change, ReplaceRows
from finetune.export.experts import Stacks, slices
from finetune.export.renaming import EMBEDDINGS, OUTPUT_LAYERS, renaming
from finetune.export.safetensors_io import Checkpoint

Rename = Callable[[str], str]

_CONV1D = ("gpt2", "openai-gpt", "imagegpt")
"""Families whose layers are transformers' `Conv1D`, with weights of (in, out)."""


@dataclass(frozen=True)
class Recipe:
    """One tensor of the merged model."""

    source: Checkpoint
    """The base, or the adapter that saved this tensor in full."""
    name: str
    """Its name there."""
    like: str
    """The base's tensor whose place it takes: the same name, or the embedding's for an output layer that shared it."""
    changes: tuple[Change, ...] = ()
    quantised: bool = False
    """Whether training saw this weight in NF4."""
    flipped: bool = False
    """Whether it lies as (in, out), and so was turned before it was quantised."""

    @property
    def needs_whole(self) -> bool:
        return self.quantised or any(change.needs_whole for change in self.changes)


@dataclass(frozen=True)
class Plan:
    recipes: Mapping[str, Recipe]
    untied: bool
    """The output layer is no longer the embedding."""


def plan(adapters: Sequence[Adapter], base: Checkpoint, config: Mapping[str, Any], quantised: frozenset[str]) -> Plan:
    """`quantised` are live names of modules.

    Raises ExportError with all parts of the adapters that have no counterpart in the base or another shape.
    """
    recipes = {name: Recipe(base, name, name) for name in base.tensors}
    untied = False
    for adapter in adapters:
        modules = [layer.module for layer in adapter.layers] + [tokens.module for tokens in adapter.tokens]
        rename = renaming(modules or [name.rpartition(".")[0] for name in adapter.whole], base.tensors)
        shared = _shared_weight(adapter, base, rename, tied=bool(config.get("tie_word_embeddings")))
        untied |= _untie(adapter, base, recipes, rename, shared)
        problems = _replace(adapter, base, recipes, rename, shared, again=adapter is not adapters[0])
        problems += _change(adapter, base, recipes, rename, shared, str(config.get("model_type")))
        if problems:
            hint = "was the adapter trained on this base, and is the base the 16-bit one?"
            raise ExportError([Problem(message, str(adapter.place), hint) for message in few(problems)])
    if quantised:
        rename = renaming(quantised, base.tensors)
        for module in quantised:
            name = f"{rename(module)}.weight"
            if name not in recipes:
                raise ExportError(f"training quantised `{module}`, and there is no `{name}`", place=str(base.place))
            own, flipped = recipes[name].source is base, config.get("model_type") in _CONV1D
            recipes[name] = replace(recipes[name], quantised=own, flipped=flipped)
    return Plan(recipes, untied)


# -- an output layer that shares the embedding's weight -----------------------------------------------------------


def _shared_weight(adapter: Adapter, base: Checkpoint, rename: Rename, *, tied: bool) -> str | None:
    """The embedding's tensor, if the output layer uses it: some folders hold a copy for it all the same."""
    if not tied and any(f"{rename(layer)}.weight" in base.tensors for layer in OUTPUT_LAYERS):
        return None
    named = [layer.module for layer in adapter.layers if layer.embedding] + [tokens.module for tokens in adapter.tokens]
    candidates = [f"{rename(module)}.weight" for module in named]
    candidates += [name for name in base.tensors if name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS]
    return next((name for name in candidates if name in base.tensors), None)


def _untie(adapter: Adapter, base: Checkpoint, recipes: dict[str, Recipe], rename: Rename, shared: str | None) -> bool:
    """Give the output layer a tensor of its own if the adapter changes it or the embedding apart from the other.

    Two LoRA, or copies that were trained apart, act on a weight that both modules use. PEFT 0.21.2 adds what belongs to
    one of them to the shared weight, and so to both.
    """
    if shared is None:
        return False
    modules = [layer.module for layer in adapter.layers] + [
        tokens.module for tokens in adapter.tokens if _is_output(tokens.module)
    ]
    apart = [module for module in modules if _is_output(module)]
    apart += [layer.module for layer in adapter.layers if f"{rename(layer.module)}.weight" == shared]
    saved = [name.rpartition(".")[0] for name in adapter.whole]
    copies = [
        name for name in saved if adapter.saves(name) and (_is_output(name) or f"{rename(name)}.weight" == shared)
    ]
    if not apart and not copies:
        return False
    head = next((name for name in (*apart, *copies) if _is_output(name)), OUTPUT_LAYERS[0])
    if f"{head}.weight" not in recipes:
        recipes[f"{head}.weight"] = replace(recipes[shared], like=shared)
    return True


def _is_output(module: str) -> bool:
    return module.rpartition(".")[2] in OUTPUT_LAYERS


# -- weights in full ----------------------------------------------------------------------------------------------


def _replace(
    adapter: Adapter, base: Checkpoint, recipes: dict[str, Recipe], rename: Rename, shared: str | None, *, again: bool
) -> list[str]:
    """Take what the adapter saved in full in place of the base's own."""
    problems = []
    for live, saved in adapter.whole.items():
        module, _, last = live.rpartition(".")
        name = f"{rename(module)}.{last}"
        own = adapter.saves(module)
        # What PEFT saved beside a LoRA is the weight that the LoRA is on, and a shared weight is one.
        names = [name]
        if shared is not None and not own and (_is_output(module) or name == shared):
            names = [name for name in (shared, *(f"{head}.weight" for head in OUTPUT_LAYERS)) if name in recipes]
        for target in names:
            recipe, stored = recipes.get(target), adapter.stored.tensors[saved]
            if recipe is None:
                problems.append(f"`{module}` was trained in full and has no counterpart `{target}` in the base")
            elif base.tensors[recipe.like].shape != stored.shape:
                shape = base.tensors[recipe.like].shape
                problems.append(f"`{target}` has the shape {shape}, the adapter was trained on {stored.shape}")
            elif not base.tensors[recipe.like].is_float:
                problems.append(f"`{target}` is stored as {base.tensors[recipe.like].dtype}: this base is quantised")
            elif again and own and (recipe.changes or recipe.source is not base):
                problems.append(f"`{module}` was trained in full, and another adapter has changed it before")
            elif not again or own:
                # A later adapter's copy of the weight under its LoRA is the base's, which is there already.
                recipes[target] = replace(recipe, source=adapter.stored, name=saved)
    return problems


# -- changes ------------------------------------------------------------------------------------------------------


def _change(
    adapter: Adapter, base: Checkpoint, recipes: dict[str, Recipe], rename: Rename, shared: str | None, family: str
) -> list[str]:
    problems: list[str] = []
    stacks = Stacks()

    def add(name: str, change: Change) -> None:
        recipes[name] = replace(recipes[name], changes=(*recipes[name].changes, change))

    for stored in adapter.layers:
        # PEFT goes by the layer's class and corrects the setting as it meets each, so what was saved is the last one's.
        flipped = (stored.fan_in_fan_out or family in _CONV1D) and not _is_output(stored.module)
        layer = replace(stored, fan_in_fan_out=flipped)
        module = rename(layer.module)
        strength = adapter.scaling(layer.module)
        if layer.parameters:
            found = slices(adapter, layer, module, base.tensors, family)
            if found is None:
                problems.append(
                    f"`{layer.nested}` fits none of {', '.join(layer.parameters)} of `{module}` in the base"
                )
                continue
            key, parts = found
            strength = adapter.scaling(key)
            for part in parts:
                # A bare parameter of two dimensions is a weight like any other.
                plain = part.expert is None and len(base.tensors[part.tensor].shape) == 2
                add(part.tensor, AddLora(layer, strength) if plain else AddToExperts(layer, strength, part, stacks))
            continue
        message = _misfit(layer, f"{module}.weight", base, recipes)
        if message:
            problems.append(message)
            continue
        add(f"{module}.weight", AddLora(layer, strength))
        if "bias" in layer.parts:
            if f"{module}.bias" not in recipes or base.tensors[f"{module}.bias"].shape != layer.shape("bias"):
                problems.append(f"`{layer.module}` of the adapter has a bias, and the base has none of its shape")
            else:
                add(f"{module}.bias", AddBias(layer, strength))
    for tokens in adapter.tokens:
        name = f"{rename(tokens.module)}.weight"
        names = [name]
        if shared is not None and name == shared:
            own = [other.module for other in adapter.tokens if _is_output(other.module)]
            names += [f"{head}.weight" for head in OUTPUT_LAYERS if f"{head}.weight" in recipes and head not in own]
        for target in names:
            if target not in recipes:
                problems.append(f"`{tokens.module}` of the adapter has no counterpart `{target}` in the base")
                continue
            shape, trained = base.tensors[recipes[target].like].shape, adapter.stored.tensors[tokens.tensor].shape
            before = [change for change in recipes[target].changes if isinstance(change, ReplaceRows)]
            if len(shape) != 2 or shape[1:] != trained[1:] or max(tokens.indices, default=0) >= shape[0]:
                problems.append(f"`{target}` has the shape {shape}, the trained tokens {trained} do not fit")
            elif any(set(change.tokens.indices) & set(tokens.indices) for change in before):
                problems.append(f"`{tokens.module}` has tokens that another adapter has trained too")
            else:
                add(target, ReplaceRows(tokens, adapter.stored))
    return problems


def _misfit(layer: LoraLayer, name: str, base: Checkpoint, recipes: Mapping[str, Recipe]) -> str | None:
    if name not in recipes:
        return f"`{layer.module}` of the adapter has no counterpart `{name}` in the base"
    stored = base.tensors[recipes[name].like]
    out, into = layer.shape("B")[0], layer.shape("A")[1]
    wanted = (into, out) if layer.embedding or layer.fan_in_fan_out else (out, into)
    if not stored.is_float:
        return f"`{name}` is stored as {stored.dtype}: this base is quantised"
    if stored.shape != wanted:
        return f"`{name}` has the shape {stored.shape}, the adapter was trained on {wanted}"
    return None
