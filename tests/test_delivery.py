"""`ft merge` and `ft export` on a real run: straight to a proven file, and what happens when it cannot be proven."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from finetune import delivery
from finetune.console import Console
from finetune.delivery import Wishes, wishes
from finetune.errors import ConfigError, ExportError, StorageError
from finetune.export.gguf.convert import GgufPlan, GgufReport, write
from finetune.runs.files import partial_of
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


def test_the_same_command_again_goes_on_where_it_was_killed(
    folder: Path, run_ft: RunFt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the names of two files: one is there, proven; the other was still a `.partial`."""
    run = RunFolder(folder / "runs" / "tiny")
    command = ("export", "tiny", "--quant", "q8_0,f16", "--system", "Be brief.")
    assert run_ft(*command, cwd=folder).code == 0
    before = {path.name: path.read_bytes() for path in run.gguf.iterdir()}
    kept, other = run.gguf / "tiny-q8_0.gguf", run.gguf / "tiny-f16.gguf"
    other.rename(partial_of(other))
    partial_of(partial_of(other)).write_bytes(b"half of a file")
    (run.gguf / "Modelfile").unlink()
    changed = kept.stat().st_mtime_ns
    again = run_ft(*command, cwd=folder)
    assert again.code == 0, again.stderr
    assert {path.name: path.read_bytes() for path in run.gguf.iterdir()} == before
    assert kept.stat().st_mtime_ns == changed
    assert "from before, proven" in again.stderr
    assert again.stderr.count("tiny-q8_0.gguf") == 1, "proven twice"
    # What was proven is that, whether or not it is asked for now.
    monkeypatch.chdir(folder)
    delivery.export(run, "gguf", ["f16", "q8_0"], Wishes(verify=False), Console())
    assert capsys.readouterr().err.count("from before, proven)") == 2


def test_what_was_made_otherwise_is_not_taken_for_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(folder / "runs" / "tiny")
    monkeypatch.chdir(folder)
    unproven = Wishes(verify=False)
    for _ in range(2):
        delivery.merge(run, unproven, Console())
        delivery.export(run, "gguf", ["f16"], unproven, Console())
        delivery.export(run, "gguf-lora", [], unproven, Console())
    assert capsys.readouterr().err.count("from before") == 3
    entries = json.loads(run.verification.read_text("utf-8"))
    assert [(name, entry["proven"]) for name, entry in entries.items()] == [
        ("merged", False),
        ("gguf/tiny-f16.gguf", False),
        ("gguf/tiny-lora.gguf", False),
    ]
    with pytest.raises(ExportError, match=r"tiny-f16.gguf: this exists already, and is not what would be made now"):
        delivery.export(run, "gguf", ["q8_0", "f16"], Wishes(onto="nf4", verify=False), Console())
    # Trained on: another adapter.
    config = run.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"lora_alpha": 1}), "utf-8")
    for verify in (True, False):
        with pytest.raises(ExportError, match=r"merged: this exists already, and is not what would be made now"):
            delivery.merge(run, Wishes(verify=verify), Console())
    # Nobody knows of this file, and nobody is asked to prove it.
    run.verification.unlink()
    with pytest.raises(ExportError, match="this exists already"):
        delivery.export(run, "gguf", ["f16"], unproven, Console())


def test_room_for_all_files_is_asked_for_before_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(folder / "runs" / "tiny")
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100 * 2**20))
    delivery.export(run, "gguf", ["q8_0"], Wishes(verify=False), Console())
    (run.gguf / "tiny-f16.gguf.partial").write_bytes(bytes(1000))
    with pytest.raises(StorageError, match=r"tiny-f16.gguf and tiny-f32.gguf: 1[0-9.]+ MiB needed, 100.0 MiB free"):
        delivery.export(run, "gguf", ["f16,f32"], Wishes(verify=False), Console())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50 * 2**20))
    with pytest.raises(
        StorageError, match=r"tiny-lora.gguf and the base that it is proven on: 6[0-9.]+ MiB needed, 50.0 MiB free"
    ):
        delivery.export(run, "gguf-lora", [], Wishes(), Console())
    assert sorted(path.name for path in run.gguf.iterdir()) == ["Modelfile", "tiny-q8_0.gguf"]


def test_a_disk_that_fills_up_keeps_nothing_of_what_cannot_be_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(folder / "runs" / "tiny")

    def fill_up(plan: GgufPlan, out: Path, *, on_tensor: object) -> GgufReport:
        if plan.quant == "f32":
            raise StorageError("full", place=str(out))
        return write(plan, out)

    # The package has a function of this module's name.
    monkeypatch.setattr(sys.modules["finetune.export.gguf.convert"], "write", fill_up)
    with pytest.raises(StorageError, match="full"):
        delivery.export(run, "gguf", ["f16,f32"], Wishes(verify=False), Console())
    assert list(run.gguf.iterdir()) == []


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
    real = wishes.prove

    def prove_another(*arguments: object) -> object:
        from safetensors.torch import load_file, save_file

        weights = load_file(run.adapter / "adapter_model.safetensors")
        save_file({name: -3 * tensor for name, tensor in weights.items()}, run.adapter / "adapter_model.safetensors")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(wishes, "prove", prove_another)
    with pytest.raises(ExportError, match="differs from what was trained"):
        delivery.export(run, "gguf", ["f32"], Wishes(), Console())
    assert sorted(path.name for path in run.gguf.iterdir()) == ["tiny-f32.gguf.partial"]
    assert json.loads(run.verification.read_text("utf-8"))["gguf/tiny-f32.gguf"]["proven"] is False
    # The next attempt replaces it.
    monkeypatch.setattr(wishes, "prove", real)
    delivery.export(run, "gguf", ["f32"], Wishes(), Console())
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


