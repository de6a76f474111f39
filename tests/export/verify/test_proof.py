"""What is sound is proven, and every way of spoiling an export is found and named."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.data.store import TokenRow
from finetune.data.template import choose_template, end_of_turn
from finetune.data.tokenizer import load_tokenizer
from finetune.export.gguf import Quant, convert
from finetune.export.merge import merge
from finetune.export.merged import merged_model
from finetune.export.source import open_model
from finetune.export.verify.artifacts import open_folder, open_gguf
from finetune.export.verify.proof import Artifact, Measured, Reference, Subject, measure
from finetune.export.verify.texts import TEXTS
from finetune.export.verify.verdict import Verdict, as_dict, judge, table
from tests.export.conftest import peft_allowed, save_adapter

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with peft_allowed():
        yield


@pytest.fixture(scope="module")
def base(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real small model, with a chat template."""
    folder = Path(shutil.copytree(assets / "models" / "stories260K", tmp_path_factory.mktemp("base") / "base"))
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with peft_allowed():
        return save_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", strength=0.05)


@pytest.fixture(scope="module")
def subject(base: Path, adapter: Path) -> Subject:
    import datetime

    tokenizer = load_tokenizer(base)
    template = choose_template(None, tokenizer, datetime.datetime(2026, 1, 1))
    ids = np.array(tokenizer.encode(STORY, special=True), dtype=np.int32)
    supervised = np.arange(len(ids)) >= len(ids) // 2
    rows = [TokenRow(ids, supervised, "story:1")]
    stop_ids = end_of_turn(template, tokenizer)[0]
    return Subject(open_model(base), adapter, tokenizer, template, stop_ids, rows, "held-out", False, "stored", "cpu")


def _proof(subject: Subject, artifact: Artifact) -> tuple[Reference, Measured, Verdict]:
    reference, (measured,) = measure(subject, [artifact], lambda what, done, total: None)
    return reference, measured, judge(reference, measured)


def _gguf(subject: Subject, folder: Path, quant: Quant = "f32", *, tokenizer: Path | None = None) -> Path:
    model = merged_model(
        subject.base.place, subject.adapter, tokenizer=tokenizer or subject.base.place, dtype="float32"
    )
    convert(model, folder / f"{quant}.gguf", quant=quant, name="test")
    return folder / f"{quant}.gguf"


def test_sound_files_are_proven(subject: Subject, tmp_path: Path) -> None:
    quants: list[Quant] = ["f32", "f16", "bf16", "q8_0"]
    merge(subject.base.place, subject.adapter, tmp_path / "merged", tokenizer=subject.base.place, dtype="bfloat16")
    with contextlib.ExitStack() as stack:
        artifacts: list[Artifact] = [
            stack.enter_context(open_gguf(_gguf(subject, tmp_path, quant), quant, quant)) for quant in quants
        ]
        artifacts.append(open_folder(tmp_path / "merged", "merged", "cpu"))
        reference, found = measure(subject, artifacts, lambda what, done, total: None)
    verdicts = [judge(reference, one) for one in found]
    assert [verdict.problems for verdict in verdicts] == [()] * 5
    # Two programs that add in another order differ by rounding: 1e-12 nats were seen. Fewer bits, more distance.
    means = {one.name: one.apart.mean for one in found}
    assert means["f32"] < 1e-9
    assert means["f32"] < means["f16"] < means["bf16"] < means["q8_0"] < 0.01
    assert means["merged"] < 1e-3
    exact = found[0]
    assert (exact.same_tokens, exact.worst_gap) == (exact.tokens, 0.0)
    assert exact.answers == 1
    assert exact.texts == len(TEXTS) + 2
    assert exact.prompt_as_trained
    assert exact.perplexity == pytest.approx(reference.perplexity["stored"], rel=1e-4)
    assert reference.perplexity["base"] != pytest.approx(reference.perplexity["stored"], rel=1e-2)
    header, rows = table(reference, found)
    assert {len(row) for row in rows} == {len(header)}
    assert json.loads(json.dumps(as_dict(reference, exact, verdicts[0])))["proven"] is True


