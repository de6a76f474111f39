"""The quickstart's base and dataset keep what their README promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
BASE = SAMPLES / "quickstart-base"
TRAINING = SAMPLES / "contract-clauses.jsonl"
HELDOUT = SAMPLES / "contract-clauses-heldout.jsonl"


sys.path.insert(0, str(SAMPLES))
from pretraining_text import THINGS  # noqa: E402 - the samples' scripts are no package


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clauses(path: Path) -> list[tuple[str, str]]:
    """Each row's clause, without the question in front of it, and its type."""
    pairs = []
    for row in rows(path):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        pairs.append((user["content"].split("\n\n", 1)[1], assistant["content"]))
    return pairs


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(BASE)


def test_the_base_is_small_enough_to_live_in_the_repository() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 4_000_000


@pytest.mark.parametrize(
    "text",
    [
        "Plain words.",
        "  two  spaces\n\n\ttab",
        "Zürich – 東京 🛶 naïve",
        "x = [1, 22]\r\n",
        "\x00\x07 control",
        "don't",
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_knows_every_byte_and_fills_the_vocabulary(tokenizer: Any) -> None:
    config = json.loads((BASE / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    every_character_up_to_two_bytes = "".join(map(chr, range(0x20, 0x300)))
    assert tokenizer.decode(tokenizer(every_character_up_to_two_bytes)["input_ids"]) == every_character_up_to_two_bytes


def test_a_conversation_renders_as_chatml_and_nothing_is_added(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    system, user = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>user\nHello!<|im_end|>\n"
    assert text == f"{system}{user}<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_special_tokens_agree_in_every_file(tokenizer: Any) -> None:
    config = json.loads((BASE / "config.json").read_text())
    generation = json.loads((BASE / "generation_config.json").read_text())
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert (tokenizer.eos_token_id, config["eos_token_id"], generation["eos_token_id"]) == (end, end, end)
    assert (tokenizer.pad_token_id, config["pad_token_id"], generation["pad_token_id"]) == (pad, pad, pad)
    assert tokenizer.bos_token_id is None


def test_every_matrix_fits_the_blocks_of_nf4_and_of_gguf() -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(BASE / "model.safetensors", framework="np") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 (no mapping)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert matrices
    assert {name: shape for name, shape in matrices.items() if shape[1] % 256} == {}


def test_the_base_answers_what_it_was_pretrained_for_and_no_clause_type(tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)

    def answer(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=12)
        return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    # A million parameters remember the form of an answer better than facts: of 48 things, the base gave 45 a kind and
    # 18 the right one (chance: 7) when it was made.
    kinds = {thing: kind for kind, things in THINGS.items() for thing in things}
    told = {thing: answer(f"What is a{'n' if thing[0] in 'aeo' else ''} {thing}?").lower() for thing in kinds}
    assert sum(said.rstrip(".") in THINGS for said in told.values()) >= 40
    assert sum(said.rstrip(".") == kinds[thing] for thing, said in told.items()) >= 12
    names = {name for _, name in clauses(HELDOUT)}
    for row in rows(HELDOUT)[:12]:
        assert answer(row["messages"][0]["content"]) not in names


def test_the_datasets_have_the_promised_size_and_balance() -> None:
    training, heldout = clauses(TRAINING), clauses(HELDOUT)
    assert len(training) == 672
    assert len(heldout) == 140
    assert set(Counter(name for _, name in training).values()) == {48}
    assert set(Counter(name for _, name in heldout).values()) == {10}
    assert {name for _, name in training} == {name for _, name in heldout}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z'-]+", text.lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}


def test_no_clause_is_repeated_within_or_across_the_splits() -> None:
    texts = [text for text, _ in clauses(TRAINING) + clauses(HELDOUT)]
    assert len(set(texts)) == len(texts)


def test_a_heldout_clause_shares_no_run_of_seven_words_with_any_training_clause() -> None:
    seen = set().union(*(runs(text, 7) for text, _ in clauses(TRAINING)))
    assert [text for text, _ in clauses(HELDOUT) if runs(text, 7) & seen] == []


def test_no_clause_contains_the_name_of_its_type() -> None:
    assert [text for text, name in clauses(TRAINING) + clauses(HELDOUT) if name.lower() in text.lower()] == []


def test_the_default_seed_makes_the_same_files_again(tmp_path: Path) -> None:
    command = [sys.executable, SAMPLES / "make_quickstart.py", "--only", "datasets", "--output", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)
    for committed in (TRAINING, HELDOUT):
        assert (tmp_path / committed.name).read_bytes() == committed.read_bytes()
