"""A conversation reaches the model in llama.cpp as it reached it in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.export.gguf import convert
from finetune.export.gguf.turn import end_of_turn, sample_conversation
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "Once upon a time"},
    {"role": "assistant", "content": "Hello there, said the cat."},
    {"role": "user", "content": "a little girl"},
]

AS_IN_FILE: dict[str, Any] = {"tokenizer_class": "TokenizersBackend"}
REBUILT: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer"}
"""transformers 5 gives these tokenizers other rules for spaces than their tokenizer.json has."""
REBUILT_LEGACY: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": True}


def _with_template(stories: Path, folder: Path, template: str, config: dict[str, Any]) -> Path:
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "config"),
    [
        (ZEPHYR, AS_IN_FILE),
        (ZEPHYR, REBUILT_LEGACY),
        (INST, AS_IN_FILE),
        (INST, REBUILT),
        (INST, REBUILT_LEGACY),
    ],
)
def test_a_conversation_becomes_the_tokens_of_training(
    stories: Path, tmp_path: Path, template: str, config: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    model = _with_template(stories, tmp_path / "model", template, config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]

    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")

    with LlamaCpp(tmp_path / "model.gguf", context=128, gpu_layers=0, threads=1) as llama:
        assert llama.tokenize(llama.apply_template(MESSAGES), add_special=True) == expected
        body = {"messages": MESSAGES, "max_tokens": 1}
        answer = llama._process.ask("/v1/chat/completions", body)
        assert answer["usage"]["prompt_tokens"] == len(expected)
    assert report.stop == ("</s>",)
    assert report.notes == ()


def test_a_space_that_llamacpp_cannot_place_is_reported(stories: Path, tmp_path: Path) -> None:
    """Here training puts a space before the first word only, which no setting of llama.cpp does."""
    model = _with_template(stories, tmp_path / "model", ZEPHYR, REBUILT)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert len(report.notes) == 1
    assert "spaces" in report.notes[0]


def test_the_template_is_stored_as_it_is(stories: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    template = ZEPHYR + "\n{# a comment, ünd mehr #}\n\n"
    model = _with_template(stories, tmp_path / "model", template, AS_IN_FILE)
    convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == template
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 2
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


def test_a_template_that_fails_is_stored_and_reported(stories: Path, tmp_path: Path) -> None:
    model = _with_template(stories, tmp_path / "model", "{{ raise_exception('no') }}", AS_IN_FILE)
    report = convert(open_model(model), tmp_path / "model.gguf", quant="f32")
    assert "did not render" in report.notes[0]
    assert report.stop == ("</s>",)


END_OF_TURN = {
    "meta-llama-Llama-3.1-8B-Instruct": "<|eot_id|>",
    "meta-llama-Llama-3.2-3B-Instruct": "<|eot_id|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜end▁of▁sentence｜>",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "<｜end▁of▁sentence｜>",
    "Qwen-Qwen2.5-7B-Instruct": "<|im_end|>",
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "HuggingFaceTB-SmolLM3-3B": "<|im_end|>",
    "microsoft-Phi-3.5-mini-instruct": "<|end|>",
    "google-gemma-2-2b-it": "<end_of_turn>",
    "mistralai-Mistral-Nemo-Instruct-2407": "</s>",
    "ibm-granite-granite-3.3-2B-Instruct": "<|end_of_text|>",
}
ADDED = [
    *set(END_OF_TURN.values()),
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<|endoftext|>",
    "[INST]",
]


@pytest.mark.parametrize("name", END_OF_TURN)
def test_the_end_of_a_turn_is_found_in_real_templates(assets: Path, stories: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = (assets / "chat_templates" / f"{name}.jinja").read_text()
    if END_OF_TURN[name] not in ("<|eot_id|>", "<|im_end|>"):
        tokenizer.eos_token = END_OF_TURN[name]
    conversation = sample_conversation(tokenizer)
    assert conversation is not None
    assert end_of_turn(conversation, ADDED) == END_OF_TURN[name]


def test_a_turn_that_ends_in_plain_text_has_no_token() -> None:
    assert end_of_turn("### Question\nQxq\n### Answer\nAxa\n\n", ADDED) is None
    assert end_of_turn("a template that drops answers", ADDED) is None
