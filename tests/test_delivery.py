"""`ft merge` and `ft export` on a real run: straight to a proven file, and what happens when it cannot be proven."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from finetune import delivery
from finetune.console import Console
from finetune.errors import ExportError
from finetune.runs.folder import RunFolder
from tests.conftest import RunFt
from tests.test_pipeline import write_config

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_ft: RunFt) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder, max_steps=20)
    result = run_ft("train", "tiny.yaml", cwd=folder)
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A folder with a finished run of its own."""
    copy = Path(shutil.copytree(trained, tmp_path / "project"))
    resolved = copy / "runs" / "tiny" / "resolved.yaml"
    resolved.write_text(resolved.read_text("utf-8").replace(str(trained), str(copy)), "utf-8")
    return copy


def test_several_files_straight_from_the_adapter_each_proven(folder: Path, run_ft: RunFt) -> None:
    result = run_ft("export", "tiny", "--quant", "q8_0,f16", "--system", "Be brief.", cwd=folder)
    assert result.code == 0, result.stderr
    run = folder / "runs" / "tiny"
    assert sorted(path.name for path in (run / "gguf").iterdir()) == ["Modelfile", "tiny-f16.gguf", "tiny-q8_0.gguf"]
    assert not (run / "merged").exists()
    proof = json.loads((run / "verification.json").read_text("utf-8"))
    assert {name: (one["proven"], one["problems"]) for name, one in proof.items()} == {
        "gguf/tiny-q8_0.gguf": (True, []),
        "gguf/tiny-f16.gguf": (True, []),
    }
    for name, one in proof.items():
        assert one["sha256"] == hashlib.sha256((run / name).read_bytes()).hexdigest()
        assert one["from_what_was_merged"]["mean_nats"] < one["base_from_what_was_merged"]["mean_nats"]
        # Trained in NF4, merged onto 16 bit: both are measured.
        assert one["merges_apart"]["mean_nats"] > 0
        assert set(one["perplexity"]) == {"base", "stored", "nf4", "artifact"}
    assert "adapter on the NF4 base" in result.stderr
    assert 'SYSTEM "Be brief."' in (run / "gguf" / "Modelfile").read_text("utf-8")
    again = run_ft("export", "tiny", "--quant", "q8_0", cwd=folder)
    assert again.code == 1
    assert "this exists already" in again.stderr


def test_onto_the_weights_that_training_saw(folder: Path, run_ft: RunFt) -> None:
    result = run_ft("merge", "tiny", "--base", "nf4", cwd=folder)
    assert result.code == 0, result.stderr
    proof = json.loads((folder / "runs" / "tiny" / "verification.json").read_text("utf-8"))["merged"]
    assert proof["merged_onto"] == "nf4"
    assert proof["from_what_was_trained"]["mean_nats"] < proof["merges_apart"]["mean_nats"]


