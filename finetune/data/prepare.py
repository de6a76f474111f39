"""Config → rows of tokens with their loss mask, every row accounted for. No torch is needed for any of it."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.base_files import read_model_config
from finetune.config.schema import Config, DataSource, is_local_data
from finetune.data.formats import Conversation, Message, convert, detect_format
from finetune.data.pack import pack
from finetune.data.read import read_rows, shown_path
from finetune.data.template import ChatTemplate, TemplateRefusal, choose_template, refusal
from finetune.data.tokenizer import Tokenizer, load_tokenizer
from finetune.errors import BaseError, DataError

DETECT_ROWS = 100
"""How many rows decide the format. The rest must fit it, or are errors, so more would find nothing more."""

BATCH_ROWS = 1000
"""Rows tokenised at a time: enough to keep all cores busy, few enough for a live progress bar."""

IGNORED = -100
"""The label of a token without loss, as in torch's cross entropy."""


@dataclass(frozen=True)
class TokenRow:
    """One tokenised row."""

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    """True where the token carries loss."""
    conversation: Conversation

    @property
    def place(self) -> str:
        return self.conversation.place

    def labels(self) -> npt.NDArray[np.int32]:
        """The ids where they carry loss, -100 elsewhere."""
        return np.where(self.supervised, self.ids, np.int32(IGNORED))


