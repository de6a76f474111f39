"""adapter/: what a run leaves for everybody after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.prepare import PreparedData
from finetune.data.template import end_of_turn
from finetune.data.tokenizer import Tokenizer
from finetune.runs.files import discard, partial_of, replace_folder, storage_errors, write_json, write_text
from finetune.runs.folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def save_adapter(model: PeftModel, data: PreparedData, run: RunFolder) -> None:
    """adapter/: the LoRA, and the tokenizer and chat template it was trained with. Complete, or not there at all."""
    partial = partial_of(run.adapter)
    with storage_errors(partial):
        discard(partial)
        model.save_pretrained(str(partial), save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
        copy_tokenizer(data.tokenizer, partial)
        if data.template is not None:
            write_text(partial / "chat_template.jinja", data.template.source)
        stop_ids, _ = end_of_turn(data.template, data.tokenizer)
        generation: dict[str, Any] = {"eos_token_id": stop_ids, "pad_token_id": data.tokenizer.pad_id}
        bos = data.tokenizer.special.get("bos_token")
        if bos is not None:
            generation["bos_token_id"] = data.tokenizer.token_id(bos)
        write_json(partial / "generation_config.json", generation)
        replace_folder(partial, run.adapter)


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The base's tokenizer files, with tokenizer.json as it was trained with and a class that takes it as it is.

    Of other classes transformers makes other things by config.json's model type, which is not here.
    """
    for name in TOKENIZER_FILES:
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    settings.pop("auto_map", None)
    write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
