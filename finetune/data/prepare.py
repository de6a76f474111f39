"""Config → rows of tokens with their loss mask, every row accounted for. No torch is needed for any of it."""

from __future__ import annotations

import contextlib
import datetime
import random
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.base_files import read_model_config
from finetune.config.schema import Config, DataSource, is_local_data
from finetune.data.accounting import Accounting, Overlong, Wrong
from finetune.data.answers import AnswerFinder
from finetune.data.cache import Cache
from finetune.data.conversation import Conversation
from finetune.data.duplicates import count_duplicates, near_duplicates
from finetune.data.encode import Encoded, Encoder, Task, split_order
from finetune.data.formats import convert, detect_format
from finetune.data.jinja import TemplateRefusal
from finetune.data.limits import bounds
from finetune.data.pack import pack
from finetune.data.parallel import encoded
from finetune.data.quality import length_outliers
from finetune.data.read import Chunk, Row, no_rows, read_chunks, shown_path
from finetune.data.split import hold_out, keep_together, leaks, weighted
from finetune.data.store import DamagedStore, Packs, Rows, Store, StoreWriter
from finetune.data.take import taken
from finetune.data.template import ChatTemplate, choose_template, training_version
from finetune.data.tokenizer import Tokenizer, load_tokenizer
from finetune.errors import BaseError, DataError
from finetune.runs import manifest
from finetune.runs.files import temporary_storage

DETECT_ROWS = 100
"""How many rows decide the format, and which form of a chat template. The rest must fit them, or are errors."""

SPARE_CONVERSATIONS = 4
"""Conversations kept for each row to evaluate: which rows are held out is only known at the end."""

WRONG_ENOUGH = 1000
"""With more wrong rows than allowed, reading goes on for so many more, to name all kinds; then it has shown enough."""

Today = datetime.datetime


