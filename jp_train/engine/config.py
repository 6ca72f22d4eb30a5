"""DeepSpeed's own opinion of the JSON it is given: the values, after `config/deepspeed.py` has looked at the names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from jp_train.errors import ConfigError


def check_values(ds_config: Mapping[str, Any]) -> None:
    """Raise ConfigError for each value that DeepSpeed 0.19.8 rejects in the JSON of one rank, as `deepspeed.initialize`
    would, without a process group. Imports deepspeed (seconds)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils.logging import get_log_level_from_string
    from pydantic import ValidationError

    try:
        if "log_level" in ds_config:
            get_log_level_from_string(ds_config["log_level"])
        DeepSpeedConfig(dict(ds_config))
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, found {fault['input']!r}" for fault in error.errors()
        ]
        raise ConfigError(f"engine.deepspeed: DeepSpeed rejects {'; '.join(faults)}") from error
    except Exception as error:  # it checks by assertions and by whatever a wrong type runs into
        raise ConfigError(f"engine.deepspeed: DeepSpeed rejects it: {type(error).__name__}: {error}") from error
