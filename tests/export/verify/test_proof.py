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
from finetune.export.verify.asked import Artifact, Asked
from finetune.export.verify.metrics import Distance, Shift
from finetune.export.verify.probes import CONVERSATIONS, LONG
from finetune.export.verify.proof import Measured, Reference, Subject, measure
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
            stack.enter_context(open_gguf(_gguf(subject, tmp_path, quant), quant, quant, LONG)) for quant in quants
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
    assert exact.asked.texts == len(TEXTS) + len(CONVERSATIONS) + 3  # added tokens: <unk>, <s>, </s>
    assert (exact.asked.prompts, exact.asked.other_prompts) == (len(CONVERSATIONS), [])
    assert reference.long == 512
    assert exact.apart_far is not None
    assert exact.apart_far.mean < 1e-8
    assert [one.shift.kept for one in found] == pytest.approx([1.0] * 5, abs=0.02)
    assert exact.perplexity == pytest.approx(reference.perplexity["stored"], rel=1e-4)
    assert reference.perplexity["base"] != pytest.approx(reference.perplexity["stored"], rel=1e-2)
    header, rows = table(reference, found)
    assert {len(row) for row in rows} == {len(header)}
    assert json.loads(json.dumps(as_dict(reference, exact, verdicts[0])))["proven"] is True


def test_a_file_that_is_the_base_is_found_out(subject: Subject, tmp_path: Path) -> None:
    convert(subject.base, tmp_path / "base.gguf", quant="f32")
    with open_gguf(tmp_path / "base.gguf", "base", "f32", LONG) as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert any("has 0% of what training changed" in problem or "has -0%" in problem for problem in verdict.problems)


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
        with open_gguf(tmp_path / "x.gguf", "x", "f32", LONG) as artifact:
            _, _, verdict = _proof(subject, artifact)
    assert any("differs from what was trained" in problem for problem in verdict.problems)


@pytest.mark.parametrize("quant", ["f32", "q4_0"])
def test_half_of_an_adapter_is_found(subject: Subject, tmp_path: Path, quant: Quant) -> None:
    """What a wrong scale does, even where the encoding's own noise is as large as what is missing."""
    base, whole = subject.base.place / "model.safetensors", tmp_path / "merged"
    merge(subject.base.place, subject.adapter, whole, tokenizer=subject.base.place, dtype="float32")
    tensors = load_file(whole / "model.safetensors")
    halves = {name: (tensors[name] + tensor) / 2 for name, tensor in load_file(base).items()}
    save_file(halves, whole / "model.safetensors", {"format": "pt"})
    convert(open_model(whole), tmp_path / "x.gguf", quant=quant)
    with open_gguf(tmp_path / "x.gguf", "x", quant, LONG) as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert any("of what training changed" in problem for problem in verdict.problems), verdict


def _other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("assistant:", "bot:"))


def _other_bos(folder: Path) -> None:
    """llama.cpp would put an end of text after every prompt."""
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "chat_template.jinja").unlink()
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")


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
        (_other_template, "its chat template is not the one"),
        (_other_bos, "other special tokens around a prompt"),
        (_other_ids, "texts have other token ids than in training"),
    ],
)
def test_a_spoiled_tokenizer_is_found(
    subject: Subject, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    other = Path(shutil.copytree(subject.base.place, tmp_path / "tokenizer"))
    spoil(other)
    with open_gguf(_gguf(subject, tmp_path, tokenizer=other), "x", "f32", LONG) as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert any(words in problem for problem in verdict.problems), verdict


def test_a_file_that_does_not_stop_where_training_did_is_found(subject: Subject, tmp_path: Path) -> None:
    subject = dataclasses.replace(subject, stop_ids=[subject.tokenizer.encode(" Lily", special=False)[0]])
    with open_gguf(_gguf(subject, tmp_path), "x", "f32", LONG) as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert verdict.problems == ("it would not stop at the token that ends an answer",)


def test_an_adapter_that_does_nothing_is_said_so(subject: Subject, tmp_path: Path) -> None:
    weak = save_adapter(subject.base.place, tmp_path / "weak", strength=1e-7, target_modules=["q_proj"])
    subject = dataclasses.replace(subject, adapter=weak)
    with open_gguf(_gguf(subject, tmp_path), "x", "f32", LONG) as artifact:
        _, _, verdict = _proof(subject, artifact)
    assert verdict.problems == (
        "the adapter changes nothing that can be measured: base and trained model say the same",
    )


def test_without_rows_or_template_the_texts_decide(subject: Subject, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(subject.base.place, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    subject = dataclasses.replace(subject, rows=(), template=None, tokenizer=load_tokenizer(plain))
    with open_gguf(_gguf(subject, tmp_path, tokenizer=plain), "x", "f32", LONG) as artifact:
        reference, measured, verdict = _proof(subject, artifact)
    assert verdict.proven
    assert (measured.asked.texts, measured.answers, measured.asked.prompts) == (len(TEXTS) + 3, 0, 0)
    assert reference.perplexity == {}


def _apart(mean: float) -> Distance:
    return Distance(np.full(10, mean), np.ones(10, dtype=np.bool_))


def _judged(precision: str = "q4_k_m", *, mean: float = 0.01, mixture: bool = False, **settings: Any) -> Verdict:
    reference = Reference("stored", "held-out", mixture=mixture, long=512, base_apart=_apart(0.2))
    asked = Asked(70, template_as_trained=True, prompts=4, ends=True)
    measured = Measured("x", precision, asked, apart=_apart(mean), shift=Shift(0.98, 1.0))
    for key, value in settings.items():
        setattr(asked if hasattr(asked, key) else measured, key, value)
    return judge(reference, measured)


def test_what_costs_much_of_the_training_is_warned_of() -> None:
    assert _judged() == Verdict((), ())
    assert _judged(mean=0.15).warnings == (
        "q4_k_m changes the model 75% as much as training did: more bits keep more of it",
    )
    assert "where q4_k_m may cost" in _judged(mean=0.31).problems[0]
    assert "where q4_k_m may cost" in _judged(mean=float("nan")).problems[0]


@pytest.mark.parametrize(("precision", "kept", "sound"), [
    ("q8_0", 0.85, False), ("q8_0", 0.95, True), ("q8_0", 1.15, False),
    ("q4_0", 0.68, False), ("q4_0", 0.8, True), ("q4_0", 1.2, True), ("q4_0", 2.0, False), ("f32", -0.1, False),
])  # fmt: skip
def test_an_artifact_must_have_what_training_changed(precision: str, kept: float, sound: bool) -> None:
    verdict = _judged(precision, mean=1e-7, shift=Shift(kept, 1.0))
    assert verdict.proven is sound
    assert sound or "of what training changed" in verdict.problems[0]


def test_other_things_that_are_wrong_are_said() -> None:
    assert "would not stop" in _judged(ends=False).problems[0]
    assert "after 512 tokens" in _judged(apart_far=_apart(1.3)).problems[0]
    assert "other special tokens around a prompt" in _judged(framed=[1, 2]).problems[0]
    assert "logits less likely" in _judged("f32", mean=1e-7, worst_gap=0.5).problems[0]
    # The template is the same, so what fills it is the runtime's affair.
    assert _judged(other_prompts=["(user)"]).proven
    assert "fills the chat template otherwise" in _judged(other_prompts=["(user)"]).warnings[0]


def test_a_mixture_may_send_tokens_elsewhere() -> None:
    assert not _judged("bf16", mean=0.05).proven
    assert _judged("bf16", mean=0.05, mixture=True).proven
    assert not _judged("f32", mean=0.05, mixture=True).proven
