"""Reading a trained adapter, and refusing everything in it that a merge would not carry over.

What is not understood is refused by name rather than skipped: a merge that leaves something out still gives a model
that loads and answers, only not the one that was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError, Problem, RunError, few
from finetune.export.adapter_checks import LONGEST_NAME, incomplete, refused_settings, require_numbers
from finetune.export.lora import LoraModule, scaling
from finetune.export.safetensors_io import Checkpoint, open_file

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_AGAIN = "restore it, or train again with --fresh"
_OTHER = "this is not, or not all of, what `ft train` saves: restore it, or train again with --fresh"

_LORA = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?P<part>[AB])(?:\.default)?\.(?P<kind>weight|bias)"
    r"|lora_embedding_(?P<row>[AB])(?:\.default)?"
    r"|(?P<dora>lora_magnitude_vector)(?:\.default)?(?:\.weight)?)"
)

_TOKENS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")

_WHOLE = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.(?P<last>weight|bias)")


@dataclass(frozen=True)
class LoraLayer:
    """The LoRA of one module, not read yet: `read` gives its numbers."""

    module: str
    """Live name, without PEFT's prefix and without the wrappers around an expert module."""
    nested: str
    """The same as stored: `mlp.experts.base_layer` is the inner of two wrapped parameters."""
    parts: Mapping[str, str]
    """A, B, dora, bias → name of the tensor. A is (rank, in), B (out, rank); of experts' stacks, rank × experts."""
    embedding: bool
    parameters: tuple[str, ...]
    """For a LoRA of bare parameters (`target_parameters`), those of the module that it may belong to."""
    fan_in_fan_out: bool
    stored: Checkpoint

    def shape(self, part: str) -> tuple[int, ...]:
        return self.stored.tensors[self.parts[part]].shape

    def read(self, part: str) -> torch.Tensor:
        # PEFT's `autocast_adapter_dtype`: 16-bit adapters are held in float32, so that the sum is rounded once.
        return self.stored.read(self.parts[part]).float()

    def load(self, strength: float) -> LoraModule:
        """The numbers, with the scaling that `Adapter.scaling` gives."""
        return LoraModule(
            name=self.module,
            a=self.read("A"),
            b=self.read("B"),
            scaling=strength,
            transposed=self.embedding or self.fan_in_fan_out,
            magnitude=self.read("dora") if "dora" in self.parts else None,
            rounded=self.embedding or bool(self.parameters),
        )


@dataclass(frozen=True)
class TrainedTokens:
    """Rows of an embedding that were trained in full."""

    module: str
    indices: tuple[int, ...]
    tensor: str