@dataclass
class PreparedData:
    """What a run trains and is evaluated on. Lies on disk; rows are read as they are asked for."""

    store: Store
    accounting: Accounting
    base_folder: Path
    chat_template: str | None
    today: Today
    cached: bool = False
    """Whether it was prepared by an earlier command."""

    @cached_property
    def train(self) -> Rows:
        return Rows(self.store, self.store.train)

    @cached_property
    def held_out(self) -> Rows:
        return Rows(self.store, self.store.held_out)

    @property
    def packs(self) -> Packs | None:
        """Which training rows share a sequence, or None without packing."""
        return self.store.packs

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.base_folder)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The template that the model will be run with. None when every row is plain text."""
        if self.accounting.template is None:
            return None
        return choose_template(self.chat_template, self.tokenizer, self.today)

    @cached_property
    def rows_digest(self) -> str:
        """What tells the training rows and their packs from others. Reads every token."""
        return self.store.digest(self.store.train) + (self.packs.digest() if self.packs is not None else "")

    @property
    def sequences(self) -> int:
        return len(self.train) if self.packs is None else len(self.packs)

    @property
    def supervised_tokens(self) -> int:
        return self.train.supervised_tokens

    @property
    def tokens(self) -> int:
        return int(self.train.lengths.sum())


def prepare(
    config: Config,
    base_folder: Path,
    *,
    cache: Path | None = None,
    today: Today | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> PreparedData:
    """Read, convert, tokenise, mask, split and pack, or find it done already. Raises DataError or BaseError.

    `cache` is the folder where prepared data is kept; without it, it goes when the object does. `on_progress` is called
    with the number of rows read. `today` is the day that a template is told (`runs.manifest.day_of`).
    """
    # Data that was prepared in the morning is found again in the evening: no template is told the time.
    today = datetime.datetime.combine(today or manifest.today(), datetime.time())
    with temporary_storage():
        temporary = Path(tempfile.mkdtemp(prefix="ft-data-")) if cache is None else None
    kept = Cache(temporary or cache or Path())
    try:
        return _prepare(config, base_folder, kept, today, on_progress or (lambda done: None), temporary)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _prepare(
    config: Config,
    base_folder: Path,
    kept: Cache,
    today: Today,
    on_progress: Callable[[int], None],
    temporary: Path | None,
) -> PreparedData:
    key = kept.key(config, base_folder, today)
    folder = kept.find(key) if key is not None else None
    store = None
    if folder is not None and key is not None:
        with contextlib.suppress(DamagedStore):
            store = Store(folder)
        if store is None:
            kept.drop(key)
    cached = store is not None
    if store is None:
        with kept.writing() as partial:
            writer = StoreWriter(partial)
            try:
                _Preparation(config, base_folder, today, writer, on_progress).run()
            finally:
                writer.close()
            store = Store(kept.keep(partial, key or "unkeyed"))
    accounting = Accounting(**store.about["accounting"])
    data = PreparedData(store, accounting, base_folder, config.chat_template, today, cached)
    if temporary is not None:
        weakref.finalize(store, shutil.rmtree, temporary, ignore_errors=True)
    return data


def held_out_source(config: Config) -> DataSource | None:
    """The source that `evaluation.path` names, or None when held-out rows are split off `data`."""
    own = config.evaluation
    if own.path is None:
        return None
    return DataSource(path=own.path, format=own.format, columns=own.columns, on_overlong=own.on_overlong)


class _Preparation:
    """One preparation, from the sources to a written store."""

    def __init__(
        self,
        config: Config,
        base_folder: Path,
        today: Today,
        writer: StoreWriter,
        on_progress: Callable[[int], None],
    ) -> None:
        self._config, self._base_folder, self._today = config, base_folder, today
        self._writer, self._on_progress = writer, on_progress
        self._accounting = Accounting()
        own = held_out_source(config)
        self._own = own is not None
        self._sources = [*config.data, *([own] if own is not None else [])]
        self._wrong = [Wrong() for _ in self._sources]
        self._overlong = {False: Overlong(), True: Overlong()}
        """By whether the rows are held out in a file of their own."""
        self._row_sources: list[npt.NDArray[np.int16]] = []
        self._keys: list[npt.NDArray[np.uint64]] = []
        self._begins: list[npt.NDArray[np.bool_]] = []
        self._total = 0

    def run(self) -> None:
        openings = [self._open(number) for number in range(len(self._sources))]
        tokenizer = load_tokenizer(self._base_folder)
        finder = None
        if any(opening.format != "text" for opening in openings):
            finder = self._choose_finder(tokenizer, [c for opening in openings for c in opening.conversations])
        config = self._config
        encoder = Encoder(
            self._sources,
            [opening.format for opening in openings],
            tokenizer,
            finder,
            sequence_length=config.train.sequence_length,
            loss_on=config.train.loss_on,
            private=config.private_data == "report",
            keep=SPARE_CONVERSATIONS * config.evaluation.max_rows,
            held_out=len(self._sources) - 1 if self._own else None,
            seed=config.train.seed,
        )
        tasks = (task for number, opening in enumerate(openings) for task in opening.tasks(number))
        for part in encoded(encoder, tasks):
            self._take(part)
        self._refuse_what_is_wrong()
        self._check_against_base()
        self._finish()

    # -- before the tokens ----------------------------------------------------------------------------------------

    def _open(self, number: int) -> _Opening:
        """The first rows of a source, and what they say about the rest."""
        source = self._sources[number]
        chunks = taken(source, self._config.train.seed, read_chunks(source))
        seen: list[Chunk] = []
        rows: list[Row] = []
        wrong = Wrong()
        while len(rows) < DETECT_ROWS:
            chunk = next(chunks, None)
            if chunk is None:
                break
            seen.append(chunk)
            for row in islice(chunk.rows(), DETECT_ROWS):
                if isinstance(row, DataError):
                    wrong.add(row)
                else:
                    rows.append(row)
        if not rows:
            raise wrong.error(0, more=True) if wrong.rows else no_rows(source)
        format_ = detect_format(rows) if source.format == "auto" else source.format
        conversations = []
        for row in rows[:DETECT_ROWS]:
            with contextlib.suppress(DataError):
                conversations.append(convert(row, format_))
        shown = shown_path(Path(source.path)) if is_local_data(source.path) else source.path
        self._accounting.formats[shown] = format_
        return _Opening(format_, conversations, chain(seen, chunks))

    def _choose_finder(self, tokenizer: Tokenizer, first: Sequence[Conversation]) -> AnswerFinder:
        """The way to render conversations: by the template as it is, by TRL's training version of it, or leniently.

        The first that all of the first rows can be proven with, otherwise the one that fails least.
        """
        chats = [conversation for conversation in first if conversation.text is None and not conversation.unwanted]
        own = choose_template(self._config.chat_template, tokenizer, self._today)
        loss_on = self._config.train.loss_on
        ways: list[tuple[int, AnswerFinder, str]] = []
        for finder, what in _ways(own):
            refused = 0
            with bounds(own.origin):
                for conversation in chats:
                    try:
                        finder.render(conversation, conversation.trained(loss_on) if loss_on != "all" else None)
                    except TemplateRefusal:
                        refused += 1
            ways.append((refused, finder, what))
            if not refused:
                break
        refused, finder, what = min(ways, key=lambda way: way[0])
        self._accounting.template = what
        return finder

    # -- chunk by chunk -------------------------------------------------------------------------------------------

    def _take(self, part: Encoded) -> None:
        accounting, writer = self._accounting, self._writer
        writer.add(part.ids, part.supervised, part.lengths, part.places, part.conversations)
        self._row_sources.append(np.full(len(part.lengths), part.source, dtype=np.int16))
        self._keys.append(part.keys)
        self._begins.append(np.array(part.begins, dtype=np.bool_))
        writer.add_signatures(part.signatures)
        accounting.read += part.read
        for reason, (count, place) in part.dropped.items():
            accounting.drop(reason, place, count)
        self._wrong[part.source].merge(part.wrong)
        self._overlong[self._own and part.source == len(self._sources) - 1].merge(part.overlong)
        accounting.truncated += part.truncated
        accounting.split += part.split
        accounting.lost_supervised_tokens += part.lost
        for kind, (count, place) in part.notes.items():
            accounting.find(kind, place, count)
        for kind, count in part.found.counts.items():
            accounting.find(kind, part.found.first[kind], count)
        for language, count in part.languages.items():
            accounting.languages[language] = accounting.languages.get(language, 0) + count
        self._on_progress(accounting.read)
        allowed = self._sources[part.source].max_dropped
        wrong = self._wrong[part.source]
        if wrong.rows > allowed + WRONG_ENOUGH:
            raise wrong.error(allowed, more=True)

    def _refuse_what_is_wrong(self) -> None:
        for wrong, source in zip(self._wrong, self._sources, strict=True):
            if wrong.rows > source.max_dropped:
                raise wrong.error(source.max_dropped, more=False)
        for held_out, overlong in self._overlong.items():
            if overlong.rows:
                section = "evaluation" if held_out else "data"
                raise overlong.error(self._config.train.sequence_length, self._accounting.read, section)
        if not self._writer.rows:
            first = next(iter(self._accounting.first_dropped.items()), None)
            raise DataError(
                "no row is left to train on" + (f": {first[0]} (the first: {first[1]})" if first else ""),
                place=", ".join(self._accounting.formats),
                hint="raise train.sequence_length, or set `on_overlong: error` in data to see how long the rows are",
            )

    def _check_against_base(self) -> None:
        """No row may be longer than the base can attend to, or hold a token that the base has no embedding for.

        Either would end in an error deep inside a kernel, or in nonsense, hours later.
        """
        if not (self._base_folder / "config.json").is_file():
            return  # a folder with a tokenizer alone
        settings = read_model_config(self._base_folder)
        settings = settings["text_config"] if isinstance(settings.get("text_config"), dict) else settings
        positions, embeddings = settings.get("max_position_embeddings"), settings.get("vocab_size")
        length, place = self._writer.longest
        if isinstance(positions, int) and length > positions:
            raise DataError(
                f"has {length:,} tokens, but the base attends to {positions:,} at most",
                place=place,
                hint=f"set train.sequence_length to {positions}, and say with `on_overlong` what becomes of the others",
            )
        token, place = self._writer.highest
        if isinstance(embeddings, int) and token >= embeddings:
            raise BaseError(
                f"the tokenizer makes token {token:,} of {place}, but the model has only {embeddings:,} embeddings",
                place=str(self._base_folder),
                hint="tokenizer and weights do not belong together: take both from the same model",
            )

    # -- once all rows are there ----------------------------------------------------------------------------------

    def _finish(self) -> None:
        config, accounting, writer = self._config, self._accounting, self._writer
        sources = np.concatenate(self._row_sources)
        keys = np.concatenate(self._keys)
        rows = np.cumsum(np.concatenate(self._begins)) - 1  # the row that each piece is of
        alike = near_duplicates(keys, writer.signatures())
        lengths = writer.lengths()
        if self._own:
            mine = sources == len(self._sources) - 1
            held_out, train = np.flatnonzero(mine), np.flatnonzero(~mine)
            held_out = held_out[np.argsort(split_order(keys[held_out], config.train.seed), kind="stable")]
            if not len(train) or not len(held_out):
                first = next(iter(accounting.first_dropped.items()), ("none was read", "?"))
                raise DataError(
                    f"no row is left to {'evaluate' if len(train) else 'train'} on: {first[0]} (the first: {first[1]})",
                    place=", ".join(accounting.formats),
                    hint="look at what was dropped, or leave out evaluation.path",
                )
        else:
            groups = keep_together(alike, rows)
            held_out, train = self._hold_out(split_order(keys, config.train.seed), groups, rows)
        self._report(keys, alike, lengths, train, held_out)
        order = weighted(train, sources, [source.weight for source in self._sources], config.train.seed)
        # A row that was split counts once, however many pieces it has.
        if not len(order):
            raise DataError(
                "the weights leave no row to train on",
                place="data",
                hint="a weight below 1 takes that part of a source's rows: give more rows, or a larger weight",
            )
        left_out = np.setdiff1d(rows[train], rows[order])
        if len(left_out):
            piece = int(np.searchsorted(rows, left_out[0]))
            accounting.drop("left out by `weight`", writer.place(piece), len(left_out))
        accounting.held_out = len(np.unique(rows[held_out]))
        accounting.used = len(np.unique(rows[order]))
        packs = None
        if config.train.packing:
            packs = pack(lengths[order].tolist(), config.train.sequence_length)
            # Packs come out longest rows first; the order of training must not follow length.
            random.Random(config.train.seed).shuffle(packs)
        writer.finish(train=order, held_out=held_out, packs=packs, about={"accounting": asdict(accounting)})

    def _hold_out(
        self, order: npt.NDArray[np.uint64], labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The pieces to hold out and to train on: chosen by whole rows, of which most are one piece."""
        own = self._config.evaluation
        firsts = np.flatnonzero(np.diff(rows, prepend=-1))
        held_out, _ = hold_out(
            own.split, np.minimum.reduceat(order, firsts), rows[labels[firsts]], allow_leakage=own.allow_leakage
        )
        place = np.full(len(firsts), -1, dtype=np.int64)
        place[held_out] = np.arange(len(held_out))
        pieces = np.flatnonzero(place[rows] >= 0)
        return pieces[np.argsort(place[rows[pieces]], kind="stable")], np.flatnonzero(place[rows] < 0)

    def _report(
        self,
        keys: npt.NDArray[np.uint64],
        labels: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        train: npt.NDArray[np.int64],
        held_out: npt.NDArray[np.int64],
    ) -> None:
        """Duplicates, leakage and rows far longer than the others."""
        accounting, writer = self._accounting, self._writer
        duplicates = count_duplicates(keys, labels)
        accounting.exact_duplicates, accounting.near_duplicates = duplicates.exact, duplicates.near
        pair = duplicates.first_exact or duplicates.first_near
        if pair is not None:
            accounting.first_duplicate = f"{writer.place(pair[0])}, like {writer.place(pair[1])}"
        outliers = length_outliers(lengths)
        accounting.outliers = len(outliers)
        if len(outliers):
            accounting.first_outlier = f"{writer.place(int(outliers[0]))}, {int(lengths[outliers[0]]):,} tokens"
        leaked = leaks(keys, labels, train, held_out)
        if leaked.rows and not self._config.evaluation.allow_leakage:
            raise DataError(
                f"{leaked.rows:,} of {len(held_out):,} held-out rows are also trained on ({leaked.exact:,} exactly, "
                f"{leaked.rows - leaked.exact:,} nearly); the first is here, like {writer.place(leaked.trained)}",
                place=writer.place(leaked.held_out),
                hint="take them out of one side, or set `evaluation.allow_leakage: true`",
            )
        accounting.leaked = leaked.rows


@dataclass
class _Opening:
    """A source of which the first rows have been looked at."""

    format: str
    conversations: list[Conversation]
    chunks: Iterator[Chunk]

    def tasks(self, source: int) -> Iterator[Task]:
        for number, chunk in enumerate(self.chunks):
            yield Task(source, chunk, first_of_source=number == 0)


def _ways(own: ChatTemplate) -> Iterator[tuple[AnswerFinder, str]]:
    yield AnswerFinder(own), own.origin
    training = training_version(own)
    if training is not None:
        why = "TRL's training version of it, because its own rewrites or leaves out what is to be learnt"
        yield AnswerFinder(training), f"{own.origin}; {why}"
    lenient = "it writes earlier turns differently from the last one, and so they are trained on"
    yield AnswerFinder(own, lenient=True), f"{own.origin}; {lenient}"
