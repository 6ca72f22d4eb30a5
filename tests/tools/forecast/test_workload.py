"""The average row against the planner that packs real rows of the same lengths (`jp-train data simulate
--synthetic`)."""

import io
from pathlib import Path

import pytest

from jp_train.config import load_config
from jp_train.tools.forecast.shapes import shapes_of
from jp_train.tools.forecast.timing import arithmetic
from jp_train.tools.forecast.workload import average_row
from jp_train.tools.simulate.stage import SimulateOptions, simulate_stage

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_average_row_agrees_with_rows_that_the_planner_packs(stage):
    cfg = load_config(ROOT / "launch" / f"janus_pro_1b_stage{stage}.yaml")
    planned = simulate_stage(cfg, SimulateOptions(synthetic=True, world=128, sample_steps=12), io.StringIO())
    shapes = shapes_of(cfg)
    row = average_row(cfg, shapes.slots)
    rows = planned["rows_per_step"]
    for name, mine in (
        ("tokens", row.tokens),
        ("understanding_images", row.und_images),
        ("generation_images", row.gen_images),
        ("supervised_image_tokens", row.image_positions),
        ("supervised_text_tokens", row.text_positions),
    ):
        assert rows * mine == pytest.approx(planned["per_step"][name]["mean"], rel=0.04), name
    work = arithmetic(cfg, shapes, row.step(rows, encoded=True), checkpointing=False)
    assert work.model + work.encoding == pytest.approx(planned["flops_per_step"], rel=0.03)


def test_checkpointing_computes_the_layers_once_more_and_nothing_is_computed_twice_without_it():
    cfg = load_config(ROOT / "launch" / "janus_pro_1b_stage2.yaml")
    shapes = shapes_of(cfg)
    step = average_row(cfg, shapes.slots).step(512, encoded=False)
    kept, anew = (arithmetic(cfg, shapes, step, checkpointing=given) for given in (False, True))
    assert kept.model == anew.model
    layers = 2.0 * (4 * 2048**2 + 3 * 2048 * 5632) * 24 * step.tokens + 4.0 * 2048 * 24 * step.squared_lengths
    assert kept.recomputed == 0
    assert anew.recomputed == pytest.approx(layers)
