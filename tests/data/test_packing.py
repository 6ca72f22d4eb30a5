"""A row is filled as well as the pool allows, images stay whole, and the oldest document goes first."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import pytest

from jp_train.data.packing import Layout, best_subset, minimum_piece, pack_samples, pack_tokens


def which(*cuttable: bool) -> Callable[[int], bool]:
    return cuttable.__getitem__


def subsets(lengths: list[int], capacity: int) -> list[tuple[int, ...]]:
    positions = range(len(lengths))
    every = (chosen for count in range(len(lengths) + 1) for chosen in combinations(positions, count))
    return [chosen for chosen in every if sum(lengths[position] for position in chosen) <= capacity]


def test_the_best_subset_equals_brute_force_and_breaks_ties_by_the_earliest_last_member() -> None:
    draw = random.Random(0)
    for _ in range(400):
        lengths = [draw.randrange(1, 60) for _ in range(draw.randrange(0, 10))]
        capacity = draw.randrange(0, 150)
        chosen, gap = best_subset(lengths, capacity)
        feasible = subsets(lengths, capacity)
        best = max(sum(lengths[position] for position in subset) for subset in feasible)
        assert sum(lengths[position] for position in chosen) == best == capacity - gap
        assert chosen == sorted(set(chosen))
        assert best_subset([7, 1, *lengths], capacity, 2) == ([position + 2 for position in chosen], gap)
        ties = [subset for subset in feasible if sum(lengths[position] for position in subset) == best]
        assert max(chosen, default=-1) == min(max(subset, default=-1) for subset in ties)


def test_rows_written_by_hand() -> None:
    whole = which(*[False] * 4)
    assert pack_tokens([50, 30, 20, 50], whole, 100, tail=False) == Layout([0, 1, 2])
    assert pack_tokens([60, 50, 30, 41], whole, 100, tail=False) == Layout([0, 2])
    assert pack_tokens([60, 50, 30, 39], whole, 100, tail=False) == Layout([0, 3])
    # A gap of 10: the text at 1 is cut to fill it; the picture documents at 2 and 3 never are.
    assert pack_tokens([60, 50, 30, 41], which(False, True, False, False), 100, tail=False) == Layout([0, 2], 1, 10)
    assert pack_tokens([60, 50, 30, 41], which(False, False, False, True), 100, tail=False) == Layout([0, 2], 3, 10)
    # A text longer than the row takes all of it; a tail comes first and the oldest after it.
    assert pack_tokens([250, 30], which(True, False), 100, tail=False) == Layout([], 0, 100)
    assert pack_tokens([50, 30, 20, 50], which(True, False, False, False), 100, tail=True) == Layout([0, 1, 2])
    # Not less than two tokens are left over for the next row.
    assert pack_tokens([101], which(True), 100, tail=False) == Layout([], 0, 99)


def test_a_new_text_is_not_cut_after_a_tail_that_kept_the_oldest_out() -> None:
    lengths, texts = [40, 80, 50, 90], which(True, False, False, True)
    assert pack_tokens(lengths, texts, 100, tail=True) == Layout([0, 2])
    assert pack_tokens(lengths, which(True, True, False, True), 100, tail=True) == Layout([0, 2], 1, 10)
    assert pack_tokens(lengths, texts, 100, tail=False) == Layout([0, 2], 3, 10)


def test_random_rows_obey_the_rules() -> None:
    draw = random.Random(1)
    for _ in range(3000):
        seq_len = draw.choice([16, 64, 1024])
        piece = minimum_piece(seq_len)
        cuttable = [draw.random() < 0.4 for _ in range(draw.randrange(1, 12))]
        lengths = [draw.randrange(1, 3 * seq_len if cut else seq_len + 1) for cut in cuttable]
        tail = cuttable[0] and draw.random() < 0.5
        layout = pack_tokens(lengths, which(*cuttable), seq_len, tail=tail)
        used = sum(lengths[position] for position in layout.whole) + layout.cut_length
        assert 0 < used <= seq_len
        assert 0 in layout.whole or layout.cut == 0, "the oldest is always taken"
        assert layout.whole == sorted(set(layout.whole))
        if layout.cut >= 0:
            assert cuttable[layout.cut] and layout.cut not in layout.whole
            assert piece <= lengths[layout.cut] - layout.cut_length, "the tail is a useful piece"
            assert layout.cut_length >= piece
        rest = [
            length for position, length in enumerate(lengths) if position not in layout.whole and position != layout.cut
        ]
        assert not rest or layout.cut == 0 or min(rest) > seq_len - used, "whatever still fits is taken"


def test_samples_rows_equal_brute_force_in_age_order() -> None:
    draw = random.Random(2)
    for _ in range(600):
        count = draw.randrange(1, 5)
        lengths = [draw.randrange(1, 60) for _ in range(draw.randrange(1, 9))]
        seq_len = draw.randrange(20, 150)
        feasible = [subset for subset in subsets(lengths, seq_len) if len(subset) == count]
        layout = pack_samples(lengths, seq_len, count)
        assert layout == (Layout(list(min(feasible))) if feasible else None)


@pytest.mark.parametrize(("seq_len", "piece"), [(4096, 16), (512, 2), (16, 2)])
def test_the_smallest_piece_is_a_256th_of_the_row(seq_len: int, piece: int) -> None:
    assert minimum_piece(seq_len) == piece
