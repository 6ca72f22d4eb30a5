"""Permutations and uniform numbers are pure functions of integers and names, the same everywhere."""

from __future__ import annotations

import random
from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest

from jp_train.data.permute import document_uniform, document_uniform_many, fold_key, name_key, permute, permute_many

GOLDEN_KEY = 9941854307267098285
GOLDEN_ORDER = [2, 8, 3, 4, 7, 0, 6, 5, 1, 9]
GOLDEN_SAMPLE = 31788098
GOLDEN_UNIFORM = 0.1995552638985093


@pytest.mark.parametrize("size", [*range(1, 40), 100, 1023, 1024, 1025, 4999])
def test_every_size_is_permuted_completely(size: int) -> None:
    assert sorted(permute((7, name_key("a"), size), index, size) for index in range(size)) == list(range(size))


def test_the_batch_form_equals_the_scalar_form_across_epochs() -> None:
    draw = random.Random(0)
    # few epochs are tabled
    for size, epochs in product((1, 2, 3, 10, 1000, 4099, 16_000_000, 72_000_000, 10**12 + 7), (1, 3, 9)):
        first = draw.randrange(1000)
        numbers = np.array([draw.randrange(first * size, (first + epochs) * size) for _ in range(200)])
        key = (draw.getrandbits(80), -draw.getrandbits(30))
        expected = [permute((*key, int(number) // size), int(number) % size, size) for number in numbers]
        assert permute_many(key, numbers, size).tolist() == expected
    assert permute_many((1,), np.arange(0), 5).tolist() == []


def test_each_epoch_of_the_endless_sequence_visits_every_sample_once_in_another_order() -> None:
    epochs = permute_many((3, 4), np.arange(5 * 37), 37).reshape(5, 37).tolist()
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_all_orders_of_five_samples_are_about_equally_likely() -> None:
    """Chi-square over the 120 orders, 119 degrees of freedom: 172.7 is the 0.1% point."""
    draws = 12_000
    orders = permute_many((9,), np.arange(5 * draws), 5).reshape(draws, 5)
    counts = Counter(map(tuple, orders.tolist()))
    statistic = sum((counts[order] - draws / 120) ** 2 / (draws / 120) for order in permutations(range(5)))
    assert statistic < 172.7


def test_neighbours_in_the_order_are_not_neighbours_in_the_source() -> None:
    order = permute_many((1, 2), np.arange(100_000), 100_000)
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_values_are_those_of_every_other_platform() -> None:
    """Literal values: if these change, every run's data order changes and no checkpoint can be continued."""
    assert fold_key((1, -2, 2**70)) == GOLDEN_KEY
    assert [permute((42, name_key("laion"), 0), index, 10) for index in range(10)] == GOLDEN_ORDER
    assert permute((42, name_key("laion"), 3), 123_456, 72_000_000) == GOLDEN_SAMPLE
    assert document_uniform(42, "laion", 3, 123_456, "pad_dropout") == GOLDEN_UNIFORM


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 3), (3, 3)])
def test_an_index_outside_the_permutation_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="0 <= index < size"):
        permute((0,), index, size)


def test_uniforms_of_the_batch_form_are_bit_for_bit_the_scalar_ones() -> None:
    epochs, samples = np.arange(50), np.arange(50) * 10**9
    expected = [document_uniform(-1, "süß", int(e), int(s), "crop") for e, s in zip(epochs, samples, strict=True)]
    assert document_uniform_many(-1, "süß", epochs, samples, "crop").tolist() == expected


def test_uniforms_are_uniform_and_independent_between_purposes_sources_and_epochs() -> None:
    samples = np.arange(50_000)
    zeros = np.zeros_like(samples)
    streams = [
        document_uniform_many(0, "a", zeros, samples, "pad_dropout"),
        document_uniform_many(0, "a", zeros, samples, "first_sentence"),
        document_uniform_many(0, "b", zeros, samples, "pad_dropout"),
        document_uniform_many(0, "a", zeros + 1, samples, "pad_dropout"),
        document_uniform_many(1, "a", zeros, samples, "pad_dropout"),
    ]
    for stream in streams:
        assert stream.min() >= 0 and stream.max() < 1
        occupied, _ = np.histogram(stream, bins=10, range=(0, 1))
        assert ((occupied - 5000) ** 2 / 5000).sum() < 27.9  # 9 degrees of freedom, 0.1% point
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 0.02
