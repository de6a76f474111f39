"""Rows → tokens with their loss mask, a chunk at a time: the work that is shared out to processes."""

from __future__ import annotations

import heapq
import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from finetune.config.schema import DataSource
from finetune.data.accounting import Overlong, Wrong
from finetune.data.answers import AnswerFinder, Rendered
from finetune.data.conversation import Conversation, Message
from finetune.data.duplicates import exact_keys, signatures
from finetune.data.formats import convert
from finetune.data.jinja import TemplateRefusal
from finetune.data.languages import language_counts
from finetune.data.limits import bounds
from finetune.data.quality import Findings, scan
from finetune.data.read import Chunk
from finetune.data.template import refusal
from finetune.data.tokenizer import Tokenizer
from finetune.data.widths import ByteWidths, Places, byte_widths
from finetune.errors import DataError

if TYPE_CHECKING:
    import tokenizers

UNWANTED = "labelled as unwanted (kto, label: false)"
NOTHING_LEFT = "no token with loss is left"
TOO_LONG = "longer than train.sequence_length"
SPELT_OUT = "special tokens of the model spelt out in the text"
TOO_LONG_TO_SPLIT = "one exchange alone is longer than train.sequence_length"

BATCH = 64
"""Texts that the tokenizer gets at a time. It keeps ten times the size of a text while it works: with a thousand at a
time, which is more than a processor's cache holds, it takes a quarter longer."""

LANGUAGE_ROWS = 100
"""Rows of each source whose language is guessed, at half a millisecond each: enough for a summary."""

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Task:
    """A chunk of a source to encode."""

    source: int
    chunk: Chunk
    first_of_source: bool = False


@dataclass(frozen=True)
class _Row:
    """One row on its way."""

    conversation: Conversation
    ids: Ids
    mask: Mask
    own: Ids
    """The tokens of what the messages say, without the template's and the system message's, to compare rows by."""


