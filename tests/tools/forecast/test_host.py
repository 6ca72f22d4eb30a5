"""Python's share of a pass, worked out by hand for a model of two layers."""

from dataclasses import replace

import pytest

from jp_train.tools.forecast.gathering import Replay, Traffic
from jp_train.tools.forecast.host import GATHER_US, LAYER_US, REDUCE_US, VISIT_US, host_time
from jp_train.tools.forecast.walk import BACKWARD, FORWARD, Visit
from tests.tools.forecast.test_communication import SETTING, SHAPES

VISITS = [Visit(path, FORWARD, 0) for path in "abc"] + [Visit(path, BACKWARD, 0) for path in "ba"]
REPLAYED = Replay(levels=[], forward=Traffic(together=3), backward=Traffic(together=2))
ONE_RANK = replace(SETTING, world=1, checkpointing=False)


def test_a_pass_costs_its_visits_and_its_layers_and_recomputing_them():
    for checkpointing in (False, True):
        setting = replace(ONE_RANK, checkpointing=checkpointing)
        found = host_time(SHAPES, VISITS, REPLAYED, setting, micro_batches=1, speed=1.0)
        forward, backward = LAYER_US[checkpointing]
        assert found.forward == pytest.approx(1e-6 * (3 * VISIT_US + 2 * forward)), (
            "a vision layer and a language layer"
        )
        assert found.backward == pytest.approx(1e-6 * (2 * VISIT_US + backward)), "the tower does not learn"


def test_a_core_twice_as_fast_takes_half_the_time():
    slow = host_time(SHAPES, VISITS, REPLAYED, SETTING, micro_batches=1, speed=1.0)
    fast = host_time(SHAPES, VISITS, REPLAYED, SETTING, micro_batches=1, speed=2.0)
    assert (fast.forward, fast.backward) == pytest.approx((slow.forward / 2, slow.backward / 2))


def test_every_rank_adds_to_what_is_gathered_together_and_to_every_trained_gradient():
    alone = host_time(SHAPES, VISITS, REPLAYED, replace(SETTING, world=1), micro_batches=1, speed=1.0)
    many = host_time(SHAPES, VISITS, REPLAYED, SETTING, micro_batches=1, speed=1.0)
    assert 1e6 * (many.forward - alone.forward) == pytest.approx(16 * 3 * GATHER_US)
    assert 1e6 * (many.backward - alone.backward) == pytest.approx(16 * (2 * GATHER_US + REDUCE_US))


def test_with_hpz_a_step_gathers_slices_of_all_ranks_once_and_of_a_node_otherwise():
    alone = host_time(SHAPES, VISITS, REPLAYED, replace(SETTING, world=1), micro_batches=4, speed=1.0)
    found = host_time(SHAPES, VISITS, REPLAYED, replace(SETTING, hpz=4), micro_batches=4, speed=1.0)
    assert 1e6 * (found.forward - alone.forward) == pytest.approx((16 + 3 * 4) / 4 * 3 * GATHER_US)
    assert 1e6 * (found.backward - alone.backward) == pytest.approx(4 * 2 * GATHER_US + 16 * REDUCE_US)
