"""Configuration: structured, strict, merged in one order and dumped whole (see `schema.py` for every key)."""

from jp_train.config.batch import BatchPlan, batch_plan, valid_world_sizes
from jp_train.config.load import dump_config, load_config, load_stored_config, preset_names, save_config
from jp_train.config.schema import RunConfig
from jp_train.config.validate import validate

__all__ = [
    "BatchPlan",
    "RunConfig",
    "batch_plan",
    "dump_config",
    "load_config",
    "load_stored_config",
    "preset_names",
    "save_config",
    "valid_world_sizes",
    "validate",
]