def test_a_proof_that_fails_leaves_the_file_under_its_partial_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter changes between writing and proving, so the file no longer says what the adapter says."""
    run = RunFolder(folder / "runs" / "tiny")
    monkeypatch.chdir(folder)
    real = delivery.prove

    def prove_another(*arguments: object) -> object:
        from safetensors.torch import load_file, save_file

        weights = load_file(run.adapter / "adapter_model.safetensors")
        save_file({name: -3 * tensor for name, tensor in weights.items()}, run.adapter / "adapter_model.safetensors")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(delivery, "prove", prove_another)
    with pytest.raises(ExportError, match="differs from what was trained"):
        delivery.export(run, "gguf", ["f32"], delivery.Wishes(), Console())
    assert sorted(path.name for path in run.gguf.iterdir()) == ["tiny-f32.gguf.partial"]
    assert json.loads(run.verification.read_text("utf-8"))["gguf/tiny-f32.gguf"]["proven"] is False
    # The next attempt replaces it.
    monkeypatch.setattr(delivery, "prove", real)
    delivery.export(run, "gguf", ["f32"], delivery.Wishes(), Console())
    assert sorted(path.name for path in run.gguf.iterdir()) == ["Modelfile", "tiny-f32.gguf"]


def test_a_run_whose_data_is_gone_is_proven_on_texts_alone(folder: Path, run_ft: RunFt) -> None:
    (folder / "rows.jsonl").unlink()
    shutil.rmtree(folder / "runs" / ".data")
    result = run_ft("export", "tiny", "--quant", "q8_0", cwd=folder)
    assert result.code == 0, result.stderr
    assert "the run's data cannot be read" in result.stderr


def test_the_adapter_alone_is_proven_on_its_base(folder: Path, run_ft: RunFt) -> None:
    result = run_ft("export", "tiny", "--to", "gguf-lora", "--ollama-base", "tiny:base", cwd=folder)
    assert result.code == 0, result.stderr
    run = folder / "runs" / "tiny"
    assert sorted(path.name for path in (run / "gguf").iterdir()) == ["Modelfile.lora", "tiny-lora.gguf"]
    assert "ADAPTER ./tiny-lora.gguf" in (run / "gguf" / "Modelfile.lora").read_text("utf-8")
    assert json.loads((run / "verification.json").read_text("utf-8"))["gguf/tiny-lora.gguf"]["proven"] is True


def test_what_is_not_proven_is_said_so_and_can_be_proven_later(folder: Path, run_ft: RunFt) -> None:
    run = RunFolder(folder / "runs" / "tiny")
    assert run_ft("merge", "tiny", cwd=folder).code == 0
    assert json.loads(run.verification.read_text("utf-8"))["merged"]["proven"] is True
    shutil.rmtree(run.merged)
    result = run_ft("merge", "tiny", "--no-verify", cwd=folder)
    assert "not proven" in result.stderr
    assert "merged" not in json.loads(run.verification.read_text("utf-8"))
    assert "from before; proven" in run_ft("export", "tiny", "--to", "hf", cwd=folder).stderr
    again = run_ft("export", "tiny", "--to", "hf", cwd=folder)
    assert again.code == 0
    assert "nats apart" not in again.stderr, "proven twice"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", bytes(100), "head of a safetensors file"),
        ("generation_config.json", b'{"eos_token_id": 3}', "generation_config.json is not the one"),
        ("tokenizer_config.json", None, "tokenizer_config.json is not the one"),
    ],
)
def test_a_merged_folder_that_somebody_changed_is_found(
    folder: Path, run_ft: RunFt, file: str, content: bytes | None, words: str
) -> None:
    assert run_ft("merge", "tiny", "--no-verify", cwd=folder).code == 0
    path = folder / "runs" / "tiny" / "merged" / file
    path.write_bytes(content if content is not None else path.read_bytes() + b"\n")
    result = run_ft("export", "tiny", "--to", "hf", cwd=folder)
    assert result.code == 1
    assert words in result.stderr


def test_two_exports_of_one_run_do_not_meet(folder: Path, run_ft: RunFt) -> None:
    run = RunFolder(folder / "runs" / "tiny")
    with run.lock():
        for command in (["merge", "tiny"], ["export", "tiny"], ["export", "tiny", "--to", "gguf-lora"]):
            result = run_ft(*command, cwd=folder)
            assert result.code == 1
            assert "in use by process" in result.stderr


def test_a_modelfile_that_cannot_be_written_is_said_before_anything_is(folder: Path, run_ft: RunFt) -> None:
    result = run_ft("export", "tiny", "--system", 'say """hi"""', cwd=folder)
    assert result.code == 1
    assert "a Modelfile cannot hold this text" in result.stderr
    assert not (folder / "runs" / "tiny" / "gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "onnx"], "--to is one of gguf, hf, gguf-lora, not 'onnx'"),
        (["--quant", "q9"], "--quant is one of f32, f16"),
        (["--base", "int3"], "--base is stored or nf4, not 'int3'"),
    ],
)
def test_wishes_that_do_not_exist(folder: Path, run_ft: RunFt, arguments: list[str], words: str) -> None:
    result = run_ft("export", "tiny", *arguments, cwd=folder)
    assert result.code == 2
    assert words in result.stderr


def test_another_base_than_the_one_that_was_trained_on(folder: Path, run_ft: RunFt) -> None:
    run = RunFolder(folder / "runs" / "tiny")
    run.update_manifest(base_files={"config.json": "0" * 64})
    result = run_ft("export", "tiny", cwd=folder)
    assert result.code == 1
    assert "is not the file that the adapter was trained on" in result.stderr
    assert not run.gguf.exists()