@dataclass
class Accounting:
    """Where every row went: read = used + held out + the sum of dropped."""

    read: int = 0
    used: int = 0
    held_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason → place of the first row dropped for it."""
    truncated: int = 0
    """Of the rows used or held out, how many were cut."""
    lost_supervised_tokens: int = 0
    """What the cuts took from them."""
    formats: dict[str, str] = field(default_factory=dict)
    """Source → format."""

    def drop(self, reason: str, place: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, place)


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and is evaluated on."""

    train: list[TokenRow]
    held_out: list[TokenRow]
    packs: list[list[int]] | None
    """Which training rows share a sequence, or None without packing."""
    accounting: Accounting
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None when every row is plain text."""

    @property
    def sequences(self) -> int:
        return len(self.train) if self.packs is None else len(self.packs)

    @property
    def supervised_tokens(self) -> int:
        return int(sum(int(row.supervised.sum()) for row in self.train))

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.train)


def prepare(
    config: Config,
    base_folder: Path,
    *,
    today: datetime.datetime | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreparedData:
    """Read, convert, tokenise, mask, split and pack. Raises DataError or BaseError.

    `on_progress` is called with the rows done and the rows in all.
    """
    accounting = Accounting()
    train: list[tuple[Conversation, DataSource]] = []
    for source in config.data:
        train += [(conversation, source) for conversation in load_source(source, accounting)]
    accounting.read = len(train)
    held_out: list[tuple[Conversation, DataSource]] = []
    own = held_out_source(config)
    if own is not None:
        held_out = [(conversation, own) for conversation in load_source(own, accounting)]
        accounting.read += len(held_out)
    else:
        train, held_out = _split(train, config.evaluation.split, config.train.seed)
    tokenizer = load_tokenizer(base_folder)
    today = today or datetime.datetime.now()
    chat = any(conversation.text is None for conversation, _ in train + held_out)
    template = choose_template(config.chat_template, tokenizer, today) if chat else None
    total = len(train) + len(held_out)
    encoder = _Encoder(config, tokenizer, template, accounting, on_progress or (lambda done, total: None), total)
    train_rows = encoder.encode(train)
    held_out_rows = encoder.encode(held_out)
    if not train_rows:
        first = next(iter(accounting.first_dropped.items()), None)
        raise DataError(
            "no row is left to train on" + (f": {first[0]} (the first: {first[1]})" if first else ""),
            place=", ".join(accounting.formats),
            hint="raise train.sequence_length, or set `on_overlong: error` in data to see how long the rows are",
        )
    _check_against_base(train_rows + held_out_rows, base_folder)
    accounting.used, accounting.held_out = len(train_rows), len(held_out_rows)
    packs = None
    if config.train.packing:
        packs = pack([len(row.ids) for row in train_rows], config.train.sequence_length)
        # Packs come out longest rows first; the order of training must not follow length.
        random.Random(config.train.seed).shuffle(packs)
    return PreparedData(train_rows, held_out_rows, packs, accounting, tokenizer, template)


def _check_against_base(rows: Sequence[TokenRow], base_folder: Path) -> None:
    """No row may be longer than the base can attend to, or hold a token that the base has no embedding for.

    Either would end in an error deep inside a kernel, or in nonsense, hours later.
    """
    if not (base_folder / "config.json").is_file():
        return  # a folder with a tokenizer alone
    settings = read_model_config(base_folder)
    settings = settings["text_config"] if isinstance(settings.get("text_config"), dict) else settings
    positions, embeddings = settings.get("max_position_embeddings"), settings.get("vocab_size")
    longest = max(rows, key=lambda row: len(row.ids))
    if isinstance(positions, int) and len(longest.ids) > positions:
        raise DataError(
            f"has {len(longest.ids):,} tokens, but the base attends to {positions:,} at most",
            place=longest.place,
            hint=f"set train.sequence_length to {positions}, and say with `on_overlong` what becomes of longer rows",
        )
    highest = max(rows, key=lambda row: int(row.ids.max()))
    if isinstance(embeddings, int) and int(highest.ids.max()) >= embeddings:
        raise BaseError(
            f"the tokenizer makes token {int(highest.ids.max()):,} of {highest.place}, but the model has only "
            f"{embeddings:,} embeddings",
            place=str(base_folder),
            hint="tokenizer and weights do not belong together: take both from the same model",
        )


def held_out_source(config: Config) -> DataSource | None:
    """The source that `evaluation.path` names, or None when held-out rows are split off `data`."""
    own = config.evaluation
    if own.path is None:
        return None
    return DataSource(path=own.path, format=own.format, columns=own.columns)


def load_source(source: DataSource, accounting: Accounting) -> list[Conversation]:
    """All rows of one source as conversations. Raises DataError at the first that is wrong."""
    rows = read_rows(source)
    first = list(islice(rows, DETECT_ROWS))
    format_ = source.format
    if format_ == "auto":
        format_ = detect_format(first)  # type: ignore[assignment]
    shown = shown_path(Path(source.path)) if is_local_data(source.path) else source.path
    accounting.formats[shown] = format_
    conversations = [convert(row, format_) for row in first]
    conversations += [convert(row, format_) for row in rows]
    return conversations


def _split(
    rows: list[tuple[Conversation, DataSource]], share: float, seed: int
) -> tuple[list[tuple[Conversation, DataSource]], list[tuple[Conversation, DataSource]]]:
    """Draw the held-out rows: a fraction below 1, or a number of rows. If any are asked for, each side gets one."""
    if share == 0:
        return rows, []
    wanted = round(share * len(rows)) if share < 1 else int(share)
    wanted = max(1, wanted)
    if wanted >= len(rows):
        raise DataError(
            f"would hold out {wanted:,} of {len(rows):,} rows, which leaves none to train on",
            place="evaluation.split",
            hint="give more rows, hold out fewer, or set it to 0, which evaluates nothing",
        )
    chosen = set(random.Random(seed).sample(range(len(rows)), wanted))
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [row for index, row in enumerate(rows) if index in chosen]


class _Encoder:
    """Tokenises conversations in batches, masks them, and applies each source's policy for overlong rows."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        accounting: Accounting,
        on_progress: Callable[[int, int], None],
        total: int,
    ) -> None:
        self._config, self._tokenizer, self._template = config, tokenizer, template
        self._accounting, self._on_progress = accounting, on_progress
        self._done, self._total = 0, total

    def encode(self, rows: Sequence[tuple[Conversation, DataSource]]) -> list[TokenRow]:
        encoded: list[TokenRow] = []
        overlong: list[TokenRow] = []
        for begin in range(0, len(rows), BATCH_ROWS):
            batch = rows[begin : begin + BATCH_ROWS]
            for row, (_, source) in zip(self._encode_batch([row for row, _ in batch]), batch, strict=True):
                if len(row.ids) > self._config.train.sequence_length and source.on_overlong == "error":
                    overlong.append(row)
                    continue
                kept = self._fit(row, source)
                if kept is not None:
                    encoded.append(kept)
            self._done += len(batch)
            self._on_progress(self._done, self._total)
        if overlong:
            raise _overlong_error(overlong, self._config.train.sequence_length, len(rows))
        return encoded

    def _encode_batch(self, conversations: Sequence[Conversation]) -> list[TokenRow]:
        texts: list[str] = []
        spans: list[list[tuple[int, int]] | None] = []
        for conversation in conversations:
            text, found = self._render(conversation)
            texts.append(text)
            spans.append(found)
        plain = [span is None for span in spans]
        # Rendered conversations already hold their special tokens; plain texts get theirs from the tokenizer.
        chat_encodings = iter(
            self._tokenizer.backend.encode_batch(
                [text for text, is_plain in zip(texts, plain, strict=True) if not is_plain], add_special_tokens=False
            )
        )
        rows = []
        for conversation, text, found in zip(conversations, texts, spans, strict=True):
            if found is None:
                ids = np.array([*self._tokenizer.encode(text, special=True), self._tokenizer.eos_id], dtype=np.int32)
                rows.append(TokenRow(ids, np.ones(len(ids), dtype=np.bool_), conversation))
                continue
            encoding = next(chat_encodings)
            ids = np.array(encoding.ids, dtype=np.int32)
            if self._config.train.loss_on == "all":
                mask = np.ones(len(ids), dtype=np.bool_)
            else:
                mask = supervised_mask(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2), found)
            rows.append(TokenRow(ids, mask, conversation))
        return rows

    def _render(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]] | None]:
        if conversation.text is not None:
            return conversation.text, None
        assert self._template is not None
        try:
            if self._config.train.loss_on == "all":
                return self._template.render_whole(conversation.messages), []
            return self._template.render_with_answers(conversation.messages)
        except TemplateRefusal as reason:
            raise refusal(self._template, reason, conversation.place) from reason

    def _fit(self, row: TokenRow, source: DataSource) -> TokenRow | None:
        limit = self._config.train.sequence_length
        lost: int | None = None
        if len(row.ids) > limit:
            if source.on_overlong == "drop":
                self._accounting.drop("longer than train.sequence_length", row.place)
                return None
            lost = int(row.supervised[limit:].sum())
            row = TokenRow(row.ids[:limit], row.supervised[:limit], row.conversation)
        if not row.supervised[1:].any():
            # The first token is never predicted, so a loss on it alone trains nothing.
            self._accounting.drop("no token with loss is left", row.place)
            return None
        if lost is not None:
            self._accounting.truncated += 1
            self._accounting.lost_supervised_tokens += lost
        return row


