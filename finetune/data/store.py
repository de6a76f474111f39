"""Prepared rows on disk: written once, in the order they are read, and mapped into memory from then on.

So a million rows cost no more memory than a thousand. A folder holds `ids.bin` (int32) and `supervised.bin` (a byte a
token) over all rows one after the other, `places.txt` (a line a row), `rows.npz` (where each row begins, which are
trained on, how they are packed) and `data.json` (everything else). Nothing in it is executable: arrays are read without
pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from finetune.data.conversation import Conversation
from finetune.data.encode import load
from finetune.runs.files import sync_folder, write_json

IGNORED = -100
"""The label of a token without loss, as in torch's cross entropy."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenRow:
    """One tokenised row."""

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    """True where the token carries loss."""
    place: str
    conversation: Conversation | None = None
    """Kept for the held-out rows that are evaluated; None for the others, and for plain texts."""

    def labels(self) -> npt.NDArray[np.int32]:
        """The ids where they carry loss, -100 elsewhere."""
        return np.where(self.supervised, self.ids, np.int32(IGNORED))


class StoreWriter:
    """Writes rows as they come. The folder is somebody else's to rename once it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = contextlib.ExitStack()
        self._ids = self._open("ids.bin")
        self._supervised = self._open("supervised.bin")
        self._places = self._open("places.txt")
        self._signatures = self._open("signatures.bin")
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._place_lengths: list[npt.NDArray[np.int64]] = []
        self._sums: list[npt.NDArray[np.int64]] = []
        self._signature_width = 0
        self.conversations: dict[int, str] = {}
        self.rows = 0
        self.longest = (0, "")
        """Tokens of the longest row, and its place."""
        self.highest = (-1, "")
        """The highest token id, and the place of a row that has it."""

    def add(
        self,
        ids: npt.NDArray[np.int32],
        supervised: npt.NDArray[np.bool_],
        lengths: npt.NDArray[np.int64],
        places: Sequence[str],
        conversations: dict[int, str],
    ) -> None:
        if not len(lengths):
            return
        self._ids.write(ids.astype("<i4", copy=False).data)
        self._supervised.write(supervised.view(np.uint8).data)
        lines = [(place.replace("\n", " ") + "\n").encode() for place in places]
        self._places.write(b"".join(lines))
        self._lengths.append(lengths)
        self._place_lengths.append(np.array([len(line) for line in lines], dtype=np.int64))
        begins = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        self._sums.append(np.add.reduceat(supervised.view(np.uint8), begins, dtype=np.int64))
        longest = int(lengths.argmax())
        if lengths[longest] > self.longest[0]:
            self.longest = int(lengths[longest]), places[longest]
        highest = int(ids.argmax())
        if ids[highest] > self.highest[0]:
            self.highest = int(ids[highest]), places[int(np.searchsorted(begins, highest, "right")) - 1]
        self.conversations.update({self.rows + index: text for index, text in conversations.items()})
        self.rows += len(lengths)

    def add_signatures(self, signatures: npt.NDArray[np.uint16]) -> None:
        """Set aside what rows are compared by, (rows, n): of a million rows it would fill 128 MB of memory."""
        self._signatures.write(signatures.data)
        self._signature_width = signatures.shape[1]

    def signatures(self) -> npt.NDArray[np.uint16]:
        """All that were set aside. They are not kept."""
        self._signatures.flush()
        path = Path(self._signatures.name)
        found = _mapped(path, np.dtype(np.uint16)).reshape(-1, self._signature_width)
        path.unlink()
        return found

    def _open(self, name: str) -> BinaryIO:
        return self._files.enter_context(open(self.folder / name, "wb"))

    def place(self, row: int) -> str:
        """Where a row that was added came from."""
        self._places.flush()
        begins = _begins(self._place_lengths)
        with open(self._places.name, "rb") as file:
            file.seek(int(begins[row]))
            return file.read(int(begins[row + 1] - begins[row]) - 1).decode()

    def lengths(self) -> Indices:
        return np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64)

    def close(self) -> None:
        self._files.close()

    def finish(
        self,
        *,
        train: Indices,
        held_out: Indices,
        packs: Sequence[Sequence[int]] | None,
        about: dict[str, Any],
    ) -> None:
        """Write the rest: which rows are what, and everything that is not about a single row."""
        for file in (self._ids, self._supervised, self._places):
            file.flush()
            os.fsync(file.fileno())
        self.close()
        arrays: dict[str, npt.NDArray[Any]] = {
            "begins": _begins(self._lengths),
            "place_begins": _begins(self._place_lengths),
            "supervised": np.concatenate(self._sums) if self._sums else np.zeros(0, np.int64),
            "train": train,
            "held_out": held_out,
        }
        if packs is not None:
            arrays["packed"] = np.fromiter((row for pack in packs for row in pack), np.int64, len(train))
            arrays["pack_begins"] = _begins([np.array([len(pack) for pack in packs], dtype=np.int64)])
        with open(self.folder / "rows.npz", "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type,unused-ignore]
            file.flush()
            os.fsync(file.fileno())
        wanted = {str(row): self.conversations[row] for row in held_out.tolist() if row in self.conversations}
        write_json(self.folder / "data.json", {**about, "conversations": wanted})
        sync_folder(self.folder)


class DamagedStore(Exception):
    """A folder that does not hold what it should; whoever asked for it makes it anew."""


class Store:
    """A folder of prepared rows, opened. Rows are numbered as they were read, over all sources."""

    def __init__(self, folder: Path) -> None:
        """Raises DamagedStore where it is not what was written."""
        self.folder = folder
        try:
            self._read(folder)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DamagedStore(str(folder)) from error

    def _read(self, folder: Path) -> None:
        self.about: dict[str, Any] = json.loads((folder / "data.json").read_text("utf-8"))
        with open(folder / "rows.npz", "rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = dict(arrays)
        self.begins: Indices = found["begins"]
        self._place_begins: Indices = found["place_begins"]
        self.supervised_counts: Indices = found["supervised"]
        self.train: Indices = found["train"]
        self.held_out: Indices = found["held_out"]
        self.packs = Packs(found["packed"], found["pack_begins"]) if "packed" in found else None
        self._ids: npt.NDArray[np.int32] = _mapped(folder / "ids.bin", np.dtype("<i4"))
        self._supervised: npt.NDArray[np.bool_] = _mapped(folder / "supervised.bin", np.dtype(np.bool_))
        self._places = _mapped(folder / "places.txt", np.dtype(np.uint8))
        whole = len(self._ids) == len(self._supervised) == self.begins[-1]
        if not whole or len(self._places) != self._place_begins[-1]:
            raise ValueError("files of different lengths")
        self._conversations: dict[str, str] = self.about["conversations"]

    @cached_property
    def lengths(self) -> Indices:
        """Tokens of each row."""
        return np.diff(self.begins)

    def row(self, index: int) -> TokenRow:
        begin, end = self.begins[index], self.begins[index + 1]
        text = self._conversations.get(str(index))
        return TokenRow(
            self._ids[begin:end],
            self._supervised[begin:end],
            self.place(index),
            load(text) if text is not None else None,
        )

    def digest(self, rows: Indices) -> str:
        """SHA-256 over some rows, in this order: their tokens, which of them carry loss, and where each row ends.

        Neighbours are taken together: a million rows, of which a twentieth is left out here and there, take a second.
        """
        ids, supervised, lengths = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        for stretch in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            if len(stretch):
                tokens = slice(self.begins[stretch[0]], self.begins[stretch[-1] + 1])
                ids.update(self._ids[tokens].data)
                supervised.update(self._supervised[tokens].data)
                lengths.update(self.lengths[stretch].tobytes())
        return hashlib.sha256(ids.digest() + supervised.digest() + lengths.digest()).hexdigest()

    def place(self, index: int) -> str:
        begin, end = self._place_begins[index], self._place_begins[index + 1] - 1
        return self._places[begin:end].tobytes().decode()


class Rows(Sequence[TokenRow]):
    """Some rows of a store, read when they are asked for."""

    def __init__(self, store: Store, indices: Indices) -> None:
        self._store, self.indices = store, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> TokenRow | Rows:
        if isinstance(index, slice):
            return Rows(self._store, self.indices[index])
        return self._store.row(int(self.indices[index]))

    def __iter__(self) -> Iterator[TokenRow]:
        for index in self.indices.tolist():
            yield self._store.row(index)

    @property
    def lengths(self) -> Indices:
        """Tokens of each row."""
        return self._store.lengths[self.indices]

    @property
    def supervised_tokens(self) -> int:
        return int(self._store.supervised_counts[self.indices].sum())


class Packs(Sequence[npt.NDArray[np.int64]]):
    """Which rows (numbers into the training rows) share a sequence."""

    def __init__(self, packed: Indices, begins: Indices) -> None:
        self._packed, self._begins = packed, begins

    def __len__(self) -> int:
        return len(self._begins) - 1

    @overload
    def __getitem__(self, index: int) -> Indices: ...
    @overload
    def __getitem__(self, index: slice) -> list[Indices]: ...
    def __getitem__(self, index: int | slice) -> Indices | list[Indices]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._packed[self._begins[index] : self._begins[index + 1]]

    def digest(self) -> str:
        """SHA-256 over which rows share a sequence."""
        return hashlib.sha256(self._packed.tobytes() + self._begins.tobytes()).hexdigest()

    def lengths(self, rows: Indices) -> Indices:
        """Tokens of each pack, from the tokens of each training row."""
        return np.add.reduceat(rows[self._packed], self._begins[:-1])


def _begins(lengths: Sequence[npt.NDArray[np.int64]]) -> Indices:
    return np.concatenate(([0], np.cumsum(np.concatenate(lengths)) if lengths else [])).astype(np.int64)


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A file as an array that is read from disk as it is used."""
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            return np.zeros(0, dtype)
        # Private pages of a read-only mapping: torch and pyarrow may look, nobody may write.
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(view, dtype)