def test_what_is_not_proven_is_said_so_and_can_be_proven_later(
    folder: Path, run_ft: RunFt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(folder / "runs" / "tiny")
    assert run_ft("merge", "tiny", cwd=folder).code == 0
    assert json.loads(run.verification.read_text("utf-8"))["merged"]["proven"] is True
    shutil.rmtree(run.merged)
    result = run_ft("merge", "tiny", "--no-verify", cwd=folder)
    assert "not proven" in result.stderr
    assert json.loads(run.verification.read_text("utf-8"))["merged"]["proven"] is False
    assert "from before; proven" in run_ft("export", "tiny", "--to", "hf", cwd=folder).stderr
    again = run_ft("export", "tiny", "--to", "hf", cwd=folder)
    assert again.code == 0
    assert "nats apart" not in again.stderr, "proven twice"
    monkeypatch.chdir(folder)
    delivery.merge(run, Wishes(verify=False), Console())
    assert capsys.readouterr().err == f"merged: {run.merged} (from before; proven)\n"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", bytes(100), "head of a safetensors file"),
        ("generation_config.json", b'{"eos_token_id": 3}', "generation_config.json is not the one"),
        ("tokenizer_config.json", None, "tokenizer_config.json is not the one"),
    ],
)
def test_a_merged_folder_that_somebody_changed_is_found(
    folder: Path, run_ft: RunFt, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes | None, words: str
) -> None:
    assert run_ft("merge", "tiny", "--no-verify", cwd=folder).code == 0
    path = folder / "runs" / "tiny" / "merged" / file
    path.write_bytes(content if content is not None else path.read_bytes() + b"\n")
    result = run_ft("export", "tiny", "--to", "hf", cwd=folder)
    assert result.code == 1
    assert words in result.stderr
    assert "hint: remove it, and run the same command again" in result.stderr
    # It stays found, also by whoever asks for no proof.
    monkeypatch.chdir(folder)
    for verify in (False, True) if "not the one" in words else (False,):
        with pytest.raises(ExportError, match="merged: this exists already, and ") as refused:
            delivery.merge(RunFolder(Path("runs/tiny")), Wishes(verify=verify), Console())
        assert "remove it, and run the same command again" in str(refused.value.problems[0].hint)


def test_a_file_that_llama_cpp_cannot_load_is_no_dead_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run = RunFolder(Path("runs/tiny"))
    delivery.export(run, "gguf", ["f16"], Wishes(verify=False), Console())
    file = run.gguf / "tiny-f16.gguf"
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(ExportError, match=r"llama\.cpp cannot load this file") as refused:
        delivery.export(run, "gguf", ["f16"], Wishes(), Console())
    (problem,) = refused.value.problems
    assert (problem.place, problem.hint) == (str(file), "remove it, and run the same command again")


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


@pytest.mark.parametrize(
    ("to", "quants", "wishes", "expected"),
    [
        ("hf", ["q4_k_m"], Wishes(), {"--quant": "the model is written in its base's precision"}),
        ("gguf-lora", ["q4_k_m"], Wishes(), {"--quant": "the adapter is written in float32"}),
        ("gguf", ["q8_0"], Wishes(ollama_base="llama3"), {"--ollama-base": "the file is a whole model"}),
        (
            "hf",
            [],
            Wishes(system="Be brief.", ollama_template=True, ollama_base="llama3"),
            dict.fromkeys(("--system", "--ollama-template", "--ollama-base"), "no Modelfile is written"),
        ),
        (
            "gguf-lora",
            [],
            Wishes(onto="nf4", system="Be brief."),
            {"--base": "the adapter is put onto nothing", "--system": "no Modelfile is written without --ollama-base"},
        ),
        (
            "gguf-lora",
            [],
            Wishes(ollama_template=True, ollama_base="llama3"),
            {"--ollama-template": "Ollama takes the base's template"},
        ),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    tmp_path: Path, to: str, quants: list[str], wishes: Wishes, expected: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        delivery.export(RunFolder(tmp_path), to, quants, wishes, Console())
    assert [(one.place, one.message) for one in refused.value.problems] == [
        (option, f"means nothing with --to {to}: {why}") for option, why in expected.items()
    ]
    assert list(tmp_path.iterdir()) == []


def test_another_base_than_the_one_that_was_trained_on(folder: Path, run_ft: RunFt) -> None:
    run = RunFolder(folder / "runs" / "tiny")
    run.update_manifest(base_files={"config.json": "0" * 64})
    result = run_ft("export", "tiny", cwd=folder)
    assert result.code == 1
    assert "is not the file that the adapter was trained on" in result.stderr
    assert not run.gguf.exists()
