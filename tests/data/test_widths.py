"""Byte widths against the offsets that tokenizers give: the same mask, or the text is not vouched for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.encode import supervised_mask
from finetune.data.widths import Places, byte_widths

from .conftest import cached_tokenizer

BYTE_LEVEL = ["tokenizers/qwen2", "tokenizers/llama-bpe", "tokenizers/gpt-2"]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "a \n日é\u0301🙂<|im_end|>Å\u212b", max_size=30
)


@pytest.mark.parametrize("folder", BYTE_LEVEL)
@given(said=st.lists(texts, min_size=1, max_size=5), data=st.data())
def test_the_mask_is_what_the_offsets_say(assets: Path, folder: str, said: list[str], data: st.DataObject) -> None:
    tokenizer = cached_tokenizer(assets / folder)
    widths = byte_widths(tokenizer)
    assert widths is not None
    spans = []
    for text in said:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=4, max_size=4)))
        spans.append([(cuts[0], cuts[1]), (cuts[2], cuts[3])])
    encodings = tokenizer.backend.encode_batch(said, add_special_tokens=False)
    ids = np.array([token for encoding in encodings for token in encoding.ids], np.int32)
    counts = np.array([len(encoding) for encoding in encodings], np.int64)
    places = Places(ids, counts, said, widths)
    found, sound = places.mask(spans), places.sound
    begin = 0
    assert sound.any() or not all(text.isascii() for text in said)
    for text, own, encoding, sure in zip(said, spans, encodings, sound.tolist(), strict=True):
        if sure:
            mine = found[begin : begin + len(encoding)]
            # By its bytes, a character of several tokens has one beginning; offsets say the same of all of them.
            assert mine.tolist() == supervised_mask(encoding, own, len(text)).tolist() or not text.isascii()
            expected = _by_bytes(text, own, widths.of(np.array(encoding.ids, np.int32)).tolist())
            assert mine.tolist() == expected
        begin += len(encoding)


def _by_bytes(text: str, spans: list[tuple[int, int]], lengths: list[int]) -> list[bool]:
    begins = [sum(lengths[:number]) for number in range(len(lengths))]
    edges = [(len(text[:begin].encode()), len(text[:end].encode())) for begin, end in spans]
    return [any(begin <= at < end for begin, end in edges) for at in begins]


@pytest.mark.parametrize("folder", BYTE_LEVEL)
def test_text_that_is_normalised_on_the_way_is_not_vouched_for(assets: Path, folder: str) -> None:
    tokenizer = cached_tokenizer(assets / folder)
    widths = byte_widths(tokenizer)
    assert widths is not None
    said = ["e\u0301", "plain", "日本 🙂"]
    encodings = tokenizer.backend.encode_batch(said, add_special_tokens=False)
    ids = np.array([token for encoding in encodings for token in encoding.ids], np.int32)
    counts = np.array([len(encoding) for encoding in encodings], np.int64)
    assert Places(ids, counts, said, widths).sound.tolist() == [tokenizer.backend.normalizer is None, True, True]


@pytest.mark.parametrize("folder", ["tokenizers/phi-3", "models/stories260K"])
def test_other_tokenizers_are_asked_for_their_offsets(assets: Path, folder: str) -> None:
    assert byte_widths(cached_tokenizer(assets / folder)) is None
