"""A model in transformers whose weights come from disk layer by layer: exact logits on a laptop.

The reference of every proof is base + adapter as PEFT itself computes it, unmerged, in float32. An 8B model has 32 GB
in float32; here only one decoder layer of it (or the embedding, or the head) is in memory at a time. The model is built
with holes for weights, and hooks around each layer read its tensors before and drop them after. Nothing of PEFT's or
the model's own mathematics is rewritten, and nothing of the merge's is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import BaseError, ExportError
from finetune.export.adapter import WEIGHTS
from finetune.export.experts import stacked
from finetune.export.nf4 import nf4_round_trip, quantised_modules
from finetune.export.renaming import EMBEDDINGS, OUTPUT_LAYERS, renaming
from finetune.export.safetensors_io import open_file
from finetune.export.source import Model

if TYPE_CHECKING:
    import numpy
    import torch

GROUP_LOGITS = 2**25
"""Logits that one pass over the weights may leave in memory: 128 MB in float32."""

GROUP_TOKENS = 4096
"""Tokens in one pass, however small the vocabulary: attention's own matrices grow with their square."""


class StreamedModel:
    """`model` in float32, with the adapter of `adapter` on it unless that is None.

    device  where each layer is computed, for instance "cpu" or "cuda:0"
    nf4     with the weights of linear layers as 4-bit training holds them, rather than as they are stored

    Raises ExportError for a model whose tensors do not pair with its modules.
    """

    def __init__(self, model: Model, adapter: Path | None, *, device: str, nf4: bool = False) -> None:
        self._source = model
        self._device = device
        self._quantised = quantised_modules(model.config) if nf4 else frozenset()
        self._model = self._build(adapter)
        modules = {
            _without_peft(name).rpartition(".")[0]
            for name, hole in self._model.named_parameters()
            if id(hole) in self._holes
        }
        self._rename = renaming(modules, model.weights.tensors)
        self.context = _context(model.config)
        """The longest sequence that it was made for, in tokens."""
        self._can_keep_few = "logits_to_keep" in inspect.signature(self._plain().forward).parameters
        self.vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        self._add_hooks()

    def logits(self, sequences: Sequence[Sequence[int]], *, last: int | None = None) -> list[numpy.ndarray[Any, Any]]:
        """One pass: (tokens, vocabulary) float32 for each sequence, of its `last` tokens if that is given.

        `groups` says how much goes into a pass. `last` is for one sequence alone, or for ones of equal length.
        """
        import torch

        width = max(map(len, sequences))
        ids = torch.zeros((len(sequences), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, sequence in enumerate(sequences):
            # Padding stands on the right, where causal attention never looks from the left.
            ids[line, : len(sequence)] = torch.tensor(list(sequence))
            mask[line, : len(sequence)] = 1
        with torch.inference_mode():
            keep = {"logits_to_keep": last} if last and self._can_keep_few else {}
            output = self._model(
                input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False, **keep
            ).logits
        if last is not None:
            return [row[-last:].float().cpu().numpy() for row in output]
        return [output[line, : len(sequence)].float().cpu().numpy() for line, sequence in enumerate(sequences)]

    def _plain(self) -> Any:
        return self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone."""
        with self._model.disable_adapter():
            yield

    def _build(self, adapter: Path | None) -> Any:
        import torch
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        values = {key: value for key, value in self._source.config.items() if key not in _NOT_FOR_A_COPY}
        try:
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            with init_empty_weights(include_buffers=False):
                # Eager attention is the one that every model's own code defines; the others leave soft capping out.
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        except Exception as error:  # transformers raises KeyError, ValueError, TypeError and its validators' own
            place = str(self._source.place / "config.json")
            raise BaseError(f"no model can be made of this configuration: {error}", place=place) from error
        self._holes = _leave_holes(model, set() if adapter is None else _saved_beside(adapter))
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
        model.requires_grad_(False)
        model.eval()
        return self._moved(model)

    def _moved(self, model: Any) -> Any:
        """Move what is real (the adapter, tables of positions) to the device."""
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in self._holes:
                    parameter.data = parameter.data.to(self._device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)
        return model

    def _add_hooks(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        layers = set(getattr(self._model, "_no_split_modules", None) or ())
        inside: set[int] = set()
        for prefix, module in self._model.named_modules():
            if id(module) in inside:
                continue
            # What PEFT wraps may read its base layer's weight without calling the base layer.
            whole = type(module).__name__ in layers or isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            if whole:
                inside.update(id(part) for part in module.modules())
            if whole or any(id(parameter) in self._holes for parameter in module.parameters(recurse=False)):
                self._hook(prefix, module, deep=whole)

    def _hook(self, prefix: str, module: torch.nn.Module, *, deep: bool) -> None:
        """Fill a module's holes before its forward pass, and leave them again after it."""
        import torch

        parts = module.named_modules() if deep else [("", module)]
        holes = [
            (part, leaf, hole, ".".join(filter(None, (prefix, inner, leaf))))
            for inner, part in parts
            for leaf, hole in part.named_parameters(recurse=False)
            if id(hole) in self._holes
        ]

        def fill(*arguments: Any) -> None:
            for part, leaf, _, name in holes:
                part._parameters[leaf] = torch.nn.Parameter(self._tensor(name).to(self._device), requires_grad=False)

        def leave(*arguments: Any) -> None:
            for part, leaf, hole, _ in holes:
                part._parameters[leaf] = hole

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(leave)

    def _tensor(self, name: str) -> torch.Tensor:
        """The stored tensor of a parameter of the live model, as training held it."""
        module, _, leaf = _without_peft(name).rpartition(".")
        disk = f"{self._rename(module)}.{leaf}"
        tensors = self._source.weights.tensors
        tied = self._plain().config.get_text_config().tie_word_embeddings
        if disk not in tensors and tied and module.endswith(OUTPUT_LAYERS):  # it is not stored twice
            disk = next((one for one in tensors if one.endswith(tuple(f"{e}.weight" for e in EMBEDDINGS))), disk)
        stored = self._source.weights.read(disk).float() if disk in tensors else self._experts(disk)
        return nf4_round_trip(stored) if leaf == "weight" and module in self._quantised else stored

    def _experts(self, disk: str) -> torch.Tensor:
        """A stack of all experts, which lie on disk one by one."""
        import torch

        weights = self._source.weights
        module, _, parameter = disk.rpartition(".")
        parts = stacked(module, parameter, weights.tensors)
        if not parts:
            raise ExportError(f"`{disk}` of the model is not in its files", place=str(self._source.place))
        return torch.stack([torch.cat([weights.read(name).float() for name in names]) for names in parts])


def groups(sequences: Sequence[Sequence[int]], vocabulary: int) -> Iterator[list[int]]:
    """Indices of sequences, of similar length, that go into one pass together."""
    limit = min(GROUP_TOKENS, max(1, GROUP_LOGITS // vocabulary))
    group: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index])):
        if group and (len(group) + 1) * len(sequences[index]) > limit:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


_NOT_FOR_A_COPY = ("auto_map", "quantization_config", "dtype", "torch_dtype")
"""Keys that would run remote code, or say how somebody else loads the weights."""


def _context(config: Mapping[str, Any]) -> int:
    """Tokens that a model was made for; as good as unlimited where its configuration does not say."""
    stated = [config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")]
    return min((value for value in stated if isinstance(value, int) and value > 0), default=2**30)


_ADDED_BY_PEFT = ("base_layer", "original_module", "token_adapter")


def _without_peft(live: str) -> str:
    """The name that a parameter has in the model without PEFT."""
    return ".".join(part for part in live.removeprefix("base_model.model.").split(".") if part not in _ADDED_BY_PEFT)


def _saved_beside(adapter: Path) -> set[str]:
    """The base's own weights that PEFT saved with the adapter (an embedding with a LoRA on it), and will load."""
    names = [name for name in open_file(adapter / WEIGHTS).tensors if ".base_layer." in name]
    return {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names}


def _leave_holes(model: torch.nn.Module, keep: set[str]) -> dict[int, torch.nn.Parameter]:
    """Put a hole in the place of every parameter but those to `keep`: a tensor of its shape that takes four bytes.

    Not torch's meta device: PEFT moves a new adapter to the device of its base layer, and would move it into nothing.
    """
    import torch

    holes: dict[int, torch.nn.Parameter] = {}
    tied: dict[int, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in tied:
                room = torch.zeros(()).expand(parameter.shape)
                kept = f"{prefix}.{name}" in keep
                tied[id(parameter)] = torch.nn.Parameter(room.clone() if kept else room, requires_grad=False)
                if not kept:
                    holes[id(tied[id(parameter)])] = tied[id(parameter)]
            module._parameters[name] = tied[id(parameter)]
    return holes
