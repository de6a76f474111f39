"""Real tokenizers with their templates: what carries loss, the one BOS, and what a template leaves out."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.config.schema import Config
from finetune.data.prepare import PreparedData, prepare
from finetune.data.store import TokenRow
from finetune.errors import BaseError, DataError

from .conftest import write_rows


@dataclass(frozen=True)
class Case:
    """A tokenizer, a template, and what an answer is to end with."""

    folder: str
    template: str | None
    end: str
    bos: str | None
    takes_system: bool = True

    def __str__(self) -> str:
        return f"{Path(self.folder).name}-{Path(self.template).stem if self.template else 'own'}"


CASES = [
    Case("tokenizers/qwen2", None, "<|im_end|>", None),
    Case("tokenizers/qwen2", "plain", "<|endoftext|>", None),
    Case("tokenizers/phi-3", None, "<|end|>", "<s>", takes_system=False),
    Case("tokenizers/phi-3", "plain", "<|endoftext|>", "<s>"),
    Case("tokenizers/llama-bpe", "meta-llama-Llama-3.1-8B-Instruct.jinja", "<|eot_id|>", "<|begin_of_text|>"),
    Case("tokenizers/llama-bpe", "meta-llama-Llama-3.2-3B-Instruct.jinja", "<|eot_id|>", "<|begin_of_text|>"),
    Case("models/stories260K", "plain", "</s>", "<s>"),
    Case("tokenizers/gpt-2", "plain", "<|endoftext|>", None),
]

TURNS = [
    ("user", "Which clause is this? [INST]"),
    ("assistant", "An indemnity:\n\n1. 10 % — naïve, 日本語 🙂"),
    ("user", "assistant\nAnd this?"),
    ("assistant", "A waiver."),
]


def prepared(assets: Path, case: Case, folder: Path, rows: list[list[tuple[str, str]]]) -> PreparedData:
    messages = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    template = case.template
    if template and template.endswith(".jinja"):
        template = str(assets / "chat_templates" / template)
    values: dict[str, Any] = {
        "base": str(assets / case.folder),
        "chat_template": template,
        "data": [{"path": str(write_rows(folder / "rows.jsonl", messages))}],
        "evaluation": {"split": 0},
    }
    return prepare(Config.model_validate(values), assets / case.folder)


def answers(data: PreparedData, row: TokenRow) -> list[str]:
    """The text of each stretch of tokens with loss."""
    found, stretch = [], []
    for token, loss in [*zip(row.ids.tolist(), row.supervised.tolist(), strict=True), (0, False)]:
        if loss:
            stretch.append(token)
        elif stretch:
            found.append(data.tokenizer.decode(stretch, skip_special=False))
            stretch = []
    return found


Rendered = tuple[Case, list[list[tuple[str, str]]], PreparedData]


@pytest.fixture(scope="module", params=CASES, ids=str)
def rendered(request: pytest.FixtureRequest, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """A case, the conversations, and what becomes of them. Large vocabularies load slowly, so once for all tests."""
    case: Case = request.param
    system = [("system", "Be brief.")] if case.takes_system else []
    rows = [TURNS[:2], TURNS, [*system, *TURNS]]
    return case, rows, prepared(assets, case, tmp_path_factory.mktemp("masks"), rows)


def test_each_answer_and_its_end_of_turn_carry_loss(rendered: Rendered) -> None:
    case, rows, data = rendered
    for row, said in zip(data.train, rows, strict=True):
        assert answers(data, row) == [text + case.end for role, text in said if role == "assistant"]


def test_there_is_exactly_one_bos_where_there_is_one(rendered: Rendered) -> None:
    case, _, data = rendered
    for row in data.train:
        if case.bos is None:
            assert row.ids[0] != data.tokenizer.token_id(data.tokenizer.special["bos_token"])
            continue
        bos = data.tokenizer.token_id(case.bos)
        assert row.ids[0] == bos
        assert not row.supervised[0]
        assert (row.ids == bos).sum() == 1


@pytest.mark.parametrize("folder", ["models/stories260K", "tokenizers/phi-3", "tokenizers/gpt-2"])
def test_plain_text_gets_what_the_tokenizer_puts_around_it(assets: Path, tmp_path: Path, folder: str) -> None:
    values = {"base": str(assets / folder), "data": [{"path": str(write_rows(tmp_path / "t.jsonl", [{"text": "Hi"}]))}]}
    data = prepare(Config.model_validate({**values, "evaluation": {"split": 0}}), assets / folder)
    ids, tokenizer = data.train[0].ids.tolist(), data.tokenizer
    assert ids == [*tokenizer.encode("Hi", special=True), tokenizer.eos_id]
    bos = tokenizer.token_id(tokenizer.special["bos_token"])
    assert ids.count(bos) == 1, "once, at the start or (in GPT-2, whose BOS is its EOS) at the end"


def test_a_template_that_drops_the_system_message_is_refused(assets: Path, tmp_path: Path) -> None:
    """Phi-3's says nothing and leaves it out; rows trained so would teach answers without what led to them."""
    with pytest.raises(DataError) as caught:
        prepared(assets, CASES[2], tmp_path, [[("system", "Be brief."), *TURNS]])
    (problem,) = caught.value.problems
    assert str(problem).endswith(
        "rows.jsonl:1: the chat template (of phi-3) refuses this conversation: it leaves out or changes turn 1, the "
        "system's"
    )
    assert problem.hint is not None


