"""Rows that are in the data twice, exactly or nearly, found among token ids in time and memory linear in the rows.

A row becomes one 64-bit key (equal rows, equal keys) and one MinHash signature (Broder, 1997), 128 bytes whose share of
equal entries estimates the Jaccard similarity of two rows' 5-token shingles. Both depend on the row alone, so batches
may be cut anywhere; rows that share a band of their signatures are compared, no others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PERMUTATIONS = 64
"""Entries of a signature. The estimate's standard error is sqrt(J(1-J)/64): 0.05 at a similarity of 0.8."""

SHINGLE = 5
"""Tokens in a row that are compared as one: as one changed token changes five shingles, a row of 200 tokens with one
word changed has a similarity of about 0.95, and rows that share a subject and its words have nearly none."""

RECALL = 0.99
"""The least chance that two rows as similar as the threshold share a band and so are compared at all."""

CENTRES = 4
"""How often what is left of a bucket is compared with its first row, so that a bucket costs 4 comparisons per row
however large it is. Who is missed has other bands to be found in."""

CHUNK = 65_536
"""Pairs compared at once: 16 MB of signatures."""

_EMPTY = np.uint32(0xFFFFFFFF)
_BIN_BITS = 6
_WEIGHTS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1], np.uint32)
"""One odd multiplier per place in a shingle (the primes of xxHash32), so that the order of its tokens counts."""


