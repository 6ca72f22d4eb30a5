"""Variants that would make a run faster, each against a forecast made anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from jp_train.config import RunConfig, load_config
from jp_train.tools.forecast.advice import LEAST_GAIN, Advice, advice
from jp_train.tools.forecast.candidates import Cluster, candidates, evaluate, is_configured, with_setting
from jp_train.tools.forecast.hardware import hardware
from jp_train.tools.forecast.shapes import shapes_of

STAGE = Path(__file__).resolve().parents[3] / "launch" / "janus_pro_1b_stage2.yaml"
CLUSTER = Cluster(world=128, nodes=16)


def advised(cfg: RunConfig, cluster: Cluster = CLUSTER) -> list[Advice]:
    shapes, given = shapes_of(cfg), hardware("a100-40gb")
    return advice(cfg, cluster, given, candidates(cfg, cluster, given, shapes), shapes)


def test_a_poor_setting_is_advised_to_become_the_best_with_the_gain_of_the_change() -> None:
    cfg = with_setting(load_config(STAGE), rows=1, checkpointing=True, hpz=1)
    first = next(item for item in advised(cfg) if item.change.startswith("engine.micro_batch_rows"))
    values = dict(part.removeprefix("engine.").split("=") for part in first.change.split())
    better = with_setting(
        cfg,
        rows=int(values["micro_batch_rows"]),
        checkpointing=int(values.get("recompute_every", 0)),
        hpz=int(values["hpz_partition_size"]),
    )
    given = hardware("a100-40gb")
    now, then = evaluate(cfg, CLUSTER, given), evaluate(better, CLUSTER, given)
    assert is_configured(better, then)
    assert first.gain == pytest.approx(1 - then.seconds / now.seconds) and first.gain > LEAST_GAIN
    assert first.cost == pytest.approx(then.seconds / now.seconds), "on the same GPUs, hours follow the step"


def test_stored_ids_are_advised_only_where_ids_are_not_stored_yet() -> None:
    cfg = load_config(STAGE, ["data.vq_ids=auto"])
    stored = load_config(STAGE, ["data.vq_ids=require"])
    assert any("encode-images" in item.change for item in advised(cfg))
    assert not any("encode-images" in item.change for item in advised(stored))


def test_one_node_is_not_advised_to_speed_up_links_between_nodes() -> None:
    single = advised(with_setting(load_config(STAGE), rows=1, checkpointing=True, hpz=1), Cluster(world=8, nodes=1))
    assert single and not any("between nodes" in item.change for item in single)
    assert all(item.fits and item.gain >= LEAST_GAIN for item in single)
