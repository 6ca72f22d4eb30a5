"""The generated DeepSpeed JSON: one owner per value."""

from __future__ import annotations

import pytest

from jp_train.config import RunConfig, batch_plan
from jp_train.config.schema import BatchUnit, Precision
from jp_train.engine.config import OWNED_KEYS, deepspeed_config
from jp_train.errors import ConfigError


def run(**deepspeed) -> RunConfig:
    cfg = RunConfig()
    cfg.stage.batch_unit, cfg.stage.batch_size, cfg.engine.micro_batch_rows = BatchUnit.packed, 512, 2
    cfg.engine.deepspeed = deepspeed
    return cfg


def test_batch_clip_dtype_and_optimizer_come_from_the_run_config():
    cfg = run()
    cfg.optimizer.clip, cfg.optimizer.lr, cfg.engine.hpz_partition_size = 0.5, 4e-5, 8
    found = deepspeed_config(cfg, batch_plan(cfg, 32))
    sizes = [
        found[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    assert sizes == [512, 2, 8] and sizes[0] == sizes[1] * sizes[2] * 32
    assert found["gradient_clipping"] == 0.5 and found["bf16"] == {"enabled": True}
    params = found["optimizer"]["params"]
    assert (
        found["optimizer"]["type"] == "AdamW"
        and params["torch_adam"]
        and params["betas"] == [0.9, 0.95]
        and params["lr"] == 4e-5
    )
    zero = found["zero_optimization"]
    assert (
        zero["stage"] == 3
        and zero["stage3_param_persistence_threshold"] == 100_000
        and zero["zero_hpz_partition_size"] == 8
    )


def test_gradients_travel_and_accumulate_in_fp32():
    cfg = run()
    found = deepspeed_config(cfg, batch_plan(cfg, 1))
    assert found["communication_data_type"] == "fp32" and found["data_types"] == {"grad_accum_dtype": "fp32"}


def test_fp32_precision_switches_bf16_off():
    cfg = run()
    cfg.precision = Precision.fp32
    assert deepspeed_config(cfg, batch_plan(cfg, 1))["bf16"] == {"enabled": False}


def test_raw_keys_are_merged_last_and_inside_sections():
    cfg = run(zero_optimization={"reduce_bucket_size": 7, "overlap_comm": False}, comms_logger={"enabled": True})
    found = deepspeed_config(cfg, batch_plan(cfg, 1))
    assert found["zero_optimization"]["reduce_bucket_size"] == 7 and found["zero_optimization"]["overlap_comm"] is False
    assert found["zero_optimization"]["stage"] == 3 and found["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize("owned", OWNED_KEYS)
def test_a_key_that_jp_train_owns_is_refused_with_its_owner(owned):
    value: object = 1
    for part in reversed(owned.split(".")):
        value = {part: value}
    cfg = run(**value)
    with pytest.raises(ConfigError) as error:
        deepspeed_config(cfg, batch_plan(cfg, 1))
    assert f"engine.deepspeed.{owned}" in str(error.value) and OWNED_KEYS[owned] in str(error.value)


def test_a_leaf_of_an_owned_section_is_refused():
    cfg = run(optimizer={"params": {"lr": 1.0}})
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.optimizer is set by jp_train"):
        deepspeed_config(cfg, batch_plan(cfg, 1))


def test_replacing_the_whole_zero_section_by_a_value_is_refused():
    cfg = run(zero_optimization=False)
    with pytest.raises(ConfigError, match="zero_optimization"):
        deepspeed_config(cfg, batch_plan(cfg, 1))


def test_a_misspelt_section_is_named():
    cfg = run(zero_optimisation={"reduce_bucket_size": 7})
    with pytest.raises(ConfigError, match="did you mean 'zero_optimization'"):
        deepspeed_config(cfg, batch_plan(cfg, 1))