def exact_keys(ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """One key per row `ids[offsets[i]:offsets[i + 1]]`: (tokens,), (rows + 1,) → uint64 (rows,).

    Zobrist hashing (1970): the sum mod 2^64 of a 64-bit mix of (token, position), so order and length count. Two
    different rows among a million share a key with a probability of 1e12 / 2 / 2^64 = 3e-8.
    10M tokens in 50 batches: 0.2 s.
    """
    lengths = np.diff(offsets)
    keys = np.zeros(len(lengths), np.uint64)
    filled = lengths > 0
    if filled.any():
        starts = offsets[:-1] - offsets[0]
        tokens = ids[offsets[0] : offsets[-1]]
        positions = np.arange(len(tokens), dtype=np.int64)
        positions -= np.repeat(starts, lengths)
        placed = positions.view(np.uint64)
        placed <<= np.uint64(32)
        placed |= tokens.view(np.uint32)
        keys[filled] = np.add.reduceat(_mix64(placed), starts[filled])
    return _mix64(keys ^ lengths.astype(np.uint64))


def signatures(ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    """One MinHash signature per row: (tokens,), (rows + 1,) → uint16 (rows, PERMUTATIONS).

    One-permutation hashing (Li, Owen, Zhang, 2012): a shingle's 32-bit hash names one of 64 bins and the least hash of
    each bin is kept; 16 bits of another hash of it (b-bit MinHash; Li, König, 2010), which agree by chance once in
    65,536. Bins that no shingle fell into are filled as in `_densify`. A row of fewer tokens than a shingle is one
    itself. 10M tokens in 50 batches: 0.3 s.
    """
    rows = len(offsets) - 1
    lengths = np.diff(offsets)
    ends = offsets[1:] - offsets[0]
    least = np.full((rows + 1) * PERMUTATIONS, _EMPTY, np.uint32)  # one row more, for shingles across a row's end
    tokens = _mix32(ids[offsets[0] : offsets[-1]].view(np.uint32))
    if len(tokens) >= SHINGLE:
        count = len(tokens) - SHINGLE + 1
        hashed = tokens[:count] * _WEIGHTS[0]
        for place in range(1, SHINGLE):
            hashed += tokens[place : place + count] * _WEIGHTS[place]
        hashed = np.minimum(_mix32(hashed), _EMPTY - np.uint32(1))
        bins = np.repeat(np.arange(rows, dtype=np.int64) * PERMUTATIONS, lengths)
        for place in range(1, SHINGLE):
            bins[ends[lengths >= place] - place] = rows * PERMUTATIONS
        bins = bins[:count]
        bins += hashed >> np.uint32(32 - _BIN_BITS)
        np.minimum.at(least, bins, hashed)
    least = least[: rows * PERMUTATIONS]
    short = np.flatnonzero(lengths < SHINGLE)
    if len(short):
        hashed = np.minimum(exact_keys(ids, offsets)[short] >> np.uint64(32), _EMPTY - np.uint32(1)).astype(np.uint32)
        least[short * PERMUTATIONS + (hashed >> np.uint32(32 - _BIN_BITS))] = hashed
    filled = least.reshape(rows, PERMUTATIONS)
    _densify(filled)
    return (_mix32(filled) >> np.uint32(16)).astype(np.uint16)


def similarity(a: npt.NDArray[np.uint16], b: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """The estimated Jaccard similarity of rows by their signatures: (..., PERMUTATIONS) twice → (...)."""
    return np.asarray(np.count_nonzero(a == b, axis=-1) / PERMUTATIONS, np.float64)


def near_duplicates(
    keys: npt.NDArray[np.uint64], signatures: npt.NDArray[np.uint16], threshold: float = 0.8
) -> npt.NDArray[np.int64]:
    """For each row the smallest row index of its cluster: (rows,), (rows, PERMUTATIONS) → int64 (rows,).

    Locality-sensitive hashing (Indyk, Motwani, 1998): rows whose signatures agree in one whole band are compared by
    their estimated similarity. At 0.8 there are 16 bands of 4 entries; a pair shares one with a probability of
    1 - (1 - s^4)^16: 0.9998 at a similarity of 0.8, 0.988 at 0.7, 0.64 at 0.5, 0.12 at 0.3. The estimate then
    decides: at the threshold itself about every other pair passes, one standard error above it five of six.
    Rows with equal keys are one row here and are taken in the order of their keys, so the clusters do not depend on
    the order of the rows. A million rows take 4 s and 60 MB if all are different; 20 s and 95 MB if all share 40 of
    their 64 entries, the worst that was tried.
    """
    unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    roots = np.arange(len(unique))
    width = _band_width(threshold)
    for start in range(0, PERMUTATIONS, width):
        members = _collisions(np.ascontiguousarray(signatures[:, start : start + width])[first])
        for _ in range(CENTRES):
            if not len(members[0]):
                break
            members = _join(roots, members, first, signatures, threshold)
    smallest = np.full(len(unique), len(keys), np.int64)
    np.minimum.at(smallest, roots, first)
    return smallest[roots][inverse]


@dataclass(frozen=True)
class Duplicates:
    """How many rows are there again, and the first of each kind as (later row, earlier row)."""

    exact: int
    """Rows that repeat an earlier one token by token."""
    near: int
    """Rows that nearly repeat an earlier one; exact ones are not counted."""
    first_exact: tuple[int, int] | None
    first_near: tuple[int, int] | None


def count_duplicates(keys: npt.NDArray[np.uint64], labels: npt.NDArray[np.int64]) -> Duplicates:
    """What `near_duplicates` found, counted: uint64 (rows,), int64 (rows,)."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    earliest = first[inverse]
    rows = np.arange(len(keys))
    exact = np.flatnonzero(earliest != rows)
    near = np.flatnonzero((earliest == rows) & (labels != rows))
    return Duplicates(
        exact=len(exact),
        near=len(near),
        first_exact=(int(exact[0]), int(earliest[exact[0]])) if len(exact) else None,
        first_near=(int(near[0]), int(labels[near[0]])) if len(near) else None,
    )


def _mix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection whose every output bit depends on every input bit: the finaliser of SplitMix64 (Steele, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _mix32(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The same for 32 bits: the finaliser of MurmurHash3 (Appleby, 2011), after an addition so that 0 is not 0."""
    x = x + np.uint32(0x9E3779B9)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def _densify(least: npt.NDArray[np.uint32]) -> None:
    """Fill empty bins in place, uint32 (rows, PERMUTATIONS): optimal densification (Shrivastava, 2017).

    Each empty bin tries the bins in a random order of its own, the same in all rows, and takes what is in the first
    that is not empty: two rows agree there with the probability that they agree in a filled bin. Trying takes
    64 / filled attempts, which for rows of few shingles is much: those take, of all their filled bins, the first in
    the order (6 tokens: 3 instead of 20 µs a row).
    """
    filled = least != _EMPTY
    counts = np.count_nonzero(filled, axis=1)
    sparse = np.flatnonzero(counts <= SPARSE)
    if len(sparse):
        _, sources = np.nonzero(filled[sparse])
        counts = counts[sparse]
        begins = np.cumsum(counts) - counts
        best = _RANK[sources[begins]]
        for number in range(1, int(counts.max())):
            more = np.flatnonzero(counts > number)
            best[more] = np.minimum(best[more], _RANK[sources[begins[more] + number]])
        best &= np.uint16(PERMUTATIONS - 1)
        chosen = np.take_along_axis(least[sparse], best.astype(np.int64), axis=1)
        least[sparse] = np.where(filled[sparse], least[sparse], chosen)
    rows, bins = np.nonzero(least == _EMPTY)
    original = least.copy()
    for attempt in range(PERMUTATIONS):
        if not len(rows):
            return
        found = original[rows, _ORDER[attempt][bins]]
        least[rows, bins] = found
        rows, bins = rows[found == _EMPTY], bins[found == _EMPTY]


SPARSE = 16
"""Filled bins up to which a row is filled by looking at all of them; beyond, trying is as fast."""

_ORDER = np.stack([np.random.Generator(np.random.PCG64(seed)).permutation(PERMUTATIONS) for seed in range(64)], axis=1)
"""int64 (PERMUTATIONS, PERMUTATIONS): the bin that each bin tries in each attempt; a column visits all bins."""

_RANK = (np.argsort(_ORDER, axis=0) * PERMUTATIONS + np.arange(PERMUTATIONS)[:, None]).astype(np.uint16)
"""uint16 (PERMUTATIONS, PERMUTATIONS): for a filled bin and each other, at which attempt it is tried; and the bin."""


def _band_width(threshold: float) -> int:
    """The most entries per band with which two rows as similar as the threshold still share one: 4 at 0.8."""
    widths = [width for width in (8, 4, 2) if 1 - (1 - threshold**width) ** (PERMUTATIONS // width) > RECALL]
    return (widths or [1])[0]


Members = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]
"""Rows bucket by bucket, and whether each is the first of its bucket."""


def _collisions(band: npt.NDArray[np.uint16]) -> Members:
    """The rows that share their band with another: uint16 (rows, width) → buckets, each in ascending order."""
    width = band.shape[1]
    words = np.ascontiguousarray(band).view(np.dtype((np.void, 2 * width)) if width > 4 else f"u{2 * width}")[:, 0]
    order = np.argsort(words, kind="stable")
    words = words[order]
    first = np.concatenate(([True], words[1:] != words[:-1])) if len(words) else np.zeros(0, np.bool_)
    return _without_singles(order, first)


def _without_singles(members: npt.NDArray[np.int64], first: npt.NDArray[np.bool_]) -> Members:
    alone = first & np.append(first[1:], True)
    return members[~alone], first[~alone]


def _join(
    roots: npt.NDArray[np.int64],
    buckets: Members,
    first: npt.NDArray[np.int64],
    signatures: npt.NDArray[np.uint16],
    threshold: float,
) -> Members:
    """Join in `roots` what is similar to the first of its bucket; the rest, without those, is returned as buckets."""
    members, heads = buckets
    bucket = np.cumsum(heads) - 1
    centres = members[heads][bucket]
    done = roots[members] == roots[centres]
    open_ = np.flatnonzero(~done)
    for begin in range(0, len(open_), CHUNK):
        part = open_[begin : begin + CHUNK]
        ours, theirs = signatures[first[members[part]]], signatures[first[centres[part]]]
        done[part] = similarity(ours, theirs) >= threshold
    joined = open_[done[open_]]
    _unite(roots, members[joined], centres[joined])
    left, bucket = members[~done], bucket[~done]
    return _without_singles(left, np.diff(bucket, prepend=-1) != 0)


def _unite(roots: npt.NDArray[np.int64], a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> None:
    """Union-find for all pairs at once: hook the larger root to the smaller, then shorten every path to one step."""
    while True:
        ours, theirs = roots[a], roots[b]
        apart = ours != theirs
        if not apart.any():
            return
        a, b, ours, theirs = a[apart], b[apart], ours[apart], theirs[apart]
        np.minimum.at(roots, np.maximum(ours, theirs), np.minimum(ours, theirs))
        while not np.array_equal(shorter := roots[roots], roots):
            roots[:] = shorter
