"""Tokenised rows → the batches that a training step sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.prepare import PreparedData
from finetune.data.store import IGNORED, Indices, Rows, TokenRow
from finetune.model.kernels.layout import Layout, rows_mask

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
    """Fetches the rows of sequences and lays them out, each numbered from 0, in one of these ways.

    Padded: a line for each sequence, filled up on the right. There is no attention mask: attention is causal, so
    nothing sees the padding on its right, and transformers reads from position ids that start again where one packed
    row ends and the next begins. (A test compares the loss of rows packed and apart.) Masked is the same with a mask of
    tokens × tokens, for models that do not read them.

    End to end: one line of all rows of all sequences, and where each begins, for models whose attention keeps them
    apart by that (`model/kernels/attention.py`). Nothing is padded, not to a multiple of 8 either: tokens are the rows
    of every matrix in a step, whose widths the matrix units' alignment depends on.
    """

    def __init__(self, row: Callable[[int], TokenRow], pad_id: int, layout: Layout = "padded") -> None:
        """`row` gives a row by its number (`Store.row`)."""
        self._row, self._pad_id, self._layout = row, pad_id, layout

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """int64 tensors of shape (sequences, longest), or (1, tokens): `input_ids`, `labels`, `position_ids`; and
        `rows`, the numbers of the rows in each sequence, by which a step that goes wrong can say what was in it.

        End to end also `cu_seq_lens_q` and `_k`, int32 (rows + 1,): where each row begins, and the number of tokens;
        and `max_length_q` and `_k`, the tokens of the longest row. transformers' names, from its flash attention.
        """
        sequences = [[self._row(number) for number in example["rows"]] for example in examples]
        batch = self._line(sequences) if self._layout == "line" else self._padded(sequences)
        return batch | {"rows": [list(example["rows"]) for example in examples]}

    def _padded(self, sequences: Sequence[Sequence[TokenRow]]) -> dict[str, Any]:
        import torch

        width = max(sum(len(row.ids) for row in sequence) for sequence in sequences)
        shape = (len(sequences), width)
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for line, sequence in enumerate(sequences):
            end = _fill(ids[line], labels[line], positions[line], sequence)
            positions[line, end:] = np.arange(width - end)
        batch = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }
        if self._layout == "masked":
            # Each row begins at position 0, and so does the padding.
            batch["attention_mask"] = rows_mask((batch["position_ids"] == 0).cumsum(1))
        return batch

    def _line(self, sequences: Sequence[Sequence[TokenRow]]) -> dict[str, Any]:
        import torch

        rows = [row for sequence in sequences for row in sequence]
        lengths = np.array([len(row.ids) for row in rows])
        ids, labels, positions = (np.empty((1, int(lengths.sum())), dtype=np.int64) for _ in range(3))
        _fill(ids[0], labels[0], positions[0], rows)
        begins = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
        longest = int(lengths.max())
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
            "cu_seq_lens_q": begins,
            "cu_seq_lens_k": begins,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _fill(ids: Indices, labels: Indices, positions: Indices, rows: Sequence[TokenRow]) -> int:
    """Write rows one after the other into a line's arrays; where they end."""
    begin = 0
    for row in rows:
        end = begin + len(row.ids)
        ids[begin:end] = row.ids
        labels[begin:end] = row.labels()
        positions[begin:end] = np.arange(len(row.ids))
        # The first token of a row must not be predicted from the last of the row before it.
        labels[begin] = IGNORED
        begin = end
    return begin
