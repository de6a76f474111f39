"""The adapter: LoRA on the linear layers that the config names."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.schema import Config
from finetune.errors import ConfigError, StorageError
from finetune.model.base import LoadedModel
from finetune.safetensors_heads import parse_header

if TYPE_CHECKING:
    from peft import PeftModel


OUTPUT_HEADS = ("lm_head", "embed_out")
"""What families call the matrix that makes logits. TRL refuses an adapter there too, after everything is loaded."""


def check_targets(config: Config, folder: Path, place: str | None = None) -> None:
    """Every name in `lora.targets` must be a layer of the base. Reads tensor names only, so it needs no torch.

    Names that are not known yet (a Hub base of one file that is not downloaded) are believed; the output head is not.
    """
    if isinstance(config.lora.targets, str):
        return
    for target in config.lora.targets:
        if target in OUTPUT_HEADS:
            raise ConfigError(
                f"lora.targets: {target} is the output head, which gets no adapter",
                place=place,
                hint="leave it out: the loss is computed from the head's own weights, so it would never be trained",
            )
    names = _layer_names(folder)
    if not names:
        return
    for target in config.lora.targets:
        if target not in names:
            close = get_close_matches(target, names, n=1, cutoff=0.4)
            known = ", ".join(sorted(names))
            hint = f"did you mean {close[0]}? " if close else ""
            message = f"lora.targets: the base has no layer named {target}"
            raise ConfigError(message, place=place, hint=f"{hint}it has: {known}")


def add_adapter(config: Config, loaded: LoadedModel) -> PeftModel:
    """Put a freshly initialised LoRA on the base, in float32: B is zero, A is drawn with `train.seed`."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    targets = config.lora.targets
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
    )
    torch.manual_seed(config.train.seed)
    try:
        model = get_peft_model(loaded.model, lora)
    except ValueError as error:
        dropout = "lora_dropout" in str(error)
        raise ConfigError(
            f"{'lora.dropout' if dropout else 'lora'}: PEFT cannot put this adapter on {config.base}: {error}",
            hint="set lora.dropout to 0, or name lora.targets without the experts" if dropout else "see lora.targets",
        ) from error
    # What the adapter says of its base must hold on another machine: the Hub id, not the folder of this one's cache.
    active = model.peft_config["default"]
    active.base_model_name_or_path, active.revision = config.base, config.revision
    # PEFT has them in a set, whose order, and with it the file's, changes from process to process.
    active.target_modules = sorted(active.target_modules)
    return model


def load_adapter(loaded: LoadedModel, folder: Path) -> PeftModel:
    """Put a trained adapter on its base, for inference."""
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=False)


def _layer_names(folder: Path) -> set[str]:
    """The last part of the name of every matrix in the base's safetensors files, embeddings left out."""
    tensors: set[str] = set()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            tensors.update(json.loads(index.read_text("utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError):
            return set()
    else:
        for path in folder.glob("*.safetensors"):
            try:
                tensors.update(tensor.name for tensor in parse_header(path) if len(tensor.shape) == 2)
            except StorageError:
                return set()
    modules = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in tensors if name.endswith(".weight")}
    return {name for name in modules if "norm" not in name and "embed" not in name}
