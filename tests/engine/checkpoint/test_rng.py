"""Random states that a checkpoint carries."""

from __future__ import annotations

import random

import numpy as np
import torch

from jp_train.engine.checkpoint.rng import derive_rng, restore_rng, rng_tensors
from tests.engine.checkpoint.test_store import loaded, save, store


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), float(torch.rand(1))]


def test_every_generator_goes_on_where_it_was() -> None:
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second value for the next call
    saved = dict(rng_tensors())
    expected = draw()
    restore_rng(saved)
    assert draw() == expected


def test_a_derived_state_depends_on_its_parts_alone() -> None:
    draws = []
    for parts in ((1, 100, 3), (1, 100, 3), (1, 100, 2), (2, 100, 3)):
        derive_rng(*parts)
        draws.append(tuple(draw()))
    assert draws[0] == draws[1] and len(set(draws)) == 3


def test_random_states_come_back_and_those_of_a_new_rank_are_derived(tmp_path):
    made = store(tmp_path)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second value for the next call
    save(made, 100)

    expected = draw()
    loaded(made, made.newest())
    assert draw() == expected
    joined = []
    for seed in (1, 2):
        random.seed(seed), torch.manual_seed(seed), np.random.seed(seed)
        new_rank = store(tmp_path)
        checkpoint = new_rank.newest()
        new_rank._group.rank = 3  # a rank that the checkpoint of one rank does not know
        new_rank.load(checkpoint, lambda reader: None)
        joined.append(draw())
    assert joined[0] == joined[1] != expected
