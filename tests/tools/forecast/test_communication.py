"""Bytes of a step and its time, worked out by hand for a model of two parameters."""

from dataclasses import replace

import pytest

from jp_train.errors import ConfigError
from jp_train.tools.forecast.communication import Leg, communication
from jp_train.tools.forecast.gathering import Replay, Traffic
from jp_train.tools.forecast.hardware import PRESETS, hardware
from jp_train.tools.forecast.memory import Setting
from jp_train.tools.forecast.shapes import Parameter, Shapes
from jp_train.tools.forecast.timing import leg_seconds

SETTING = Setting(
    world=16, size=2, checkpointing=True, hpz=1, reduce_bucket=1000, prefetch=0, max_live=10**9, max_reuse=0,
    persistent=0, chunk=64
)  # fmt: skip
PARAMETERS = (
    Parameter("a.weight", "a", "language_model", 3000, True),
    Parameter("b.weight", "b", "vision_model", 1000, False),
)
SHAPES = Shapes(
    width=8, intermediate=8, layers=1, heads=1, vocabulary=8, vision_width=8, vision_intermediate=8, vision_layers=1,
    vision_heads=1, image_size=16,
    slots=1, codebook=8, code_width=8, vq_base_channels=8, vq_parameters=0, learns=frozenset({"language_model"}),
    parameters=PARAMETERS,
)  # fmt: skip
REPLAYED = Replay(
    levels=[], forward=Traffic(elements=4000, fresh=3000, calls=2), backward=Traffic(elements=3000, fresh=0, calls=1)
)


def test_every_micro_batch_gathers_forward_and_backward_and_scatters_fp32_gradients_of_what_is_trained():
    found = communication(SHAPES, REPLAYED, SETTING, nodes=2, micro_batches=4)
    assert (found.forward.over_all, found.backward.over_all, found.reduce.over_all) == (8000, 6000, 12000)
    assert found.reduce.calls == 3
    assert found.between == 4 * (8000 + 6000 + 12000) / 2  # a node has the half of everything
    assert found.inside == 4 * 26000 * 15 / 16


def test_hpz_fetches_trained_parameters_from_all_nodes_once_a_step_and_frozen_ones_never():
    found = communication(SHAPES, REPLAYED, replace(SETTING, hpz=8), nodes=2, micro_batches=4)
    assert 4 * found.forward.over_all == pytest.approx(6000)
    assert 4 * found.forward.in_node == pytest.approx(4 * 8000 - 6000)
    assert (found.backward.over_all, found.backward.in_node) == (0, 6000)
    assert found.between == pytest.approx((6000 + 4 * 12000) / 2)


def test_one_rank_sends_nothing():
    nothing = Replay(levels=[], forward=Traffic(), backward=Traffic())
    found = communication(SHAPES, nothing, replace(SETTING, world=1), nodes=1, micro_batches=1)
    assert (found.between, found.inside, found.reduce.calls) == (0, 0, 0)


def test_a_legs_time_is_that_of_its_slowest_links_and_of_its_calls():
    given = replace(
        PRESETS["a100-40gb"], inter_gbs=100.0, intra_gbs=200.0, link_efficiency=0.5, latency_us=10.0, hop_us=5.0
    )
    seconds = leg_seconds(Leg(over_all=1e9, in_node=0.0, calls=4), given, SETTING, nodes=2)
    assert seconds["between"] == pytest.approx(0.5e9 / 50e9)
    assert seconds["inside"] == 0  # 7/8 of 1e9 bytes at 100 GB/s take 8.75 ms, less than the 10 ms between the nodes
    assert seconds["latency"] == pytest.approx(4 * 15e-6)
    own = leg_seconds(Leg(over_all=0.0, in_node=1e9, calls=0), given, replace(SETTING, hpz=8), nodes=2)
    assert own["inside"] == pytest.approx(0.875e9 / 100e9)
    assert own["between"] == 0


def test_figures_of_the_hardware_can_be_overridden_and_wrong_ones_are_refused():
    assert hardware("h100", ["inter_gbs=50", "nccl_gib=0"]) == replace(PRESETS["h100"], inter_gbs=50.0, nccl_gib=0.0)
    for gpu, figures, said in (
        ("a100", [], "a100-40gb"),
        ("h100", ["inter_gb=50"], "did you mean 'inter_gbs'"),
        ("h100", ["inter_gbs=fast"], "positive number"),
        ("h100", ["inter_gbs=-1"], "positive number"),
        ("h100", ["achievable=1.5"], "at most 1"),
        ("h100", ["gpu=2"], "no such figure"),
    ):
        with pytest.raises(ConfigError, match=said):
            hardware(gpu, figures)
