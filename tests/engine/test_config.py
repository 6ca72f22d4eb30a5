"""The tables of raw DeepSpeed keys against the installed DeepSpeed, and what it thinks of values."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime import config as installed
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from jp_train.config import RunConfig, batch_plan
from jp_train.config.deepspeed import EFFECTIVE, OWNED, UNUSED, deepspeed_config
from jp_train.config.schema import BatchUnit
from jp_train.engine.config import check_values
from jp_train.errors import ConfigError

SECTIONS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "comms_logger": CommsLoggerConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
"""Sections of the tables that DeepSpeed reads into a model of its own."""


class Asked(dict):
    """A configuration that notes every key DeepSpeed asks it for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.keys_asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        other = Asked(self)
        other.keys_asked = self.keys_asked
        return other


def names(model: type[DeepSpeedConfigModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def tables_below(section: str) -> set[str]:
    keys = (*OWNED, *UNUSED, *EFFECTIVE)
    return {key[len(section) + 1 :].partition(".")[0] for key in keys if key.startswith(section + ".")}


def test_every_section_that_deepspeed_asks_for_stands_in_one_table():
    asked = Asked({"train_batch_size": 1})
    installed.DeepSpeedConfig(asked)
    known = asked.keys_asked | set(installed._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert len(known) > 50
    assert {key.partition(".")[0] for key in (*OWNED, *UNUSED, *EFFECTIVE)} == known


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_section_that_deepspeed_reads_stands_in_one_table(section):
    removed = set(installed._REMOVED_ZERO_CONFIG_KEYS) if section == "zero_optimization" else set()
    assert tables_below(section) == names(SECTIONS[section]) | removed


def test_no_key_stands_in_two_tables():
    keys = [*OWNED, *UNUSED, *EFFECTIVE]
    assert len(keys) == len(set(keys))
    assert not [key for key in keys for other in keys if key.startswith(other + ".")]


def json_of(**raw: Any) -> dict[str, Any]:
    cfg = RunConfig()
    cfg.stage.batch_unit, cfg.stage.batch_size, cfg.engine.micro_batch_rows = BatchUnit.packed, 512, 2
    cfg.engine.deepspeed = raw
    return deepspeed_config(cfg, batch_plan(cfg, 1))


def test_deepspeed_takes_what_is_generated_and_every_effective_key():
    check_values(json_of())
    check_values(
        json_of(
            zero_optimization={
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
                "offload_param": {"device": "cpu"},
                "stage3_prefetch_bucket_size": 5e7,
            },
            comms_logger={"enabled": True, "prof_ops": ["all_reduce"]},
            timers={"throughput": {"enabled": True}},
            log_level="info",
        )
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"zero_optimization": {"reduce_bucket_size": "many"}},
            "engine.deepspeed: DeepSpeed rejects reduce_bucket_size: Input should be a valid integer",
        ),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, "offload_param.device: Input should be 'none', "),
        ({"zero_optimization": {"sub_group_size": -1}}, "sub_group_size: Input should be greater than or equal to 0"),
        ({"comms_logger": {"enabled": "perhaps"}}, "enabled: Input should be a valid boolean"),
        ({"timers": {"throughput": 3}}, "DeepSpeed rejects it: TypeError"),
        ({"log_level": "loud"}, "loud is not one of the valid logging levels"),
    ],
)
def test_a_value_that_deepspeed_rejects_is_a_configuration_error(raw, message):
    with pytest.raises(ConfigError) as error:
        check_values(json_of(**raw))
    assert message in str(error.value)
