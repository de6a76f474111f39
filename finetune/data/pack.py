"""Packing: which rows share a sequence. A pure function, so that it can be tested on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt


def pack(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Bin packing: indices of `lengths`, grouped into packs, each index once and no pack longer than `capacity`.

    A pack is filled with rows drawn at random until two or three more will fill it, and closed with the two rows that
    fill it to the last token, or nearly. Drawing at random keeps the lengths mixed, so that such a pair is there to the
    end; rows too long to be three in a pack go first, while there is most to put beside them. (Best-fit decreasing uses
    the long rows up and is left with short ones alike: of nine rows of 205 tokens and a gap of 203 it makes a pack. On
    5,000 conversations of 174 to 767 tokens it makes 768 packs, this 752, and 750 would be full to the last token.)
    Rows of one length are interchangeable, so all of it works on counts of lengths, in time linear in the rows. The
    draw is the same every time. Raises ValueError for a row that fits in no pack.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    if int(sizes.max()) > capacity:
        raise ValueError(f"a row of {int(sizes.max())} tokens does not fit into {capacity}")
    left = _Lengths(sizes, capacity)
    packs = []
    while longest := left.longest(capacity):
        taken = [left.take(longest)] if 3 * longest > capacity else []
        room = capacity - sum(taken)
        while room >= 3 * left.longest(capacity) and (drawn := left.draw()):
            taken.append(drawn)
            room -= drawn
        while one := left.longest(room):
            closing = left.pair(room)
            # Two that fill it, or at least more than the one that would leave no place for another.
            if sum(closing) < room and not (sum(closing) > one and one + left.shortest > room):
                closing = [one]
            taken += map(left.take, closing)
            room -= sum(closing)
        packs.append([left.index(length) for length in taken])
    return packs


class _Lengths:
    """How many rows of each length are left, and which."""

    def __init__(self, sizes: npt.NDArray[np.int64], capacity: int) -> None:
        counts = np.bincount(sizes, minlength=capacity + 1)
        self._counts: list[int] = counts.tolist()
        self._rows: list[int] = np.argsort(sizes, kind="stable").tolist()
        self._next: list[int] = (np.cumsum(counts) - counts).tolist()
        self._drawn: Iterator[int] = iter(np.random.default_rng(0).permutation(sizes).tolist())
        self._owed = [0] * (capacity + 1)
        """Rows of each length that were taken otherwise than by drawing: their turn in the draw is void."""
        self._capacity = capacity
        self._update()

    def _update(self) -> None:
        """`_below[n]`: the longest length left that is at most n, or 0. Made anew when a length runs out."""
        present = np.array(self._counts) > 0
        present[0] = False
        numbers = np.arange(self._capacity + 1)
        self._below = np.maximum.accumulate(np.where(present, numbers, 0))
        self._present = numbers[present]
        self.shortest = int(self._present[0]) if len(self._present) else self._capacity + 1

    def longest(self, room: int) -> int:
        """The longest length left that is at most `room`; 0 if there is none."""
        return int(self._below[room])

    def take(self, length: int) -> int:
        self._owed[length] += 1
        self._remove(length)
        return length

    def draw(self) -> int:
        """The next length in a random order of all rows; 0 when all are given away."""
        for length in self._drawn:
            if not self._owed[length]:
                self._remove(length)
                return length
            self._owed[length] -= 1
        return 0

    def _remove(self, length: int) -> None:
        self._counts[length] -= 1
        if not self._counts[length]:
            self._update()

    def pair(self, room: int) -> list[int]:
        """The two lengths left with the greatest sum that is at most `room`; [] if no two fit."""
        firsts = self._present[: np.searchsorted(self._present, room // 2, "right")]
        if not len(firsts):
            return []
        # The shorter of the two is at most half; a length that is left only once cannot be both.
        seconds = self._below[room - firsts]
        sums = firsts + seconds
        for best in np.argsort(-sums, kind="stable")[:2].tolist():
            first, second = int(firsts[best]), int(seconds[best])
            if first != second or self._counts[first] > 1:
                return [first, second]
        return []

    def index(self, length: int) -> int:
        """A row of this length that was not given away yet."""
        at = self._next[length]
        self._next[length] = at + 1
        return self._rows[at]