@dataclass(frozen=True)
class Adapter:
    """A whole adapter. Nothing of it is held in memory but names."""

    place: Path
    config: Mapping[str, Any]
    layers: tuple[LoraLayer, ...]
    tokens: tuple[TrainedTokens, ...]
    whole: Mapping[str, str]
    """Live name of a weight or bias → tensor name, of what was saved in full: `modules_to_save`, trained biases, and
    the embedding and output layer, which PEFT saves beside their LoRA."""
    stored: Checkpoint

    def rank(self, key: str) -> int:
        """The rank that the configuration gives a module (or a parameter)."""
        return int(_from_pattern(self.config.get("rank_pattern"), key, self.config["r"]))

    def scaling(self, key: str) -> float:
        alpha = float(_from_pattern(self.config.get("alpha_pattern"), key, self.config["lora_alpha"]))
        return scaling(alpha, self.rank(key), rank_stabilised=bool(self.config.get("use_rslora")))

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names this module: it was trained as a copy of its own, tied to nothing."""
        names = tuple(self.config.get("modules_to_save") or ())
        parts = module.split(".")
        return any(".".join(parts[:depth]).endswith(names) for depth in range(1, len(parts) + 1))


def read_adapter(folder: Path) -> Adapter:
    """Read `adapter_config.json` and the head of `adapter_model.safetensors` as PEFT saves them, and check the numbers.

    Raises RunError if they are missing or unreadable, ExportError with all that a merge could not carry over, and
    for an adapter in which nothing was learned or which holds numbers that are not finite.
    """
    config = read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise RunError(
            f"there is no {WEIGHTS}",
            place=str(folder),
            hint="weights in the pickle format are never read" if any(folder.glob("*.bin")) else _AGAIN,
        )
    stored = open_file(weights)
    problems = [Problem(message, str(folder / CONFIG), _OTHER) for message in few(refused_settings(config))]
    adapter, refused = _sort_tensors(folder, config, stored, usable=not problems)
    problems += [Problem(message, str(weights), _OTHER) for message in few(refused)]
    if not problems:
        problems = [Problem(message, str(weights), _OTHER) for message in few(incomplete(adapter))]
    if problems:
        raise ExportError(problems)
    require_numbers(adapter)
    return adapter


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"there is no {CONFIG}", place=str(folder), hint=_AGAIN) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"is not valid JSON: {error}", place=str(path), hint=_AGAIN) from error
    if not isinstance(config, dict):
        raise RunError("is not a table", place=str(path), hint=_AGAIN)
    return config


def _sort_tensors(
    folder: Path, config: dict[str, Any], stored: Checkpoint, *, usable: bool
) -> tuple[Adapter, list[str]]:
    """What each tensor is part of, and a message for each that is part of nothing known."""
    parts: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    tokens: list[TrainedTokens] = []
    whole: dict[str, str] = {}
    refused = []
    for name, info in stored.tensors.items():
        if len(name) > LONGEST_NAME:
            refused.append(f"`{name[:60]}…` is a name of {len(name)} characters; {LONGEST_NAME} are allowed")
            continue
        if match := _LORA.fullmatch(name):
            if match["kind"] == "bias" and match["part"] == "A":
                refused.append(f"`{name}` is a kind of weight that is not known, which a merge does not carry over yet")
                continue
            part = match["part"] or match["row"] or "dora"
            parts.setdefault(match["module"], {})["bias" if match["kind"] == "bias" else part] = name
            if match["row"]:
                embeddings.add(match["module"])
        elif match := _TOKENS.fullmatch(name):
            indices = _token_indices(config.get("trainable_token_indices"), match["module"])
            if indices is None or info.shape[:1] != (len(indices),):
                refused.append(f"`{name}` does not fit `trainable_token_indices` of {CONFIG}")
            else:
                tokens.append(TrainedTokens(match["module"], indices, name))
        elif "lora_" not in name and (match := _WHOLE.fullmatch(name)):
            whole[f"{match['module']}.{match['last']}"] = name
        else:
            refused.append(f"`{name}` is a kind of weight that is not known, which a merge does not carry over yet")
        if not info.is_float:
            refused.append(f"`{name}` is stored as {info.dtype}")
    fan = bool(config.get("fan_in_fan_out"))
    layers = []
    for nested, found in parts.items():
        module = re.sub(r"(\.base_layer)+$", "", nested)
        named = _parameters(config, module) if usable else ()
        layers.append(LoraLayer(module, nested, found, nested in embeddings, named, fan, stored))
    return Adapter(folder, config, tuple(layers), tuple(tokens), whole, stored), refused


def _parameters(config: Mapping[str, Any], module: str) -> tuple[str, ...]:
    """The parameters that a module's LoRA may be of, by `target_parameters`; none for the LoRA of a linear layer.

    As `BaseTuner._inject_parameters` reads the names: `experts.down_proj` is that of modules whose name ends so,
    `down_proj` that of any module that has it. Which have it, only the base can tell; a layer that `target_modules`
    names cannot be meant, because PEFT refuses to put both kinds on one module.
    """
    found = []
    for target in config.get("target_parameters") or ():
        owner, _, parameter = target.rpartition(".")
        if f".{module}".endswith(f".{owner}") if owner else not _is_target(config.get("target_modules"), module):
            found.append(parameter)
    return tuple(found)


def _is_target(targets: Any, module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return f".{module}".endswith(tuple(f".{target}" for target in targets or ()))


def _token_indices(setting: Any, module: str) -> tuple[int, ...] | None:
    """The trained rows of a module: a list is the input embedding's, a table names modules."""
    if isinstance(setting, dict):
        setting = next((rows for name, rows in setting.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(setting, list) or not all(type(row) is int and row >= 0 for row in setting):
        return None
    return tuple(setting) if len(set(setting)) == len(setting) else None


def _from_pattern(patterns: Any, module: str, default: Any) -> Any:
    """A module's own rank or alpha: the first pattern that its name ends with, from a dot on
    (`peft.utils.other.get_pattern_key`)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
