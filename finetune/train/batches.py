"""Tokenised rows → the batches that a training step sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.prepare import PreparedData
from finetune.data.store import IGNORED, Indices, Rows, TokenRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset


def to_dataset(data: PreparedData) -> Dataset:
    """The training sequences as a dataset: the numbers of the rows in each, which the collator fetches."""
    if data.packs is None:
        return held_out_dataset(data.train)
    return as_dataset([data.store.train[pack].tolist() for pack in data.packs])


def held_out_dataset(rows: Rows) -> Dataset:
    """Rows, one a sequence."""
    return as_dataset([[index] for index in rows.indices.tolist()])


def longest(lengths: Indices, count: int) -> list[int]:
    """Numbers of the longest sequences, the longest first. `lengths` has the tokens of each."""
    return [int(number) for number in np.argsort(-lengths, kind="stable")[:count]]


def sequence_lengths(data: PreparedData) -> Indices:
    """Tokens of each training sequence, without padding."""
    lengths = data.train.lengths
    return lengths if data.packs is None else data.packs.lengths(lengths)


def as_dataset(sequences: Sequence[Sequence[int]]) -> Dataset:
    """Sequences as a dataset with the one column `rows`."""
    import pyarrow as pa
    from datasets import Dataset

    return Dataset(pa.table({"rows": pa.array(sequences, pa.list_(pa.int64()))}))


class Collator:
    """Fetches the rows of sequences, pads the sequences on the right and numbers the positions of each row from 0.

    There is no attention mask: attention is causal, so nothing sees the padding on its right, and transformers reads
    from position ids that start again where one packed row ends and the next begins. (A test compares the loss of rows
    packed and apart.)
    """

    def __init__(self, row: Callable[[int], TokenRow], pad_id: int) -> None:
        """`row` gives a row by its number (`Store.row`)."""
        self._row, self._pad_id = row, pad_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """int64 tensors of shape (sequences, longest): `input_ids`, `labels`, `position_ids`; and `rows`, the numbers
        of the rows in each sequence, by which a step that goes wrong can say what was in it."""
        import torch

        sequences = [[self._row(number) for number in example["rows"]] for example in examples]
        width = max(sum(len(row.ids) for row in sequence) for sequence in sequences)
        shape = (len(examples), width)
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for line, sequence in enumerate(sequences):
            begin = 0
            for row in sequence:
                end = begin + len(row.ids)
                ids[line, begin:end] = row.ids
                labels[line, begin:end] = row.labels()
                positions[line, begin:end] = np.arange(len(row.ids))
                # The first token of a packed row must not be predicted from the last of the row before it.
                labels[line, begin] = IGNORED
                begin = end
            positions[line, begin:] = np.arange(width - begin)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "rows": [list(example["rows"]) for example in examples],
        }
