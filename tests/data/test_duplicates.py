"""Duplicates: equal rows have equal keys, similar rows are found, and neither batches nor order change what is."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from time import process_time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import duplicates
from finetune.data.duplicates import (
    PERMUTATIONS,
    SHINGLE,
    Duplicates,
    count_duplicates,
    exact_keys,
    near_duplicates,
    signatures,
    similarity,
)

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]

few_tokens = st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=30)


def batch(rows: Sequence[Sequence[int]]) -> Batch:
    lengths = np.array([len(row) for row in rows], np.int64)
    return np.array([token for row in rows for token in row], np.int32), np.concatenate(([0], np.cumsum(lengths)))


def shingles(row: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(row[at : at + SHINGLE]) for at in range(max(1, len(row) - SHINGLE + 1))}


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    ours, theirs = shingles(a), shingles(b)
    return len(ours & theirs) / len(ours | theirs)


def text_like(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.zipf(1.3, length) % 50_000]


def one_word_changed(row: Sequence[int], rng: np.random.Generator) -> list[int]:
    at = int(rng.integers(len(row)))
    return [*row[:at], 50_001, *row[at + 1 :]]


def clusters(rows: Sequence[Sequence[int]], threshold: float = 0.8) -> list[int]:
    return near_duplicates(exact_keys(*batch(rows)), signatures(*batch(rows)), threshold).tolist()


# --- exact ---


@given(few_tokens)
def test_keys_are_equal_where_rows_are(rows: list[list[int]]) -> None:
    keys = exact_keys(*batch(rows)).tolist()
    assert [[a == b for b in rows] for a in rows] == [[a == b for b in keys] for a in keys]


def test_order_and_length_count() -> None:
    rows = [[], [0], [0, 0], [0, 0, 0], [1, 2], [2, 1], [1], [2], [3], [0, 3], [3, 0], [2**31 - 1], [-100]]
    assert len(set(exact_keys(*batch(rows)).tolist())) == len(rows)


def test_a_million_rows_have_a_million_keys() -> None:
    """Rows of two small tokens, which is where a bad hash has its collisions."""
    ids = np.stack(np.meshgrid(np.arange(1_000, dtype=np.int32), np.arange(1_000, dtype=np.int32)), axis=-1).ravel()
    keys = exact_keys(ids, np.arange(0, 2_000_001, 2))
    assert len(np.unique(keys)) == 1_000_000
    for shift in (0, 22, 44):  # and in any 20 bits of them as many collisions as chance has
        taken = np.count_nonzero(np.bincount((keys >> np.uint64(shift)).astype(np.int64) & 0xFFFFF))
        assert taken == pytest.approx(2**20 * (1 - np.exp(-1e6 / 2**20)), rel=0.003)


# --- signatures ---


@given(few_tokens, st.lists(st.integers(0, 30)))
def test_batches_change_nothing(rows: list[list[int]], cuts: list[int]) -> None:
    ids, offsets = batch(rows)
    whole_keys, whole = exact_keys(ids, offsets), signatures(ids, offsets)
    assert whole.shape == (len(rows), PERMUTATIONS)
    assert whole.dtype == np.uint16
    for begin, end in pairwise(sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})):
        assert np.array_equal(exact_keys(*batch(rows[begin:end])), whole_keys[begin:end])
        assert np.array_equal(signatures(*batch(rows[begin:end])), whole[begin:end])
        assert np.array_equal(signatures(ids, offsets[begin : end + 1]), whole[begin:end])
        assert np.array_equal(exact_keys(ids, offsets[begin : end + 1]), whole_keys[begin:end])


@given(st.lists(st.integers(0, 3), min_size=SHINGLE, max_size=40), st.integers(1, 5))
def test_only_shingles_count(row: list[int], times: int) -> None:
    """Not how often or where they are: a row said twice has those across the seam, said more often no others."""
    first, second = signatures(*batch([row * 2, row * (2 + times)]))
    assert np.array_equal(first, second)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 600), st.floats(0, 1))
def test_the_estimate_is_near_the_truth(seed: int, length: int, changed: float) -> None:
    """Within 4 standard errors. Of n shingles in either row about min(n, 64) bins are filled by different ones."""
    rng = np.random.default_rng(seed)
    a = text_like(rng, length)
    b = [int(rng.integers(50_000)) if rng.random() < changed / SHINGLE else token for token in a]
    true = jaccard(a, b)
    independent = 1 / (1 / PERMUTATIONS + 1 / len(shingles(a) | shingles(b)))
    first, second = signatures(*batch([a, b]))
    assert abs(float(similarity(first, second)) - true) <= 4 * (true * (1 - true) / independent) ** 0.5 + 0.02


def test_the_estimate_is_unbiased_for_long_and_short_rows() -> None:
    rng = np.random.default_rng(1)
    for length in (6, 12, 40, 200, 1_000):
        pairs = [(row, one_word_changed(row, rng)) for row in (text_like(rng, length) for _ in range(300))]
        first, second = (signatures(*batch([pair[side] for pair in pairs])) for side in (0, 1))
        true = np.array([jaccard(*pair) for pair in pairs])
        assert abs(np.mean(similarity(first, second) - true)) < 0.015


@pytest.mark.parametrize("sparse", [0, 4, 64])
def test_both_ways_to_fill_empty_bins_are_the_same(sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    rows = batch([text_like(rng, int(length)) for length in rng.integers(0, 150, 200)])
    expected = signatures(*rows)
    monkeypatch.setattr(duplicates, "SPARSE", sparse)
    assert np.array_equal(signatures(*rows), expected)


def test_similarity_of_many() -> None:
    rows = signatures(*batch([[1] * 9, [2] * 9]))
    assert similarity(rows, rows[::-1]).tolist() == [0, 0]
    assert similarity(rows[:, None], rows[None]).tolist() == [[1, 0], [0, 1]]


# --- clusters ---


def test_near_duplicates_are_found_and_unrelated_rows_are_not() -> None:
    """One word of 200 changed: a similarity of 0.95."""
    rng = np.random.default_rng(3)
    rows = [text_like(rng, 200) for _ in range(500)]
    rows += [one_word_changed(row, rng) for row in rows]
    assert clusters(rows) == [*range(500), *range(500)]


def test_how_many_are_found() -> None:
    """Nearly all that are clearly above the threshold, next to none that are clearly below it."""
    rng = np.random.default_rng(4)
    n = 2_000
    for similar, least, most in ((0.95, 0.995, 1.0), (0.9, 0.95, 1.0), (0.8, 0.35, 0.7), (0.6, 0.0, 0.01)):
        first = rng.integers(0, 65_536, (n, PERMUTATIONS), dtype=np.uint16)
        second = np.where(
            rng.random(first.shape) < similar, first, rng.integers(0, 65_536, first.shape, dtype=np.uint16)
        )
        labels = near_duplicates(np.arange(2 * n, dtype=np.uint64), np.concatenate((first, second)))
        assert least <= np.mean(labels[n:] == np.arange(n)) <= most


def test_bands_are_as_wide_as_recall_allows() -> None:
    for threshold, width in ((0.95, 8), (0.8, 4), (0.7, 2), (0.5, 2), (0.2, 1)):
        assert duplicates._band_width(threshold) == width
        assert 1 - (1 - threshold**width) ** (PERMUTATIONS // width) > duplicates.RECALL
    assert 1 - (1 - 0.8**4) ** 16 > 0.9997


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_clusters_do_not_depend_on_the_order_of_rows(seed: int) -> None:
    """A tangle on purpose: rows of one family differ more the farther they are from each other."""
    rng = np.random.default_rng(seed)
    rows: list[list[int]] = []
    for _ in range(3):
        row = text_like(rng, int(rng.integers(1, 60)))
        for _ in range(12):
            rows.append(row)
            row = one_word_changed(row, rng) if rng.random() < 0.7 else row
    order = rng.permutation(len(rows)).tolist()
    before, after = clusters(rows), clusters([rows[index] for index in order])
    groups = {frozenset(i for i, label in enumerate(before) if label == name) for name in before}
    assert groups == {frozenset(order[i] for i, label in enumerate(after) if label == name) for name in after}


@given(few_tokens)
def test_labels(rows: list[list[int]]) -> None:
    labels = clusters(rows)
    assert all(label <= row and labels[label] == label for row, label in enumerate(labels))
    assert all(labels[i] == labels[j] for i in range(len(rows)) for j in range(i) if rows[i] == rows[j])


@given(few_tokens)
def test_counting(rows: list[list[int]]) -> None:
    keys = exact_keys(*batch(rows))
    labels = near_duplicates(keys, signatures(*batch(rows)))
    found = count_duplicates(keys, labels)
    distinct = [row for number, row in enumerate(rows) if row not in rows[:number]]
    assert found.exact == len(rows) - len(distinct)
    assert found.near == len(distinct) - len(set(labels.tolist()))
    if found.first_exact:
        later, earlier = found.first_exact
        assert rows[later] == rows[earlier]
        assert earlier == rows.index(rows[later]) < later
    if found.first_near:
        later, earlier = found.first_near
        assert rows[later] not in rows[:later]
        assert labels[later] == earlier < later


def test_counted_with_their_first_pairs() -> None:
    rng = np.random.default_rng(5)
    a, b, c = (text_like(rng, 200) for _ in range(3))
    rows = [a, b, one_word_changed(b, rng), c, b, a, one_word_changed(b, rng), []]
    keys, labels = exact_keys(*batch(rows)), near_duplicates(exact_keys(*batch(rows)), signatures(*batch(rows)))
    assert labels.tolist() == [0, 1, 1, 3, 1, 0, 1, 7]
    assert count_duplicates(keys, labels) == Duplicates(exact=2, near=2, first_exact=(4, 1), first_near=(2, 1))


def test_nothing_and_next_to_nothing() -> None:
    nothing = batch([])
    assert signatures(*nothing).shape == (0, PERMUTATIONS)
    assert near_duplicates(exact_keys(*nothing), signatures(*nothing)).tolist() == []
    assert count_duplicates(np.zeros(0, np.uint64), np.zeros(0, np.int64)) == Duplicates(0, 0, None, None)
    assert clusters([[]]) == [0]
    assert clusters([[], [], [7], [8], [7], [], [7, 7]]) == [0, 0, 2, 3, 2, 0, 6]


def test_many_rows_of_few_kinds_take_little_time_and_memory(tmp_path: Path) -> None:
    """100,000 rows: equal ones, ones from a template that fill one bucket per band, and others."""
    n = 100_000
    rng = np.random.default_rng(6)
    found = np.memmap(tmp_path / "signatures", np.uint16, "w+", shape=(n, PERMUTATIONS))
    found[:] = rng.integers(0, 65_536, found.shape, dtype=np.uint16)
    found[:30_000] = found[0]
    found[30_000:60_000, :40] = found[30_000, :40]
    found[60_000:90_000, :60] = found[60_000, :60]
    keys = np.arange(n, dtype=np.uint64)
    keys[:30_000] = 0
    tracemalloc.start()
    began = process_time()
    labels = near_duplicates(keys, found)
    seconds, (_, peak) = process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count_duplicates(keys, labels) == Duplicates(29_999, 29_999, (1, 0), (60_001, 60_000))
    assert seconds < 10
    assert peak < 60e6
