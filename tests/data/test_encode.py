"""Chunks → tokens with their mask: what carries loss, what becomes of overlong rows, and that a chunk can travel."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.encode import Encoded, _Smallest, dump, load, split_order, supervised_mask, token_at
from finetune.data.formats import convert
from finetune.data.read import Row

from .conftest import Prepare, cached_tokenizer

TOKENIZERS = ["tokenizers/qwen2", "tokenizers/llama-bpe", "tokenizers/gpt-2", "tokenizers/phi-3", "models/stories260K"]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "a \n日é\u0301🙂<|im_end|>▁", max_size=30
)


@pytest.mark.parametrize("folder", TOKENIZERS)
@given(text=texts, data=st.data())
def test_a_token_carries_loss_where_it_begins_inside_a_span(
    assets: Path, folder: str, text: str, data: st.DataObject
) -> None:
    """Asked at the ends of the spans alone, the mask is what all offsets together say."""
    encoding = cached_tokenizer(assets / folder).backend.encode(text, add_special_tokens=False)
    begins = [begin for begin, _ in encoding.offsets]
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, len(text)))
    # A tokenizer that normalises may place two tokens at one character; then they stand or fall together.
    expected = [begin <= at < end for at in begins]
    assert supervised_mask(encoding, [(begin, end)], len(text)).tolist() == expected
    assert token_at(encoding, len(text), len(text)) == len(begins)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=200), st.integers(0, 20))
def test_the_smallest_are_among_those_taken(numbers: list[int], count: int) -> None:
    keep = _Smallest(count)
    taken = [number for number in numbers if keep.takes(number)]
    assert sorted(taken)[:count] == sorted(numbers)[:count]


def test_each_seed_has_an_order_of_its_own() -> None:
    keys = np.arange(1000, dtype=np.uint64)
    first, second = split_order(keys, 1), split_order(keys, 2)
    assert len(set(first.tolist())) == 1000, "a bijection: no two rows tie"
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


@pytest.mark.parametrize(
    "values",
    [
        {"text": "abc"},
        {"prompt": "a", "completion": "b"},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "content": "", "name": "f"},
                {"role": "assistant", "content": "c", "weight": 0, "reasoning_content": "hm"},
            ],
        },
    ],
)
def test_conversations_are_kept_whole(values: dict[str, Any]) -> None:
    format_ = "text" if "text" in values else "prompt-completion" if "prompt" in values else "messages"
    conversation = convert(Row(values, "a:1"), format_)
    assert load(dump(conversation)) == conversation


def test_what_a_process_hands_back_can_travel() -> None:
    assert pickle.loads(pickle.dumps(Encoded(3))).source == 3


# -- overlong rows ------------------------------------------------------------------------------------------------


def spoken(prepared: Prepare, *args: Any, **settings: Any) -> list[tuple[str, str]]:
    """Each training row as text, and what of it carries loss."""
    data = prepared(*args, **settings)
    decode = data.tokenizer.decode
    return [
        (decode(row.ids.tolist(), skip_special=False), decode(row.ids[row.supervised].tolist(), skip_special=False))
        for row in data.train
    ]


def chat(*said: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    for index, text in enumerate(said):
        messages.append({"role": ("user", "assistant")[index % 2], "content": text})
    return {"messages": messages}


def test_a_long_text_is_split_into_windows(prepared: Prepare) -> None:
    found = spoken(prepared, [{"text": "abcdefghijklmnopqrst"}], {"on_overlong": "split"}, train={"sequence_length": 8})
    assert [text for text, _ in found] == ["abcdefgh", "ijklmnop", "qrst</s>"]


def test_a_long_conversation_is_split_between_exchanges(prepared: Prepare) -> None:
    rows = [chat("a1", "b1", "a2", "b2", "a3", "b3", system="S")]
    data = prepared(rows, {"on_overlong": "split"}, train={"sequence_length": 70, "packing": False})
    found = [data.tokenizer.decode(row.ids[row.supervised].tolist(), skip_special=False) for row in data.train]
    assert found == ["b1<|im_end|>b2<|im_end|>", "b3<|im_end|>"]
    whole = [data.tokenizer.decode(row.ids.tolist(), skip_special=False) for row in data.train]
    assert all(text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na") for text in whole)
    assert (data.accounting.read, data.accounting.used, data.accounting.split) == (1, 1, 1)
    assert data.accounting.lost_supervised_tokens == 0


def test_an_exchange_that_fits_nowhere_is_lost_and_counted(prepared: Prepare) -> None:
    rows = [chat("a1", "b1", "a2", "b" * 200, "a3", "b3"), chat("a", "c" * 300), chat("x", "y")]
    data = prepared(rows, {"on_overlong": "split"}, train={"sequence_length": 60})
    assert data.accounting.lost_supervised_tokens == 201
    assert data.accounting.dropped == {"one exchange alone is longer than train.sequence_length": 1}
    assert data.accounting.first_dropped == {"one exchange alone is longer than train.sequence_length": "rows.jsonl:2"}
    assert [row.place for row in data.train] == ["rows.jsonl:1", "rows.jsonl:1", "rows.jsonl:3"]


def test_only_the_last_answer_of_a_split_conversation_carries_loss_if_only_that_was_to(prepared: Prepare) -> None:
    rows = [chat("a1", "b1", "a2", "b2", "a3", "b3", system="S")]
    found = spoken(prepared, rows, {"on_overlong": "split"}, train={"sequence_length": 70, "loss_on": "last-assistant"})
    assert [loss for _, loss in found] == ["b3<|im_end|>"], "a piece without loss never trains"
