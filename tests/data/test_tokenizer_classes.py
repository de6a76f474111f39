"""transformers' tokenizer classes overrule tokenizer.json; the ids trained on must be the ids that users get."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.data.tokenizer import load_tokenizer

TEXTS = (
    "Hello you",
    "<s>Hello you</s><s>What now</s>",
    "<s>### User:\nA question ?\n\n### Assistant:\nAn answer</s>\n\n",
    "  two spaces  and\n\n a line",
    "</s> after",
    "e\u0301 café 日本 🙂",
)


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"]
)
@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
def test_ids_are_those_of_the_class_that_the_base_names(
    assets: Path, tmp_path: Path, name: str, settings: dict[str, bool]
) -> None:
    from transformers import AutoTokenizer

    for file in ("tokenizer.json", "config.json"):
        shutil.copyfile(assets / "models" / "stories260K" / file, tmp_path / file)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, **special, **settings}), "utf-8"
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        for added in (False, True):
            assert ours.encode(text, special=added) == theirs.encode(text, add_special_tokens=added), (text, added)
