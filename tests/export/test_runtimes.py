"""What GPT4All, vLLM and LM Studio can take, and where LM Studio looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ExportError
from finetune.export.runtimes import (
    GPT4ALL_ARCHITECTURES,
    VLLM_RANKS,
    lm_studio_models,
    lm_studio_path,
    runtime_notes,
    vllm_rank,
    vllm_refusals,
)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "qwen3moe", "phi4", "llama4"])
def test_models_too_new_for_gpt4all_are_told(architecture: str) -> None:
    notes = runtime_notes(architecture, "q4_k_m")
    assert [note for note in notes if f"GPT4All cannot load {architecture} models" in note]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "gptneox", "falcon", "gemma"])
def test_nothing_is_said_where_there_is_nothing_to_know(architecture: str) -> None:
    assert architecture in GPT4ALL_ARCHITECTURES
    assert runtime_notes(architecture, "q8_0") == []


def test_wide_formats_are_told_to_be_so() -> None:
    assert "f32 is for further work" in runtime_notes("llama", "f32")[0]


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)])
def test_the_room_that_vllm_makes_for_a_rank(rank: int, room: int | None) -> None:
    assert vllm_rank({"r": rank}) == room


def test_vllm_is_told_the_same_everywhere() -> None:
    from finetune.serve import others

    assert others.VLLM_RANKS == VLLM_RANKS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "fully trained modules (lm_head)"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"rank_pattern": {"q_proj": 4}}, "different ranks or alphas per layer"),
        ({"alpha_pattern": {"q_proj": 4}}, "different ranks or alphas per layer"),
        ({"target_parameters": ["experts.down_proj"]}, "LoRA on expert weights (target_parameters)"),
        ({"trainable_token_indices": [5]}, "trained tokens"),
        ({"r": 1024}, "a rank of more than 512"),
    ],
)
def test_adapters_that_vllm_would_not_serve_as_trained(settings: dict[str, Any], words: str) -> None:
    plain = {"r": 16, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "use_rslora": True}
    assert vllm_refusals(plain) == []
    assert vllm_refusals(plain | settings) == [words]


def test_lm_studio_lists_files_two_folders_deep(tmp_path: Path) -> None:
    assert lm_studio_models(tmp_path) == tmp_path / ".lmstudio" / "models"
    path = lm_studio_path(lm_studio_models(tmp_path), "me", "legal", "legal-q8_0.gguf")
    assert path == tmp_path / ".lmstudio" / "models" / "me" / "legal" / "legal-q8_0.gguf"


def test_lm_studio_is_found_where_it_was_moved_to(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "lm-studio").mkdir(parents=True)
    assert lm_studio_models(tmp_path) == tmp_path / ".cache" / "lm-studio" / "models"
    (tmp_path / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'big disk'}\n")
    assert lm_studio_models(tmp_path) == tmp_path / "big disk" / "models"


def test_the_models_folder_that_was_chosen_in_lm_studio_is_taken(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / ".lmstudio-home-pointer").write_text(str(tmp_path / "moved"))
    chosen = str(tmp_path / "big disk" / "Modelle für alle")
    (tmp_path / "moved" / "settings.json").write_text(json.dumps({"downloadsFolder": chosen}), encoding="utf-8")
    assert lm_studio_models(tmp_path) == Path(chosen)


@pytest.mark.parametrize(
    "settings",
    [
        b"",
        b"{",
        b"[1]",
        b'{"downloadsFolder": 5}',
        b'{"downloadsFolder": ""}',
        b'{"downloadsFolder": "models"}',  # relative to what?
        b'{"downloadsFolder": "/a\\u0000b"}',
        b'{"downloadsFolder": "/a\\u001b[2J"}',
        b'{"downloadsFolder": "/\\ud800"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"downloadsFolder": "/x", "more": "' + b" " * 2**20 + b'"}',
    ],
    ids=range(12),
)
def test_settings_of_lm_studio_that_make_no_sense_count_as_none(tmp_path: Path, settings: bytes) -> None:
    (tmp_path / ".lmstudio").mkdir()
    (tmp_path / ".lmstudio" / "settings.json").write_bytes(settings)
    assert lm_studio_models(tmp_path) == tmp_path / ".lmstudio" / "models"


@pytest.mark.parametrize("pointer", [b"\xff\xfe", b"", b"relative", b"/a\x00b"])
def test_a_pointer_to_nowhere_counts_as_none(tmp_path: Path, pointer: bytes) -> None:
    (tmp_path / ".lmstudio-home-pointer").write_bytes(pointer)
    assert lm_studio_models(tmp_path) == tmp_path / ".lmstudio" / "models"


@pytest.mark.parametrize(
    ("publisher", "file"),
    [("..", "m.gguf"), ("a/b", "m.gguf"), ("", "m.gguf"), ("me", "../m.gguf"), ("me", "m.bin"), ("a\nb", "m.gguf")],
)
def test_names_that_are_no_folders_are_refused(tmp_path: Path, publisher: str, file: str) -> None:
    with pytest.raises(ExportError, match="LM Studio"):
        lm_studio_path(tmp_path, publisher, "legal", file)
