"""Documents are dealt ahead, and nothing of that can be seen."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest

from jp_train.data.mixture import CarrySchedule, Mixture
from jp_train.data.sequence import (
    COLUMNS,
    EPOCH,
    LENGTH,
    NUMBER,
    SAMPLE,
    SOURCE,
    DocumentRules,
    PlanSource,
    SourceSequence,
)
from jp_train.data.stream import DocumentStream
from jp_train.errors import DataError
from jp_train.types import KINDS

LIMIT = 300
SOURCES = [
    PlanSource(
        name=f"{kind}{number}",
        kind=kind,
        tokens=np.random.default_rng([place, number]).integers(20, 400, 70 + number).astype(np.int32),
    )
    for place, kind in enumerate(KINDS)
    for number in range(2)
]
RULES = DocumentRules(seed=4, limit=LIMIT, cut_texts=False, drop=True, first_sentence=0.0, pad_dropout=0.0)
MIXTURE = Mixture(SOURCES, (2, 3, 5))


def make_stream(by_tokens: bool) -> DocumentStream:
    sequences = {index: SourceSequence(source, index, RULES) for index, source in enumerate(SOURCES)}
    return DocumentStream(sequences, lambda: CarrySchedule(MIXTURE), by_tokens=by_tokens)


def one_at_a_time(by_tokens: bool) -> Iterator[tuple[int, int, int, dict[str, object]]]:
    """(source, number, length, state after it) of every document: no look-ahead, a draw at a time."""
    sequences = [SourceSequence(source, index, RULES) for index, source in enumerate(SOURCES)]
    schedule, positions, dropped = CarrySchedule(MIXTURE), [0] * len(SOURCES), [0] * len(SOURCES)

    def draw(index: int) -> int:
        while not (documents := sequences[index].documents(np.array([positions[index]]))).size:
            positions[index] += 1
            dropped[index] += 1
        positions[index] += 1
        drawn[:] = documents[:, 0].tolist()
        return drawn[LENGTH]

    drawn: list[int] = []
    while True:
        (source,) = schedule.deal(
            1, {index: lambda index=index: draw(index) for index in range(len(SOURCES))} if by_tokens else None
        )
        if not by_tokens:
            draw(source)
        state = {"positions": list(positions), "dropped": list(dropped), "schedule": schedule.state()}
        yield drawn[SOURCE], drawn[NUMBER], drawn[LENGTH], json.loads(json.dumps(state))


@pytest.mark.parametrize("by_tokens", [False, True])
def test_documents_and_states_are_those_of_drawing_one_at_a_time(by_tokens: bool) -> None:
    stream, plain, draw = make_stream(by_tokens), one_at_a_time(by_tokens), random.Random(1)
    while stream.taken < 1500:
        count = draw.choice([1, 5, 40, 700])
        first, lengths = stream.taken, stream.take(count)
        expected = [next(plain) for _ in range(count)]
        table = stream.table(range(first, first + count))
        assert list(zip(table[SOURCE].tolist(), table[NUMBER].tolist(), lengths, strict=True)) == [
            item[:3] for item in expected
        ]
        if draw.random() < 0.5:
            assert json.loads(json.dumps(stream.state(len(SOURCES)))) == expected[-1][3]
        if draw.random() < 0.3:
            stream.forget(draw.randrange(first, stream.taken + 1))
    assert sum(stream.dropped().values()) > 100


@pytest.mark.parametrize("by_tokens", [False, True])
def test_a_restored_stream_goes_on_after_its_pool(by_tokens: bool) -> None:
    stream = make_stream(by_tokens)
    stream.take(1500)
    pool = [900, 1499, 1200]
    before = stream.table(pool)
    state = json.loads(json.dumps(stream.state(len(SOURCES))))
    other = make_stream(by_tokens)
    other.take(77)
    other.restore(state, 0, before[[SOURCE, NUMBER]].T.tolist())
    assert (other.table([0, 1, 2]) == before).all() and other.taken == 3
    assert other.state(len(SOURCES)) == stream.state(len(SOURCES))
    assert other.take(1100) == stream.take(1100)
    assert (other.table(range(3, 1103)) == stream.table(range(1500, 2600))).all()


def test_an_empty_pool_restores_and_one_with_a_dropped_document_is_refused() -> None:
    stream = make_stream(False)
    state = stream.state(len(SOURCES))
    stream.restore(state, 0, [])
    too_long = SourceSequence(SOURCES[0], 0, RULES)
    number = next(number for number in range(70) if too_long.documents(np.array([number])).shape == (len(COLUMNS), 0))
    with pytest.raises(DataError, match="pool names documents that are never drawn"):
        stream.restore(state, 0, [[0, number]])


def test_lengths_looked_at_ahead_are_those_then_taken_and_epochs_go_on() -> None:
    sequence = SourceSequence(SOURCES[1], 1, RULES)
    looked = sequence.lengths()
    ahead = [next(looked) for _ in range(5000)]
    taken = np.concatenate([sequence.take(count) for count in (1, 1999, 0, 3000)], axis=1)
    assert taken[LENGTH].tolist() == ahead
    assert taken[EPOCH].max() > 50 and (SOURCES[1].tokens[taken[SAMPLE]] == taken[LENGTH]).all()
