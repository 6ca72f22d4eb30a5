"""The endless sequence of one source: which sample comes n-th, how long it is as a document, and what was drawn for it.

Each epoch has its own permutation of the samples (permute.py), so the whole state is the number of the next draw.
Everything here is computed from lengths in blocks of numpy arrays; nothing reads a sample. A document in planning is a
column of numbers (`COLUMNS`); the RowSpecs that leave the plan are made of them in bulk, and only for the rows that are
needed.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import numpy as np

from jp_train.data.permute import document_uniform_many, name_key, permute_many
from jp_train.errors import DataError
from jp_train.types import DocumentRef, Kind, RowSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSource:
    """A source as the plan sees it: names, numbers and lengths.

    tokens: int32 [N], each sample's length as a document. short_tokens: int32 [N], its length with the first-sentence
    caption, or None where that does not apply. dropped_tokens: int32 [N], its length when pad dropout takes the
    condition away, or None when the form of the dropout keeps the length. min_tokens: int32 [N] or one number for all,
    the length below which a sample cannot be truncated (its image and markers); 0 means that it always can be.
    first_entry: int64 [N + 1], where samples have several captions, of which every epoch draws one: entries
    first_entry[n] to first_entry[n + 1] of the other arrays are those of sample n; None for one entry each.
    images: int32 [N], how many each sample has, or None where each has one (or is text); for statistics only.
    cuttable: text, which may continue in the next row.
    """

    name: str
    kind: Kind
    tokens: np.ndarray
    short_tokens: np.ndarray | None = None
    dropped_tokens: np.ndarray | None = None
    min_tokens: np.ndarray | int = 0
    images: np.ndarray | None = None
    first_entry: np.ndarray | None = None
    weight: float = 1.0
    from_step: int = 0
    to_step: int | None = None
    cuttable: bool = False

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that decide the plan, where present, by field name."""
        named = {
            "tokens": self.tokens,
            "short_tokens": self.short_tokens,
            "dropped_tokens": self.dropped_tokens,
            "min_tokens": self.min_tokens,
            "first_entry": self.first_entry,
        }
        return {name: np.atleast_1d(array) for name, array in named.items() if array is not None}

    @property
    def samples(self) -> int:
        """N."""
        return len(self.tokens) if self.first_entry is None else len(self.first_entry) - 1

    def check(self) -> None:
        """Raises DataError if the source is empty, or its arrays disagree in size or hold a length below 1."""
        size = len(self.tokens)
        if not size:
            raise DataError(
                f"source {self.name!r} has no samples. Check its `shards`, run `jp-train data index`, or remove it "
                "from data.sources"
            )
        for name, array in self.arrays().items():
            if name == "first_entry":
                continue
            if array.shape not in ((size,), (1,) if name == "min_tokens" else (size,)):
                raise DataError(
                    f"source {self.name!r}: {name} has shape {array.shape}, tokens has {size} entries. Rebuild the "
                    "index"
                )
            if array.min() < (0 if name == "min_tokens" else 1):
                raise DataError(
                    f"source {self.name!r}: sample {int(array.argmin())} has {name} {int(array.min())}, expected at "
                    "least 1. Rebuild the index"
                )

    def quartile(self) -> int:
        """A quarter of the samples have at most this many tokens."""
        middle = (len(self.tokens) - 1) // 4
        return int(np.partition(self.tokens, middle)[middle])

    def fingerprint(self) -> str:
        """16 hex digits of the lengths, however they are stored (list, memory map, any integer type)."""
        digest = hashlib.blake2b(digest_size=8)
        for name, array in self.arrays().items():
            digest.update(f"{name} {len(array)};".encode())
            digest.update(np.ascontiguousarray(array, dtype="<i8").data)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRules:
    """How a sample becomes a document of a certain length. `limit`: tokens a document may have, texts that are cut
    into spans (`cut_texts`) excepted; `drop`: a longer one is passed over, instead of truncated."""

    seed: int
    limit: int
    cut_texts: bool
    drop: bool
    first_sentence: float
    pad_dropout: float


LENGTH, NUMBER, SOURCE, EPOCH, SAMPLE, START, SHORT_CAPTION, TRUNCATED = range(8)
COLUMNS = ("length", "number", "source", "epoch", "sample", "start", "short_caption", "truncated")
"""Documents in planning are columns of an int64 table [8, N], with these rows: the `number`-th draw of source number
`source`, as a whole (`start` 0) or as the span of it that a row takes. The other fields are those of DocumentRef."""


