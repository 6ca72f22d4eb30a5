"""Which settings a run could have on its cluster, and what each takes."""

from __future__ import annotations

from typing import Any

from jp_train.config import BatchPlan, RunConfig
from jp_train.config.schema import Precision
from jp_train.engine.config import deepspeed_config
from jp_train.errors import ConfigError
from jp_train.forecasting.memory import Setting

DEEPSPEED_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
"""deepspeed 0.19.8, runtime/zero/config.py; a test compares them."""
UNPREFIXED = {
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
}


def setting_of(cfg: RunConfig, plan: BatchPlan, *, node: int, cuda: bool = True) -> Setting:
    """How a rank of this configuration runs; raises ConfigError for raw DeepSpeed keys that the forecast does not know (offloading)."""
    zero: dict[str, Any] = deepspeed_config(cfg, plan)["zero_optimization"]
    for key in ("offload_optimizer", "offload_param", "zenflow", "cpu_offload", "cpu_offload_param"):
        if zero.get(key):
            raise ConfigError(f"engine.deepspeed.zero_optimization.{key}: the forecast knows no offloading; leave the key out for the forecast")

    def number(key: str) -> int:
        return int(float(zero.get(key, zero.get(UNPREFIXED.get(key, key), DEEPSPEED_DEFAULTS[key]))))

    return Setting(
        world=plan.dp_world_size,
        node=node,
        size=2 if cfg.precision is Precision.bf16 else 4,
        checkpointing=cfg.engine.activation_checkpointing,
        hpz=cfg.engine.hpz_partition_size,
        reduce_bucket=number("reduce_bucket_size"),
        prefetch=number("stage3_prefetch_bucket_size"),
        max_live=number("stage3_max_live_parameters"),
        max_reuse=number("stage3_max_reuse_distance"),
        persistent=cfg.engine.persistence_threshold,
        chunk=cfg.loss.chunk_tokens,
        decayed=cfg.optimizer.weight_decay > 0,
        cuda=cuda,
    )
