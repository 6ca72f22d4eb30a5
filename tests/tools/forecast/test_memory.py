"""The forecast against a real run: DeepSpeed ZeRO-3, our engine, two ranks on this machine's CPU (bench/forecast.py
does more sizes and ranks)."""

from dataclasses import replace

import pytest

from bench.forecast import configuration, contents, launch, predict, synthetic_batch
from jp_train.config import batch_plan
from jp_train.errors import ConfigError
from jp_train.tools.forecast.candidates import DEEPSPEED_DEFAULTS, setting_of
from jp_train.tools.forecast.memory import forecast_memory
from jp_train.tools.forecast.shapes import shapes_of

SPEC = {"size": "10M", "world": 2, "rows": 1}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return launch(SPEC, tmp_path_factory.mktemp("ranks"))


def test_the_peak_of_a_real_run_is_within_a_tenth_of_the_forecast(ranks):
    memory = predict(SPEC).memory
    measured = max(rank["peak"] for rank in ranks)
    assert memory.total == pytest.approx(measured, rel=0.10)


def test_the_tensors_that_live_between_steps_are_the_states_of_the_forecast(ranks):
    assert max(rank["tensors"] for rank in ranks) == pytest.approx(predict(SPEC).memory.states, rel=0.03)


def test_modules_are_walked_in_the_order_that_deepspeed_recorded(ranks):
    walked = [visit.path for visit in predict(SPEC).visits]
    assert all(rank["order"] == walked for rank in ranks)


def test_the_defaults_are_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    for name, value in DEEPSPEED_DEFAULTS.items():
        field = next(field for key, field in fields.items() if name in (key, field.alias))
        assert int(field.default) == value, name


def test_states_follow_deepspeeds_data_types():
    cfg = configuration("10M", precision="bf16")
    shapes, plan = shapes_of(cfg), batch_plan(cfg, 2)
    setting = replace(setting_of(cfg, plan), persistent=0)
    memory = forecast_memory(shapes, contents(synthetic_batch(cfg, 2)), setting).memory
    trained = sum(-(-p.numel // 2) for p in shapes.parameters)
    assert (memory.parameters, memory.optimizer, memory.gradients) == (2 * trained, 12 * trained, 4 * trained)
    assert memory.reduce_bucket == 4 * 4_000_000
    assert memory.total == max(memory.phases.values())
    frozen = configuration("10M", precision="bf16", stage=1)
    only = forecast_memory(shapes_of(frozen), contents(synthetic_batch(frozen, 2)), setting).memory
    learning = sum(-(-p.numel // 2) for p in shapes.parameters if p.module in frozen.stage.trainable)
    assert (only.parameters, only.optimizer, only.gradients) == (2 * trained, 12 * learning, 4 * learning)


def test_checkpointing_takes_less_and_hpz_and_larger_micro_batches_take_more():
    def total(**changes) -> int:
        cfg = configuration("100M", precision="bf16", **changes)
        setting = setting_of(cfg, batch_plan(cfg, 2))
        return forecast_memory(
            shapes_of(cfg), contents(synthetic_batch(cfg, cfg.engine.micro_batch_rows)), setting
        ).memory.total

    assert total(rows=8) < total(rows=8, checkpointing=False)
    assert total(rows=8) > total(rows=4)
    cfg = configuration("100M", precision="bf16", hpz=2)
    secondary = sum(2 * -(-p.numel // 2) for p in shapes_of(cfg).parameters)
    assert total(hpz=2) == total() + secondary


def test_offloading_is_refused():
    cfg = configuration("10M")
    cfg.engine.deepspeed = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match="offload_optimizer"):
        setting_of(cfg, batch_plan(cfg, 2))