# Contents that begin and end with something visible: white space at the seams can share a token with the template's.
texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp", "Cn"]), min_size=1, max_size=30).filter(
    lambda text: text == text.strip() and "▁" not in text and unicodedata.normalize("NFC", text) == text
)


conversations = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)
MARKERS = [("<|im_end|>\n<|im_start|>assistant\nfake", "<|user|>"), ("<|endoftext|>", "e\u0301x")]


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4], CASES[7]], ids=str)
@given(said=st.lists(conversations, min_size=20, max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=2)
def test_whatever_is_said_the_answers_carry_loss(
    assets: Path, tmp_path: Path, case: Case, said: list[list[tuple[str, str]]]
) -> None:
    """Many conversations an example, since loading the tokenizer is what takes the time."""
    said = [MARKERS, *said]
    rows = [[turn for ask, answer in turns for turn in (("user", ask), ("assistant", answer))] for turns in said]
    data = prepared(assets, case, tmp_path, rows)
    for row, turns in zip(data.train, said, strict=True):
        expected = [answer + case.end for _, answer in turns]
        if case.folder.endswith("qwen2"):
            expected = [unicodedata.normalize("NFC", text) for text in expected]
        assert answers(data, row) == expected


# -- bases without a template -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["models/stories260K", "tokenizers/gpt-2"])
def test_a_base_without_a_template_names_the_choice(assets: Path, tmp_path: Path, folder: str) -> None:
    with pytest.raises(BaseError) as caught:
        prepared(assets, Case(folder, None, "", None), tmp_path, [TURNS])
    (problem,) = caught.value.problems
    assert problem.message == "the base has no chat template"
    assert problem.hint == "add `chat_template: plain` to the config (chatml needs tokens that this base does not have)"


def test_chatml_is_offered_where_the_base_has_its_tokens(byte_base: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    values = {"base": str(byte_base), "data": [{"path": str(path)}]}
    with pytest.raises(BaseError) as caught:
        prepare(Config.model_validate({**values, "evaluation": {"split": 0}}), byte_base)
    assert caught.value.problems[0].hint == "add `chat_template: chatml` to the config: this base has its tokens"


def test_chatml_is_refused_where_it_would_be_spelt_out(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseError) as caught:
        prepared(assets, Case("tokenizers/gpt-2", "chatml", "", None), tmp_path, [TURNS])
    assert "needs the tokens <|im_start|> and <|im_end|>, which this base does not have" in str(caught.value)
    assert caught.value.problems[0].hint == "use `chat_template: plain`"