class SourceSequence:
    """The endless sequence of one source's usable documents; `index` is the source's place in the recipe.

    Draws are made in blocks, for speed only: document `number` does not depend on where a block begins.

    Raises:
        DataError: if no sample of the source can be used within `rules.limit`.
    """

    _BLOCK = 2048

    def __init__(self, source: PlanSource, index: int, rules: DocumentRules) -> None:
        self._source, self._index, self._rules = source, index, rules
        self._key = (rules.seed, name_key(source.name))
        self._short_tokens = source.short_tokens if rules.first_sentence > 0 else None
        self._dropped_tokens = source.dropped_tokens if rules.pad_dropout > 0 else None
        self._uncut = rules.cut_texts and source.cuttable
        self.restore(0)

    def restore(self, position: int) -> None:
        """Continue with draw number `position`."""
        self._drawn, self._next = np.empty((len(COLUMNS), 0), np.int64), position

    def take(self, count: int) -> np.ndarray:
        """The next `count` usable documents, int64 [8, count]."""
        while self._drawn.shape[1] < count:
            self._draw_block()
        taken, self._drawn = self._drawn[:, :count], self._drawn[:, count:]
        return taken

    def lengths(self) -> Iterator[int]:
        """The lengths of the documents that `take` returns next, endless. Valid until the next `take`."""
        seen = 0
        while True:
            while self._drawn.shape[1] == seen:
                self._draw_block()
            yield from self._drawn[LENGTH, seen:].tolist()
            seen = self._drawn.shape[1]

    def _draw_block(self) -> None:
        block = self.documents(np.arange(self._next, self._next + self._BLOCK))
        self._next += self._BLOCK
        self._drawn = np.concatenate((self._drawn, block), axis=1)

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """The usable documents among the draws `numbers`, int64 [N], as int64 [8, U]."""
        lengths, numbers, epochs, samples, short, truncated = self.columns(numbers)
        table = np.zeros((len(COLUMNS), len(lengths)), np.int64)
        table[LENGTH], table[NUMBER], table[SOURCE], table[EPOCH], table[SAMPLE] = (
            lengths,
            numbers,
            self._index,
            epochs,
            samples,
        )
        table[SHORT_CAPTION], table[TRUNCATED] = short, truncated
        return table

    def columns(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """The usable documents among the draws `numbers`, int64 [N], as arrays [U]: lengths in rows, numbers,
        epochs, samples, whether the caption is short, tokens truncated."""
        source, rules = self._source, self._rules
        size = source.samples
        samples = permute_many(self._key, numbers, size)
        epochs = numbers // size
        entries = samples if source.first_entry is None else self._entries(epochs, samples)
        lengths = np.asarray(source.tokens[entries], np.int64)
        short = np.zeros(len(numbers), bool)
        if self._short_tokens is not None:
            short = (
                document_uniform_many(rules.seed, source.name, epochs, samples, "first_sentence") < rules.first_sentence
            )
            lengths = np.where(short, self._short_tokens[entries], lengths)
        if self._dropped_tokens is not None:
            dropout = document_uniform_many(rules.seed, source.name, epochs, samples, "pad_dropout") < rules.pad_dropout
            lengths = np.where(dropout, self._dropped_tokens[entries], lengths)
        minimum = np.asarray(source.min_tokens)
        minimum = minimum[entries] if minimum.ndim else minimum
        usable, lengths, truncated = self._fit(lengths, minimum)
        columns = (lengths, numbers, epochs, samples, short, truncated)
        return columns if usable.all() else tuple(column[usable] for column in columns)

    def _entries(self, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The entry of each sample that its epoch draws (as `Encoder.variant` does for one)."""
        first = self._source.first_entry
        assert first is not None
        drawn = document_uniform_many(self._rules.seed, self._source.name, epochs, samples, "variant")
        return first[samples] + (drawn * (first[samples + 1] - first[samples])).astype(np.int64)

    def _fit(self, lengths: np.ndarray, minimum: np.ndarray | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which documents can be used, their lengths in rows, and how many tokens each loses for it."""
        if self._uncut:
            return np.ones(len(lengths), bool), lengths, np.zeros_like(lengths)
        limit = self._rules.limit
        usable = lengths <= limit
        if not self._rules.drop:
            usable = usable | (np.asarray(minimum) <= limit)
        return usable, np.minimum(lengths, limit), np.maximum(lengths - limit, 0)

    def check_usable(self) -> None:
        """Raises DataError if every sample is too long in every form that can be drawn: the sequence would be empty."""
        drawn = (self._source.tokens, self._short_tokens, self._dropped_tokens)
        forms = [form for form in drawn if form is not None]
        if not any(self._fit(np.asarray(form), self._source.min_tokens)[0].any() for form in forms):
            shortest = min(int(form.min()) for form in forms)
            raise DataError(
                f"source {self._source.name!r}: none of its {self._source.samples} samples can be used: the "
                f"shortest has {shortest} tokens, a document may have {self._rules.limit} (data.seq_len, "
                "stage.samples_per_row), and data.over_long is "
                f"{'drop' if self._rules.drop else 'truncate, but images cannot be cut'}. Raise data.seq_len or "
                "remove the source"
            )

    def mean_length(self) -> tuple[int, int]:
        """(sum, count) of the lengths in rows of the samples as they are with their whole text; exact integers."""
        usable, lengths, _ = self._fit(np.asarray(self._source.tokens, np.int64), self._source.min_tokens)
        return (int(lengths[usable].sum()), int(usable.sum())) if usable.any() else (1, 1)


_new = object.__new__
_REF_SETTERS = {row: getattr(DocumentRef, name).__set__ for row, name in enumerate(COLUMNS) if name != "number"}
_set_step, _set_row, _set_documents = (getattr(RowSpec, name).__set__ for name in ("step", "row", "documents"))


def row_specs(step: int, first: int, documents: np.ndarray, counts: Sequence[int]) -> list[RowSpec]:
    """Rows `first`, `first` + 1, ... of a step as RowSpecs: `documents` int64 [8, D] are those of all of them in order,
    `counts` how many each has.

    Filled column by column: the constructor of a frozen dataclass takes 1.8 us a call, more than all other planning of
    a document.
    """
    refs = list(map(_new, repeat(DocumentRef, documents.shape[1])))
    for row, set_field in _REF_SETTERS.items():
        column = documents[row].astype(bool) if row == SHORT_CAPTION else documents[row]
        _run(map(set_field, refs, column.tolist()))
    specs = list(map(_new, repeat(RowSpec, len(counts))))
    rest = iter(refs)
    _run(map(_set_step, specs, repeat(step)))
    _run(map(_set_row, specs, range(first, first + len(counts))))
    _run(map(_set_documents, specs, [tuple(islice(rest, count)) for count in counts]))
    return specs


def _run(calls: Iterable[Any]) -> None:
    deque(calls, maxlen=0)