def test_a_file_that_is_the_base_is_found_out(subject: Subject, tmp_path: Path) -> None:
    convert(subject.base, tmp_path / "base.gguf", quant="f32")
    with open_gguf(tmp_path / "base.gguf", "base", "f32") as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert any("no nearer to what was trained" in problem for problem in verdict.problems)


def _swap_queries(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = weight.flip(0).contiguous()


def _lose_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"].zero_()


@pytest.mark.parametrize("spoil", [_swap_queries, _lose_a_layer])
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_spoiled_weights_are_found(
    subject: Subject, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], None], kind: str
) -> None:
    folder = tmp_path / "merged"
    merge(subject.base.place, subject.adapter, folder, tokenizer=subject.base.place, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if kind == "folder":
        _, _, verdict = _proof(subject, open_folder(folder, "merged", "cpu"))
    else:
        convert(open_model(folder), tmp_path / "x.gguf", quant="f32")
        with open_gguf(tmp_path / "x.gguf", "x", "f32") as artifact:
            _, _, verdict = _proof(subject, artifact)
    assert any("differs from what was trained" in problem for problem in verdict.problems)


def _other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("assistant:", "bot:"))


def _other_ids(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = spec["model"]["vocab"]
    first, second = "▁Lily", "▁park"
    if second not in vocabulary:
        second = "▁was"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_other_template, "its chat template gives another prompt"),
        (_other_ids, "texts have other token ids than in training"),
    ],
)
def test_a_spoiled_tokenizer_is_found(
    subject: Subject, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    other = Path(shutil.copytree(subject.base.place, tmp_path / "tokenizer"))
    spoil(other)
    with open_gguf(_gguf(subject, tmp_path, tokenizer=other), "x", "f32") as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert any(words in problem for problem in verdict.problems), verdict


def test_a_file_that_does_not_stop_where_training_did_is_found(subject: Subject, tmp_path: Path) -> None:
    subject = dataclasses.replace(subject, stop_ids=[subject.tokenizer.encode(" Lily", special=False)[0]])
    with open_gguf(_gguf(subject, tmp_path), "x", "f32") as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert verdict.problems == ("it would not stop at the token that ends an answer",)


def test_an_adapter_that_does_nothing_is_said_so(subject: Subject, tmp_path: Path) -> None:
    weak = save_adapter(subject.base.place, tmp_path / "weak", strength=1e-7, target_modules=["q_proj"])
    subject = dataclasses.replace(subject, adapter=weak)
    with open_gguf(_gguf(subject, tmp_path), "x", "f32") as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert verdict.problems == (
        "the adapter changes nothing that can be measured: base and trained model say the same",
    )


def test_without_rows_or_template_the_texts_decide(subject: Subject, tmp_path: Path) -> None:
    subject = dataclasses.replace(subject, rows=(), template=None)
    with open_gguf(_gguf(subject, tmp_path), "x", "f32") as artifact:
        reference, measured, verdict = _proof(subject, artifact)
    assert verdict.proven
    assert (measured.texts, measured.answers, measured.prompt_as_trained) == (len(TEXTS), 0, None)
    assert reference.perplexity == {}


def _judged(**settings: Any) -> Verdict:
    def apart(mean: float) -> Any:
        from finetune.export.verify.metrics import Distance

        return Distance(np.full(10, mean), np.ones(10, dtype=np.bool_))

    reference = Reference("stored", "held-out", base_apart=apart(0.2))
    measured = Measured("x", "q4_k_m", 70, ends=True, prompt_as_trained=True, apart=apart(0.01))
    for key, value in settings.items():
        setattr(measured, key, apart(value) if key == "apart" else value)
    return judge(reference, measured)


def test_what_costs_much_of_the_training_is_warned_of() -> None:
    assert _judged() == Verdict((), ())
    assert _judged(apart=0.1).warnings == (
        "q4_k_m changes the model 50% as much as training did: more bits keep more of it",
    )
    assert _judged(apart=0.3).problems == (
        "it is no nearer to what was trained (0.3 nats) than the base is (0.2): what was learned is lost in it",
    )
    assert "where q4_k_m may cost" in _judged(apart=float("nan")).problems[0]
    assert _judged(normalised=2).proven
