"""Tokenised rows → the batches that a training step sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.prepare import IGNORED, PreparedData, TokenRow

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


def to_dataset(data: PreparedData) -> Dataset:
    """The training rows as a dataset: `input_ids`, `labels` and, where packed, `seq_lengths`, one line a sequence."""
    groups = data.packs if data.packs is not None else [[index] for index in range(len(data.train))]
    return _dataset([[data.train[index] for index in group] for group in groups])


def held_out_dataset(rows: Sequence[TokenRow]) -> Dataset:
    """Held-out rows, one a sequence."""
    return _dataset([[row] for row in rows])


def _dataset(sequences: Sequence[Sequence[TokenRow]]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    lengths = [sum(len(row.ids) for row in sequence) for sequence in sequences]
    rows = [row for sequence in sequences for row in sequence]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    ids = np.concatenate([row.ids for row in rows])
    labels = np.concatenate([row.labels() for row in rows])
    table = pa.table(
        {
            "input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids)),
            "labels": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(labels)),
            "seq_lengths": pa.array([[len(row.ids) for row in sequence] for sequence in sequences]),
        }
    )
    return Dataset(table)


class Collator:
    """Pads sequences on the right and numbers the positions of each row in them from 0.

    There is no attention mask: attention is causal, so nothing sees the padding on its right, and transformers reads
    from position ids that start again where one packed row ends and the next begins. (A test compares the loss of rows
    packed and apart.)
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """int64 tensors of shape (sequences, longest): `input_ids`, `labels`, `position_ids`."""
        import torch

        width = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), width)
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for line, example in enumerate(examples):
            begin = 0
            ids[line, : len(example["input_ids"])] = example["input_ids"]
            labels[line, : len(example["labels"])] = example["labels"]
            for length in example["seq_lengths"]:
                positions[line, begin : begin + length] = np.arange(length)
                # The first token of a packed row must not be predicted from the last of the row before it.
                labels[line, begin] = IGNORED
                begin += length
            positions[line, begin:] = np.arange(width - begin)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }
