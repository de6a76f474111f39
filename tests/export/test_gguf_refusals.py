"""What cannot be converted faithfully is refused, and leaves no file."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import BaseError, ExportError, FinetuneError, MissingExtraError, StorageError
from finetune.export.gguf import convert
from finetune.export.gguf.pretokenizer import recognise
from finetune.export.gguf.scores import merge_scores
from finetune.export.gguf.tokens import fill
from finetune.export.source import open_model
from finetune.llamacpp import LlamaCpp

from .conftest import LlamaMaker

pytest.importorskip("gguf")


@pytest.fixture
def model(stories: Path, tmp_path: Path) -> Path:
    """The real model, to be spoiled."""
    folder = Path(shutil.copytree(stories, tmp_path / "model", copy_function=shutil.copyfile))
    folder.chmod(0o755)
    return folder


def _refused(model: Path, words: str, kind: type[FinetuneError] = ExportError) -> None:
    with pytest.raises(kind) as caught:
        convert(open_model(model), model.parent / "out.gguf", quant="f16")
    assert words in str(caught.value)
    assert not list(model.parent.glob("out*"))


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def _edit_tensors(model: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architectures": ["MambaForCausalLM"]}, "its architecture is MambaForCausalLM"),
    "none stated": ({"architectures": None}, "not stated"),
    "another activation": ({"hidden_act": "gelu"}, "gelu"),
    "a rope that is not known": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope type 'dynamic'",
    ),
    "one architecture": ({"architectures": "LlamaForCausalLM"}, "`architectures` is not a list of names"),
    "architectures in lists": ({"architectures": [["LlamaForCausalLM"]]}, "`architectures` is not a list of names"),
    "no key heads": ({"num_key_value_heads": 0}, "its `num_key_value_heads` is 0, not a whole number from 1"),
    "a length below nothing": ({"max_position_embeddings": -1}, "its `max_position_embeddings` is -1"),
    "a length of 41 bits": ({"max_position_embeddings": 2**40}, "its `max_position_embeddings` is 1099511627776"),
    "heads of a negative size": ({"head_dim": -8}, "its `head_dim` is -8"),
    "a number of double precision": ({"rms_norm_eps": 1e300}, "its `rms_norm_eps` is 1e+300, not a number from 0 to"),
    "a theta that is nothing": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        "`rope_theta` is No",
    ),
    "a theta that is a word": ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "`rope_theta` is 'x'"),
    "a theta of 0": ({"rope_parameters": LLAMA3 | {"rope_theta": 0.0}}, "its `rope_theta` is 0.0"),
    "llama3 without its factor": ({"rope_parameters": LLAMA3 | {"factor": None}}, "'llama3', but it has no `factor`"),
    "llama3 from high to low": ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "is not below its `high_freq"),
    "a text of 2**33 tokens": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0**24,
                "original_max_position_embeddings": 512,
            }
        },
        "`llama.context_length` would be 8589934592",
    ),
    "more layers than there are": ({"num_hidden_layers": 6}, "`model.layers.5.input_layernorm.weight` is missing"),
    "untied, but without an output": ({"tie_word_embeddings": False}, "`lm_head.weight` is missing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(model: Path, case: str) -> None:
    changes, words = CONFIGS[case]
    _edit_json(model / "config.json", lambda config: config.update(changes))
    _refused(model, words)


def test_a_tensor_without_a_place(model: Path) -> None:
    _edit_tensors(model, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    _refused(model, "`model.layers.0.self_attn.q_norm.weight` has no place")


def test_a_quantised_tensor(model: Path) -> None:
    _edit_tensors(model, lambda t: t.update({"model.embed_tokens.weight": torch.zeros(512, 64, dtype=torch.uint8)}))
    _refused(model, "quantised")


@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_values_that_float16_cannot_hold(model: Path, value: float) -> None:
    _edit_tensors(model, lambda t: t["model.layers.3.mlp.up_proj.weight"][5].fill_(value))
    _refused(model, "`blk.3.ffn_up.weight` has values that f16 cannot hold")


def test_files_that_are_missing(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    _refused(model, "there is no tokenizer.json", BaseError)
    (model / "config.json").unlink()
    _refused(model, "no config.json", BaseError)


def test_more_tokens_than_the_model_knows(model: Path) -> None:
    token = {
        "id": 512, "content": "<|new|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": True,
    }  # fmt: skip
    _edit_json(model / "tokenizer.json", lambda spec: spec["added_tokens"].append(token))
    _refused(model, "ids up to 512, its embedding has 512 rows")


def test_no_token_to_end_with(model: Path) -> None:
    """llama.cpp would take a token of its own choosing for it, and stop there."""
    _edit_json(model / "tokenizer_config.json", lambda config: config.update({"eos_token": None}))
    _refused(model, "no token that ends a text")
    template = "{% for m in messages %}{{ m.content }}<s>{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    report = convert(open_model(model), model.parent / "out.gguf", quant="f16")
    assert report.stop == ("<s>",)


SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "changes text first"),
    "another kind of words": ({"pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level nor"),
    "bytes cut in an unknown way": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]}, "normalizer": None},
        "way of cutting text into words",
    ),
    "a token of its own around texts": (
        {"post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<unk>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<unk>": {"id": "<unk>", "ids": [0], "tokens": ["<unk>"]}},
        }},
        "other tokens than BOS and EOS",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_tokenizers(model: Path, case: str) -> None:
    changes, words = SPECS[case]
    _edit_json(model / "tokenizer.json", lambda spec: spec.update(changes))
    _refused(model, words)


def test_a_tokenizer_without_tokens(model: Path) -> None:
    _edit_json(
        model / "tokenizer.json", lambda spec: spec["model"].update(vocab={}, merges=[]) or spec.update(added_tokens=[])
    )
    _refused(model, "has no tokens")


def test_a_tokenizer_without_its_token_for_the_unknown(model: Path) -> None:
    """The library raises an exception of no kind when it meets a character that it does not know."""
    _edit_json(model / "tokenizer.json", lambda spec: spec["model"].update(vocab={}, merges=[]))
    _refused(model, "its tokenizer's token for the unknown, '<unk>', is not in its vocabulary")


def test_a_byte_level_tokenizer_without_merges(model: Path) -> None:
    """An array without elements is not written, and llama.cpp does not load a file without merges."""
    from tokenizers import pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    cuts = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    _edit_json(model / "tokenizer.json", lambda spec: spec["model"].update(vocab=vocab, merges=[]))
    _edit_json(model / "tokenizer.json", lambda spec: spec.update(pre_tokenizer=cuts, normalizer=None))
    _refused(model, "its tokenizer has no merges")


def test_half_a_character_in_the_template(model: Path) -> None:
    template = "{{ messages[0].content }}\ud800"
    _edit_json(model / "tokenizer_config.json", lambda config: config.update({"chat_template": template}))
    _refused(model, r"half a character in it ('\ud800')")


def test_half_a_character_that_the_template_writes(model: Path) -> None:
    (model / "chat_template.jinja").write_text(r"{{ messages[0].content }}{{ '\ud800' }}")
    report = convert(open_model(model), model.parent / "out.gguf", quant="f16")
    assert "the chat template did not render a sample conversation" in report.notes


def test_a_token_to_end_with_that_there_is_not(model: Path) -> None:
    _edit_json(model / "tokenizer_config.json", lambda config: config.update({"eos_token": "<new>"}))
    _refused(model, "no token that ends a text (`eos_token` is '<new>', which is none of its tokens)")


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "Sequence", "pretokenizers": []},
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"},
    ],
)
def test_a_way_of_cutting_words_is_known_in_every_detail_or_not(pre_tokenizer: Any) -> None:
    with pytest.raises(ExportError, match="way of cutting"):
        recognise({"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": False}}, "here")


def test_what_exists_is_not_overwritten(stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(ExportError, match="exists already"):
        convert(open_model(stories), out, quant="f16")
    assert out.read_bytes() == b"mine"


def test_an_interruption_leaves_no_file(stories: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, name: str) -> None:
        assert (tmp_path / "out.gguf.partial").is_file()
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(open_model(stories), tmp_path / "out.gguf", quant="f16", on_tensor=stop)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"out\.gguf: 64\.5 MiB needed, 1000 B free"):
        convert(open_model(stories), tmp_path / "out.gguf", quant="f16")


def test_without_the_package_the_hint_names_the_extra(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        convert(open_model(stories), tmp_path / "out.gguf", quant="f16")
    assert caught.value.problems[0].hint == 'pip install "finetune[gguf]"'


def test_a_name_with_phi3_in_it_does_not_change_the_tokenizer(stories: Path, tmp_path: Path) -> None:
    """llama.cpp has special rules for models whose name says Phi-3."""
    pytest.importorskip("xllamacpp")
    for name in ("plain", "Like-Phi-3-mini"):
        convert(open_model(stories), tmp_path / f"{name}.gguf", quant="f32", name=name)
    ids = []
    for name in ("plain", "Like-Phi-3-mini"):
        with LlamaCpp(tmp_path / f"{name}.gguf", context=64, gpu_layers=0, threads=1) as llama:
            ids.append(llama.tokenize("a</s>  b"))
    assert ids[0] == ids[1]


def test_a_window_that_llamacpp_does_not_have_is_reported(
    stories: Path, make_llama: LlamaMaker, tmp_path: Path
) -> None:
    model = make_llama(architecture="Mistral", sliding_window=64, vocab_size=512, tokenizer=stories)
    report = convert(open_model(model), tmp_path / "out.gguf", quant="f16")
    assert "the last 64 tokens" in report.notes[0]


# -- the small functions ------------------------------------------------------------------------------------------


def test_rows_beyond_the_vocabulary_get_texts_of_their_own() -> None:
    assert fill({0: "a", 2: "[PAD1]"}, 4) == ["a", "[PAD1]_", "[PAD1]", "[PAD3]"]


def test_scores_follow_the_merges_and_count_what_they_cannot_say() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    scores, inexact = merge_scores(vocab, ["b c", "a b", "a bc", "ab c"])
    assert scores["bc"] > scores["ab"] > scores["abc"]
    assert inexact == 0
    assert merge_scores(vocab, ["b c", "a b", "a bc"])[1] == 1  # ab + c would be merged
    assert merge_scores(vocab, ["a bc", "b c", "ab c", "a b"])[1] == 1  # abc is merged before and after bc
