"""Packing: nothing lost, nothing twice, nothing too long, and hardly any room left over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.pack import pack

capacities = st.integers(1, 60)
cases = capacities.flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity))))


@given(cases)
def test_every_row_is_in_exactly_one_pack(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    packs = pack(lengths, capacity)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))


@given(cases)
def test_no_pack_is_longer_than_a_sequence(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    assert all(0 < sum(lengths[index] for index in members) <= capacity for members in pack(lengths, capacity))


@given(cases)
def test_no_two_packs_would_fit_into_one(case: tuple[int, list[int]]) -> None:
    """What makes it better than half full: a pack is only opened for a row that fits nowhere else."""
    capacity, lengths = case
    filled = sorted(sum(lengths[index] for index in members) for members in pack(lengths, capacity))
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


@given(st.lists(st.integers(1, 6), max_size=8))
def test_it_is_near_the_best_there_is(lengths: list[int]) -> None:
    """At most 11/9 of the fewest packs, and a constant (D. S. Johnson, 1973): with so few rows, one pack more."""
    assert len(pack(lengths, 6)) <= fewest_packs(sorted(lengths, reverse=True), 6) + 1


@given(cases)
def test_it_is_the_same_every_time(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    assert pack(lengths, capacity) == pack(lengths, capacity)


def test_short_rows_leave_next_to_nothing_empty() -> None:
    lengths = [17 + index * 31 % 300 for index in range(2000)]
    assert sum(lengths) / (len(pack(lengths, 2048)) * 2048) > 0.99


def test_a_row_that_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit into 8"):
        pack([3, 9], 8)


def test_nothing_to_pack() -> None:
    assert pack([], 8) == []


def fewest_packs(lengths: list[int], capacity: int) -> int:
    """By trying everything."""

    def place(index: int, rooms: tuple[int, ...], bound: int) -> int:
        if len(rooms) >= bound or index == len(lengths):
            return min(len(rooms), bound)
        for number in {room: n for n, room in enumerate(rooms) if room >= lengths[index]}.values():
            left = (*rooms[:number], rooms[number] - lengths[index], *rooms[number + 1 :])
            bound = place(index + 1, left, bound)
        return place(index + 1, (*rooms, capacity - lengths[index]), bound)

    return place(0, (), len(lengths))
