"""A run with a GGUF file of a real small model that ends its stories with its stop token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
"""The model continues texts, so it is given one: whatever was said, without any marks."""

ONCE = "Once upon a time"


@pytest.fixture(scope="session")
def story_model(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K was trained to write a BOS (1) after a story. Here that row of the head writes `</s>` (2) instead."""
    import torch
    import transformers

    source = assets / "models" / "stories260K"
    folder = tmp_path_factory.mktemp("story-model")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    head = model.get_input_embeddings().weight.detach().clone()
    head[[1, 2]] = head[[2, 1]]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    for file in source.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "TokenizersBackend"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def story_run(story_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `ft export --to gguf` leaves it. The adapter is only said to be there."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from finetune.export.gguf import convert
    from finetune.export.source import open_model

    run = tmp_path_factory.mktemp("runs") / "stories"
    (run / "adapter").mkdir(parents=True)
    (run / "gguf").mkdir()
    (run / "manifest.json").write_text('{"state": "finished"}')
    (run / "adapter" / "adapter_config.json").write_text("{}")
    convert(open_model(story_model), run / "gguf" / "stories-f32.gguf", quant="f32")
    return run