@dataclass
class Encoded:
    """What became of a chunk. Arrays run over all of its rows, one after the other."""

    source: int
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.int32))
    supervised: Mask = field(default_factory=lambda: np.zeros(0, np.bool_))
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Equal for equal rows."""
    signatures: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros((0, 64), np.uint16))
    """(rows, 64): MinHash of what is not system message."""
    begins: list[bool] = field(default_factory=list)
    """False for the second and further pieces of a row that was split."""
    places: list[str] = field(default_factory=list)
    conversations: dict[int, str] = field(default_factory=dict)
    """Row of this chunk → its conversation as JSON, for rows that may be held out and shown."""
    read: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)
    wrong: Wrong = field(default_factory=Wrong)
    overlong: Overlong = field(default_factory=Overlong)
    truncated: int = 0
    split: int = 0
    lost: int = 0
    """Tokens with loss that a cut took."""
    found: Findings = field(default_factory=lambda: Findings({}, {}))
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        count, first = self.dropped.get(reason, (0, place))
        self.dropped[reason] = (count + 1, first)


class Encoder:
    """Encodes chunks. One object serves a whole preparation (or a worker process's share of it)."""

    def __init__(
        self,
        sources: Sequence[DataSource],
        formats: Sequence[str],
        tokenizer: Tokenizer,
        finder: AnswerFinder | None,
        *,
        sequence_length: int,
        loss_on: str,
        private: bool,
        keep: int,
        held_out: int | None,
        seed: int,
    ) -> None:
        """`keep`: for how many rows the conversation itself is handed back, of the sources to train on and of the
        source `held_out` each: those that come first when rows are held out."""
        self._sources, self._formats = sources, formats
        self._tokenizer, self._finder = tokenizer, finder
        self._limit, self._loss_on, self._private = sequence_length, loss_on, private
        self._keep = {False: _Smallest(keep), True: _Smallest(keep)}
        self._held_out, self._seed = held_out, seed
        self._widths: ByteWidths | None = None
        special = [token for token in tokenizer.special_tokens if len(token) > 2]
        self._special = re.compile("|".join(map(re.escape, special))) if special else None

    def expect_many(self) -> None:
        """Make what pays for itself only over many rows: the table of how long tokens are."""
        self._widths = byte_widths(self._tokenizer)

    def encode(self, task: Task) -> Encoded:
        found = Encoded(task.source)
        conversations = self._converted(task, found)
        found.notes = dict(task.chunk.notes)
        if conversations:
            texts = ["\n".join(conversation.all_text()) for conversation in conversations]
            places = [conversation.place for conversation in conversations]
            found.found = scan(texts, places, private=self._private)
            self._note_special_tokens(texts, places, found)
            if task.first_of_source:
                found.languages = dict(language_counts(texts[:LANGUAGE_ROWS]))
        source = self._sources[task.source]
        rows: list[_Row] = []
        for row in self._rows(conversations, found):
            pieces = self._fitted(row, source, found)
            rows += pieces
            found.begins += [True, *[False] * (len(pieces) - 1)] if pieces else []
        if rows:
            self._collect(rows, found)
        return found

    def _converted(self, task: Task, found: Encoded) -> list[Conversation]:
        conversations = []
        format_ = self._formats[task.source]
        for row in task.chunk.rows():
            found.read += 1
            try:
                if isinstance(row, DataError):
                    raise row
                conversation = convert(row, format_)
            except DataError as error:
                self._wrong(error, found)
                continue
            if conversation.unwanted:
                found.drop(UNWANTED, conversation.place)
            else:
                conversations.append(conversation)
        return conversations

    def _note_special_tokens(self, texts: Sequence[str], places: Sequence[str], found: Encoded) -> None:
        """A text that spells out <|im_end|> is read as one: that may be meant, or an attempt to speak for another."""
        if self._special is not None and self._special.search("\n".join(texts)):
            for text, place in zip(texts, places, strict=True):
                if self._special.search(text):
                    found.found.add(SPELT_OUT, place)

    @staticmethod
    def _wrong(error: DataError, found: Encoded) -> None:
        found.wrong.add(error)
        found.drop(error.problems[0].message, error.problems[0].place or "")

    # -- tokens -----------------------------------------------------------------------------------------------

    def _rows(self, conversations: Sequence[Conversation], found: Encoded) -> list[_Row]:
        """Render and tokenise. The order of the rows is kept."""
        rendered: list[tuple[Conversation, Rendered | None]] = []
        with bounds(self._finder.template.origin if self._finder is not None else ""):
            for conversation in conversations:
                try:
                    rendered.append((conversation, self._rendered(conversation)))
                except TemplateRefusal as reason:
                    assert self._finder is not None
                    self._wrong(refusal(self._finder.template, reason, conversation.place), found)
        chats = iter(self._chats([(conversation, text) for conversation, text in rendered if text is not None]))
        texts = iter(self._texts([conversation for conversation, text in rendered if text is None]))
        return [next(texts) if text is None else next(chats) for _, text in rendered]

    def _texts(self, conversations: Sequence[Conversation]) -> list[_Row]:
        """Plain texts, with what the tokenizer puts around a text, and an end."""
        if not conversations:
            return []
        encodings = self._tokenizer.backend.encode_batch_fast(
            [conversation.text or "" for conversation in conversations]
        )
        rows = []
        for conversation, encoding in zip(conversations, encodings, strict=True):
            ids = np.array([*encoding.ids, self._tokenizer.eos_id], dtype=np.int32)
            rows.append(_Row(conversation, ids, np.ones(len(ids), dtype=np.bool_), ids))
        return rows

    def _chats(self, rendered: Sequence[tuple[Conversation, Rendered]]) -> list[_Row]:
        """Conversations in one batched pass; a rendered conversation already holds its special tokens."""
        if not rendered:
            return []
        backend = self._tokenizer.backend
        texts = [text.text for _, text in rendered]
        if self._widths is None:
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            return [self._chat(*both, encoding) for both, encoding in zip(rendered, encodings, strict=True)]
        flat = array("i")
        counts = []
        for begin in range(0, len(texts), BATCH):
            for encoding in backend.encode_batch_fast(texts[begin : begin + BATCH], add_special_tokens=False):
                ids = encoding.ids
                flat.extend(ids)
                counts.append(len(ids))
        tokens, lengths = np.frombuffer(flat, np.int32), np.array(counts, np.int64)
        places = Places(tokens, lengths, texts, self._widths)
        own = places.mask([text.contents for _, text in rendered])
        if self._loss_on == "all":
            loss = np.ones(len(tokens), np.bool_)
        else:
            loss = places.mask([text.spans for _, text in rendered])
        rows = []
        begin = 0
        for (conversation, text), count, is_sound in zip(rendered, counts, places.sound.tolist(), strict=True):
            if is_sound:
                row = slice(begin, begin + count)
                rows.append(_Row(conversation, tokens[row], loss[row], tokens[row][own[row]]))
            else:
                rows.append(self._chat(conversation, text, backend.encode(text.text, add_special_tokens=False)))
            begin += count
        return rows

    def _chat(self, conversation: Conversation, text: Rendered, encoding: tokenizers.Encoding) -> _Row:
        """One conversation, by the offsets that the tokenizer gives."""
        ids = np.array(encoding.ids, dtype=np.int32)
        if self._loss_on == "all":
            mask = np.ones(len(ids), dtype=np.bool_)
        else:
            mask = supervised_mask(encoding, text.spans, len(text.text))
        own = ids[supervised_mask(encoding, text.contents, len(text.text))]
        return _Row(conversation, ids, mask, own)

    def _rendered(self, conversation: Conversation) -> Rendered | None:
        if conversation.text is not None:
            return None
        assert self._finder is not None, "a template is chosen wherever there are conversations"
        trained = conversation.trained(self._loss_on) if self._loss_on != "all" else None
        return self._finder.render(conversation, trained)

    # -- length -----------------------------------------------------------------------------------------------

    def _fitted(self, row: _Row, source: DataSource, found: Encoded) -> list[_Row]:
        """The row, or what is left of it."""
        limit, place = self._limit, row.conversation.place
        if len(row.ids) <= limit:
            pieces = [row]
        elif source.on_overlong == "error":
            cut = int(row.mask[limit:].sum())
            _, unsplit = self._split(row)
            found.overlong.add(
                len(row.ids),
                place,
                truncate=cut,
                emptied=not row.mask[1:limit].any(),
                split=unsplit,
                drop=int(row.mask.sum()),
            )
            return []
        elif source.on_overlong == "drop":
            found.drop(TOO_LONG, place)
            return []
        elif source.on_overlong == "truncate":
            pieces = [replace(row, ids=row.ids[:limit], mask=row.mask[:limit])]
        else:
            pieces, _ = self._split(row)
            if not pieces:
                found.drop(TOO_LONG_TO_SPLIT, place)
                return []
        # The first token is never predicted, so a loss on it alone trains nothing.
        kept = [piece for piece in pieces if piece.mask[1:].any()]
        if not kept:
            found.drop(NOTHING_LEFT, place)
            return []
        if len(row.ids) > limit:
            lost = int(row.mask.sum()) - sum(int(piece.mask.sum()) for piece in kept)
            found.lost += max(lost, 0)
            found.truncated += source.on_overlong == "truncate"
            found.split += source.on_overlong == "split"
        return kept

    def _split(self, row: _Row) -> tuple[list[_Row], int]:
        """An overlong row in pieces that fit, and how many tokens with loss fit into none.

        A text is cut every `sequence_length` tokens. A conversation is cut between exchanges (a user's turn and what
        follows it); each piece begins with the system message and holds as many exchanges as fit.
        """
        if row.conversation.text is not None:
            windows = [slice(begin, begin + self._limit) for begin in range(0, len(row.ids), self._limit)]
            return [replace(row, ids=row.ids[w], mask=row.mask[w], own=row.ids[w]) for w in windows], 0
        messages = row.conversation.messages
        system = [message for message in messages[:1] if message.role == "system"]
        trained = set(row.conversation.trained(self._loss_on)) if self._loss_on != "all" else None
        exchanges: list[list[Message]] = []
        for index, message in enumerate(messages[len(system) :], len(system)):
            if message.role == "user" or not exchanges:
                exchanges.append([])
            carries = trained is None or index in trained
            exchanges[-1].append(message if carries else replace(message, weight=0))
        pieces: list[_Row] = []
        lost = 0
        current: list[Message] = []
        last: _Row | None = None
        for exchange in exchanges:
            longer = self._encoded(row.conversation, [*system, *current, *exchange])
            if len(longer.ids) <= self._limit:
                current, last = [*current, *exchange], longer
                continue
            if last is not None:
                pieces.append(last)
            alone = longer if not current else self._encoded(row.conversation, [*system, *exchange])
            if len(alone.ids) <= self._limit:
                current, last = exchange, alone
            else:
                lost += int(alone.mask.sum())
                current, last = [], None
        return ([*pieces, last] if last is not None else pieces), lost

    def _encoded(self, conversation: Conversation, messages: Sequence[Message]) -> _Row:
        part = replace(conversation, messages=tuple(messages), completion=None)
        assert self._finder is not None
        trained = part.trained("assistant") if self._loss_on != "all" else None
        rendered = self._finder.render(part, trained)
        encoding = self._tokenizer.backend.encode(rendered.text, add_special_tokens=False)
        return self._chat(part, rendered, encoding)

    # -- what is handed back ------------------------------------------------------------------------------------

    def _collect(self, rows: Sequence[_Row], found: Encoded) -> None:
        found.ids = np.concatenate([row.ids for row in rows])
        found.supervised = np.concatenate([row.mask for row in rows])
        found.lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
        found.keys = exact_keys(found.ids, _offsets(found.lengths))
        own = _offsets(np.array([len(row.own) for row in rows]))
        found.signatures = signatures(np.concatenate([row.own for row in rows]), own)
        found.places = [row.conversation.place for row in rows]
        for index, order in enumerate(split_order(found.keys, self._seed).tolist()):
            if self._keep[found.source == self._held_out].takes(order):
                found.conversations[index] = dump(rows[index].conversation)


def split_order(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Keys in an order of their own for each seed: the held-out rows are those that come first.

    So a row's side depends on nothing but the row: adding others does not move it, and copies of it go with it.
    (The mixing is the finaliser of SplitMix64: Steele, Lea, Flood, OOPSLA 2014.)
    """
    with np.errstate(over="ignore"):
        mixed = keys ^ (np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15))
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found


class _Smallest:
    """Says of numbers, one by one, whether they may be among the `count` smallest of all."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[int] = []  # negated: the largest of the smallest comes first

    def takes(self, number: int) -> bool:
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, -number)
            return True
        if self._heap and -number > self._heap[0]:
            heapq.heapreplace(self._heap, -number)
            return True
        return False


def dump(conversation: Conversation) -> str:
    """A conversation as JSON: [messages, place, text, tools, completion]."""
    messages = [[m.role, m.content, m.tool_calls, m.extra, m.weight] for m in conversation.messages]
    whole = [messages, conversation.place, conversation.text, conversation.tools, conversation.completion]
    return json.dumps(whole, ensure_ascii=False)


def load(text: str) -> Conversation:
    """The inverse of `dump`."""
    messages, place, plain, tools, completion = json.loads(text)
    said = [
        Message(role, content, tuple(calls), tuple((name, value) for name, value in extra), weight)
        for role, content, calls, extra, weight in messages
    ]
    return Conversation(tuple(said), place, plain, tuple(tools), completion)


def supervised_mask(encoding: tokenizers.Encoding, spans: Sequence[tuple[int, int]], length: int) -> Mask:
    """Which tokens carry loss: those that begin inside an answer's span, of a text of `length` characters.

    A token that begins before the answer is part of the prompt, which is all that is known when the model begins to
    write. The tokenizer is asked for the few tokens at the ends of the spans only: to list all offsets of 10 million
    tokens takes longer than everything else here.
    """
    mask = np.zeros(len(encoding), dtype=np.bool_)
    for begin, end in spans:
        mask[token_at(encoding, begin, length) : token_at(encoding, end, length)] = True
    return mask


def token_at(encoding: tokenizers.Encoding, character: int, length: int) -> int:
    """The first token that begins at a character of the text or after it; the number of tokens if there is none."""
    count = len(encoding)
    if character >= length:
        return count
    token: int | None = encoding.char_to_token(character)
    if token is None:  # a character that became no token (a tokenizer may drop white space)
        begins = [begin for begin, _ in encoding.offsets]
        return next((number for number, begin in enumerate(begins) if begin >= character), count)
    # Several tokens may make up one character, and then all of them begin where it does.
    while token < count and (encoding.token_to_chars(token) or (character,))[0] < character:
        token += 1
    return token


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
