"""Prepared rows on disk: what tells two sets of rows apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.store import Packs, Store, StoreWriter

Row = tuple[Sequence[int], Sequence[bool]]


def stored(folder: Path, rows: Sequence[Row], train: Sequence[int]) -> Store:
    folder.mkdir()
    writer = StoreWriter(folder)
    writer.add(
        np.concatenate([np.array(ids, np.int32) for ids, _ in rows]),
        np.concatenate([np.array(supervised, np.bool_) for _, supervised in rows]),
        np.array([len(ids) for ids, _ in rows], np.int64),
        [f"rows.jsonl:{number}" for number in range(len(rows))],
        {},
    )
    held_out = [number for number in range(len(rows)) if number not in train]
    writer.finish(train=np.array(train, np.int64), held_out=np.array(held_out, np.int64), packs=None, about={})
    return Store(folder)


A: Row = ([1, 2, 3], [False, True, True])
B: Row = ([4, 5], [False, True])
C: Row = ([6], [True])


def digest(folder: Path, rows: Sequence[Row], train: Sequence[int]) -> str:
    store = stored(folder, rows, train)
    return store.digest(store.train)


def test_the_same_rows_are_the_same_whatever_lies_between_them(tmp_path: Path) -> None:
    together = digest(tmp_path / "1", [A, B, C], [0, 1, 2])
    assert digest(tmp_path / "2", [A, C, B, C], [0, 2, 3]) == together
    assert digest(tmp_path / "3", [C, B, A], [2, 1, 0]) == together


def test_another_token_mask_border_or_order_is_another_digest(tmp_path: Path) -> None:
    variants: list[tuple[list[Row], list[int]]] = [
        ([A, B, C], [0, 1, 2]),
        ([A, B, C], [0, 2, 1]),
        ([A, B, C], [0, 1]),
        ([A, B, C], [0, 1, 2, 2]),
        ([([1, 2, 4], A[1]), B, C], [0, 1, 2]),
        ([(A[0], [False, False, True]), B, C], [0, 1, 2]),
        ([([1, 2], [False, True]), ([3, 4, 5], [True, False, True]), C], [0, 1, 2]),
    ]
    digests = [digest(tmp_path / str(number), rows, train) for number, (rows, train) in enumerate(variants)]
    assert len(set(digests)) == len(variants)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.lists(st.integers(1, 9), min_size=24, max_size=24))
def test_a_pack_is_as_long_as_its_rows(sizes: list[int], lengths: list[int]) -> None:
    begins = np.concatenate(([0], np.cumsum(sizes)))
    packs = Packs(np.arange(begins[-1]), begins)
    tokens = np.array(lengths[: begins[-1]])
    assert packs.lengths(tokens).tolist() == [int(tokens[pack].sum()) for pack in packs]
