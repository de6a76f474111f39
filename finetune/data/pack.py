"""Packing: which rows share a sequence. A pure function, so that it can be tested on its own."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (D. S. Johnson, 1973): indices of `lengths`, grouped into packs.

    Every index appears exactly once; no pack is longer than `capacity`. Rows are taken from the longest to the
    shortest, each into the fullest pack that still has room for it. Raises ValueError for a row that fits in no pack.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (space left, pack), sorted: the first that is large enough is the fullest
    for index in order:
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a row of {length} tokens does not fit into {capacity}")
        found = bisect_left(room, (length, 0))
        if found == len(room):
            packs.append([index])
            left, pack_number = capacity - length, len(packs) - 1
        else:
            space, pack_number = room.pop(found)
            packs[pack_number].append(index)
            left = space - length
        if left:
            insort(room, (left, pack_number))
    return packs
