"""Batch arithmetic: no remainder is ever dropped."""

import pytest

from jp_train.config import load_config
from jp_train.config.batch import batch_plan, rows_per_step, valid_world_sizes
from jp_train.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    def load(preset, *overrides):
        file = tmp_path / "run.yaml"
        file.write_text(f"preset: {preset}\n")
        return load_config(file, overrides)

    return load


@pytest.mark.parametrize(
    ("preset", "ranks", "accumulation"),
    [
        ("janus_pro_1b/stage1", 128, 1),
        ("janus_pro_1b/stage2", 128, 4),
        ("janus_pro_7b/stage2", 256, 2),
        ("janus_pro_1b/stage3", 128, 1),
    ],
)
def test_the_papers_clusters_divide_the_papers_batches(load, preset, ranks, accumulation):
    plan = batch_plan(load(preset), ranks)
    assert plan.gradient_accumulation_steps == accumulation
    assert plan.micro_batch_rows * plan.gradient_accumulation_steps * ranks == plan.rows_per_step


def test_rows_of_a_step_are_its_samples_over_those_of_a_row_or_the_packed_rows_themselves(load):
    samples = load("janus_pro_1b/stage1", "stage.batch_size=12", "stage.samples_per_row=4")
    packed = load("janus_pro_1b/stage2", "stage.batch_size=12", "stage.samples_per_row=4")
    assert (rows_per_step(samples), rows_per_step(packed)) == (3, 12)


def test_a_world_size_that_does_not_divide_the_rows_is_rejected_with_the_nearest_valid_ones(load):
    with pytest.raises(ConfigError) as caught:
        batch_plan(load("janus_pro_1b/stage2"), 100)
    message = str(caught.value)
    assert "512 rows" in message and "100 ranks" in message and "64" in message and "128" in message


def test_samples_that_do_not_fill_whole_rows_are_rejected(load):
    with pytest.raises(ConfigError, match="samples_per_row"):
        load("janus_pro_1b/stage1", "stage.samples_per_row=3")


def test_valid_world_sizes_are_exactly_those_that_batch_plan_accepts(load):
    config = load("janus_pro_1b/stage3", "engine.micro_batch_rows=2")
    accepted = []
    for ranks in range(1, 200):
        try:
            batch_plan(config, ranks)
        except ConfigError:
            continue
        accepted.append(ranks)
    assert valid_world_sizes(config) == accepted == [1, 2, 4, 8, 16, 32, 64]


def test_a_resumed_run_takes_the_largest_micro_batch_that_its_number_of_ranks_allows(load):
    """Every world size that divides the rows, rows and tokens a step unchanged; one that does not is refused as
    ever."""
    config = load("janus_pro_1b/stage3", "engine.micro_batch_rows=6", "stage.batch_size=72")
    for ranks in (size for size in range(1, 73) if 72 % size == 0):
        plan = batch_plan(config, ranks, shrink=True)
        share = 72 // ranks
        assert plan.micro_batch_rows == max(n for n in range(1, 7) if share % n == 0), ranks
        assert plan.micro_batch_rows * plan.gradient_accumulation_steps * ranks == plan.rows_per_step == 72
    with pytest.raises(ConfigError, match="72 rows a step cannot be split over 5 ranks"):
        batch_plan(config, 5, shrink=True)
