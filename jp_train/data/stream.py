"""The documents of a stage in the order in which they are dealt: the schedule's turns, each with the next document of
its source.

That order does not depend on the rows (only a change of phase waits for them), so documents are made far ahead, in
blocks of numpy arrays, and the packer takes lengths off a list. Documents that are made ahead are not part of the
state: positions, dropped documents and deficits are those of the documents that were taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jp_train.data.mixture import CarrySchedule, SampledSchedule
from jp_train.data.sequence import COLUMNS, LENGTH, NUMBER, SOURCE, SourceSequence
from jp_train.errors import DataError


class DocumentStream:
    """Deals documents, by running number; `table(numbers)` describes them. `taken`: how many were dealt, the number of
    the next one.

    `sequences`: of the sources in use, by index; `make_schedule` makes two, one that deals ahead and one that is
    charged with what was taken. `by_tokens`: a document counts its length, not 1.
    """

    _BLOCK = 1024

    def __init__(
        self,
        sequences: Mapping[int, SourceSequence],
        make_schedule: Callable[[], CarrySchedule | SampledSchedule],
        *,
        by_tokens: bool,
    ) -> None:
        self._sequences, self._by_tokens = sequences, by_tokens
        self._ahead, self._schedule = make_schedule(), make_schedule()
        self._positions = np.zeros(max(sequences) + 1, np.int64)
        self._dropped = np.zeros_like(self._positions)
        self._begin(np.empty((len(COLUMNS), 0), np.int64))

    def _begin(self, documents: np.ndarray) -> None:
        """Number anew: `documents` are known, none is made ahead."""
        self._table, self._first = documents, 0
        self._lengths: list[int] = []  # of what is made and not settled
        self._settled = documents.shape[1]  # documents counted in positions, dropped and schedule
        self._at = 0

    @property
    def taken(self) -> int:
        return self._settled + self._at

    def take(self, count: int) -> list[int]:
        """The lengths of the next `count` documents."""
        end = self._at + count
        while end > len(self._lengths):
            self._make_block()
            end = self._at + count
        lengths = self._lengths[self._at : end]
        self._at = end
        return lengths

    def table(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The documents of these numbers, int64 [8, N] (see `sequence.COLUMNS`)."""
        return self._table[:, np.asarray(numbers, np.int64) - self._first]

    def source(self, number: int) -> int:
        """The source of one document."""
        return int(self._table[SOURCE, number - self._first])

    def forget(self, before: int) -> None:
        """Numbers below `before` are not needed again. They are dropped in blocks, so that most steps of a few rows do
        no work for it."""
        if before - self._first < self._BLOCK:
            return
        self._settle()
        self._table = self._table[:, before - self._first :]
        self._first = before

    def _make_block(self) -> None:
        self._settle()
        costs = (
            {index: sequence.lengths().__next__ for index, sequence in self._sequences.items()}
            if self._by_tokens
            else None
        )
        sources = np.array(self._ahead.deal(self._BLOCK, costs))
        block = np.empty((len(COLUMNS), self._BLOCK), np.int64)
        counts = np.bincount(sources).tolist()
        block[:, np.argsort(sources, kind="stable")] = np.concatenate(
            [self._sequences[index].take(count) for index, count in enumerate(counts) if count], axis=1
        )
        self._table = np.concatenate((self._table, block), axis=1)
        self._lengths += block[LENGTH].tolist()

    def _settle(self) -> None:
        """Count what was taken since the last time."""
        first = self._settled - self._first
        taken = self._table[:, first : first + self._at]
        sources = taken[SOURCE]
        counts, before = np.bincount(sources, minlength=len(self._positions)), self._positions.copy()
        np.maximum.at(self._positions, sources, taken[NUMBER] + 1)
        self._dropped += self._positions - before - counts
        if self._by_tokens:
            counts = np.zeros_like(before)
            np.add.at(counts, sources, taken[LENGTH])
        self._schedule.charge(dict(enumerate(counts.tolist())))
        del self._lengths[: self._at]
        self._settled, self._at = self._settled + self._at, 0

    def dropped(self) -> dict[int, int]:
        """Documents passed over because they are too long, by source."""
        self._settle()
        return {index: int(self._dropped[index]) for index in self._sequences}

    def enter_phase(self, phase: int, unplaced: np.ndarray, kinds: Sequence[int]) -> None:
        """Go on with the sources of another phase. `unplaced` [8, N]: documents that were taken and never come into
        a row, of `kinds`."""
        self._settle()
        for kind, length in zip(kinds, unplaced[LENGTH].tolist(), strict=True):
            self._schedule.refund(kind, length if self._by_tokens else 1)
        self._schedule.enter(phase)
        self._ahead.enter(phase)
        self._rewind()
        self._table, self._lengths = self._table[:, : self._settled - self._first], []

    def _rewind(self) -> None:
        """Forget what is made ahead."""
        self._ahead.restore(self._schedule.state())
        for index, sequence in self._sequences.items():
            sequence.restore(int(self._positions[index]))

    def state(self, sources: int) -> dict[str, Any]:
        """JSON-able; lists of `sources` numbers, with position -1 for a source that is not in use."""
        self._settle()
        used = [index in self._sequences for index in range(sources)]
        return {
            "positions": [int(self._positions[index]) if use else -1 for index, use in enumerate(used)],
            "dropped": [int(self._dropped[index]) if use else 0 for index, use in enumerate(used)],
            "schedule": self._schedule.state(),
        }

    def restore(self, state: Mapping[str, Any], phase: int, pool: Sequence[Sequence[int]]) -> None:
        """Continue from `state()` in a phase; documents 0, 1, ... are those of the `pool`, [source, draw number] each.

        Raises:
            DataError: if a document of the pool is not one that its source draws.
        """
        for index in self._sequences:
            self._positions[index], self._dropped[index] = state["positions"][index], state["dropped"][index]
        self._schedule.enter(phase)
        self._schedule.restore(state["schedule"])
        self._ahead.enter(phase)
        self._rewind()
        owners, numbers = np.array(pool, np.int64).reshape(-1, 2).T
        documents = np.empty((len(COLUMNS), len(owners)), np.int64)
        for index in np.unique(owners).tolist():
            documents_of_source = self._sequences[index].documents(numbers[owners == index])
            if documents_of_source.shape[1] != np.count_nonzero(owners == index):
                raise DataError(
                    "the plan state is damaged: its pool names documents that are never drawn. Resume from another "
                    "checkpoint"
                )
            documents[:, owners == index] = documents_of_source
        self._begin(documents)
