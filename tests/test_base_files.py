"""What is fetched of a repository on the Hub."""

from __future__ import annotations

from huggingface_hub.utils import filter_repo_objects

from finetune.base_files import NOT_OURS, SMALL_FILES, WEIGHT_FILES

MISTRAL = [
    "config.json",
    "consolidated.safetensors",
    "generation_config.json",
    "model-00001-of-00003.safetensors",
    "model.safetensors.index.json",
    "params.json",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer.model",
]


def test_weights_are_fetched_once_and_never_as_pickles() -> None:
    """Mistral 7B Instruct v0.3 holds its weights twice: fetching both would be 29 GB in place of 14.5."""
    fetched = list(filter_repo_objects(MISTRAL, allow_patterns=WEIGHT_FILES, ignore_patterns=NOT_OURS))
    assert set(MISTRAL) - set(fetched) == {"consolidated.safetensors", "pytorch_model.bin"}


def test_before_the_weights_only_small_files_are_fetched() -> None:
    repository = [*MISTRAL, "original/params.json", "chat_template.jinja", "LICENSE.txt"]
    fetched = set(filter_repo_objects(repository, allow_patterns=SMALL_FILES, ignore_patterns=NOT_OURS))
    assert not any(name.endswith((".safetensors", ".bin")) or name.startswith("original/") for name in fetched)
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE.txt"} <= fetched
