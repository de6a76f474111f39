"""Where tokens begin in a text, from how many bytes each is, without asking the tokenizer.

The tokens of a byte-level BPE (GPT-2's, Llama 3's, Qwen's) are the text's bytes, in order and without gaps, so where
each begins follows from a table of lengths. Keeping track of offsets takes the tokenizer a sixth of its time, and to
hand them over takes longer than everything else here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetune.data.tokenizer import Tokenizer


class ByteWidths:
    """How many bytes of text each token of a byte-level tokenizer stands for; looked up as tokens occur."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        added = self._backend.get_added_tokens_decoder()
        size = max([self._backend.get_vocab_size(with_added_tokens=True), *(number + 1 for number in added)])
        self._table = np.zeros(size, np.int64)
        for number, token in added.items():
            self._table[number] = len(token.content.encode())
        self._normalises = self._backend.normalizer is not None

    def of(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """(tokens,) → (tokens,)"""
        found = self._table[ids]
        missing = found == 0
        if missing.any():
            for number in np.unique(ids[missing]).tolist():
                # In the vocabulary each byte is written as one character.
                self._table[number] = len(self._backend.id_to_token(number) or "")
            found = self._table[ids]
        return found

    def holds(self, text: str) -> bool:
        """Whether the tokens of this text are its bytes: it is not normalised on the way."""
        return not self._normalises or text.isascii() or unicodedata.is_normalized("NFC", text)


def byte_widths(tokenizer: Tokenizer) -> ByteWidths | None:
    """The widths, or None for a tokenizer whose tokens are not simply a text's bytes."""
    from tokenizers import decoders, normalizers

    backend = tokenizer.backend
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    if backend.normalizer is not None and not isinstance(backend.normalizer, normalizers.NFC):
        return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None  # these swallow white space around them
    return ByteWidths(tokenizer)


class Places:
    """Where each token begins, for texts whose tokens stand one after the other in one array."""

    def __init__(
        self,
        ids: npt.NDArray[np.int32],
        counts: npt.NDArray[np.int64],
        texts: Sequence[str],
        widths: ByteWidths,
    ) -> None:
        """`ids` (tokens,) holds the tokens of all texts, `counts` (texts,) how many are whose."""
        self._begins = np.concatenate(([0], np.cumsum(widths.of(ids))))
        self._firsts = np.concatenate(([0], np.cumsum(counts)))
        self._texts = texts
        self._ascii = [text.isascii() for text in texts]
        sizes = [len(t) if plain else len(t.encode()) for t, plain in zip(texts, self._ascii, strict=True)]
        self.sound = np.diff(self._begins[self._firsts]) == np.array(sizes, np.int64)
        """(texts,) bool: False where the bytes of the tokens do not add up to the text."""
        for number, plain in enumerate(self._ascii):
            if not plain and not widths.holds(texts[number]):
                self.sound[number] = False

    def mask(self, spans: Sequence[Sequence[tuple[int, int]]]) -> npt.NDArray[np.bool_]:
        """(tokens,): which tokens begin inside their text's spans, given in characters."""
        edges: list[int] = []
        for base, text, plain, own in zip(
            self._begins[self._firsts[:-1]].tolist(), self._texts, self._ascii, spans, strict=True
        ):
            for begin, end in own:
                if not plain:
                    begin, end = len(text[:begin].encode()), len(text[:end].encode())
                edges += (base + begin, base + end)
        rows = np.repeat(np.arange(len(self._texts)), [2 * len(own) for own in spans])
        places = np.searchsorted(self._begins[:-1], np.array(edges, np.int64))
        # What is not sound must not reach into its neighbours.
        places = np.clip(places, self._firsts[rows], self._firsts[rows + 1])
        steps = np.zeros(len(self._begins), np.int32)
        np.add.at(steps, places[0::2], 1)
        np.add.at(steps, places[1::2], -1)
        return np.cumsum(steps[:-1], dtype=np.int32) > 0