def supervised_mask(offsets: npt.NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Which tokens carry loss: those that begin inside an answer's span.

    `offsets` is (tokens, 2): begin and end of each token in characters. A token that begins before the answer is part
    of the prompt, which is all that is known when the model begins to write.
    """
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for begin, end in spans:
        mask |= (offsets[:, 0] >= begin) & (offsets[:, 0] < end)
    return mask


def _overlong_error(rows: Sequence[TokenRow], limit: int, total: int) -> DataError:
    longest = max(rows, key=lambda row: len(row.ids))
    lost = sum(int(row.supervised[limit:].sum()) for row in rows)
    emptied = sum(not row.supervised[1:limit].any() for row in rows)
    return DataError(
        f"{len(rows):,} of {total:,} rows are longer than train.sequence_length {limit:,}; the first is here, the "
        f"longest has {len(longest.ids):,} tokens ({longest.place})",
        place=rows[0].place,
        hint=f"raise train.sequence_length to {len(longest.ids)}, or set in data `on_overlong: truncate` (loses "
        f"{lost:,} tokens with loss, {emptied:,} rows whole) or `on_overlong: drop` (loses {len(rows):,} rows)",
    )


def prompt_messages(conversation: Conversation) -> tuple[Message, ...]:
    """The conversation up to, and without, its last answer."""
    return conversation.messages[:-1]
