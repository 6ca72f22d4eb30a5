"""The DeepSpeed JSON, generated: every value in it has one owner, the run's configuration.

Three settings are there for exactness and were measured (docs/zero3.md, rule 4): gradients travel and accumulate in
fp32 (`communication_data_type` and `data_types.grad_accum_dtype` together bring the error of a bf16 accumulation of 16
micro-batches from 3.5e-3 to 2e-11), and the optimizer is torch's own AdamW on fp32 master weights.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from jp_train.config import BatchPlan, RunConfig
from jp_train.config.choices import Precision
from jp_train.errors import ConfigError

OWNED_KEYS = {
    "train_batch_size": "stage.batch_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_rows",
    "gradient_accumulation_steps": "stage.batch_size, engine.micro_batch_rows and the number of ranks",
    "managed_gradient_accumulation": "jp_train's train_step, which counts the micro-batches of a step itself",
    "gradient_clipping": "optimizer.clip",
    "prescale_gradients": "jp_train's loss scaling (sum / global tokens x ranks)",
    "gradient_predivide_factor": "jp_train's loss scaling (sum / global tokens x ranks)",
    "communication_data_type": "jp_train (fp32: bf16 sums lose 3.5e-3 of a gradient)",
    "data_types": "jp_train (fp32 gradient accumulation)",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "zero_optimization.stage": "jp_train, which is built for ZeRO-3",
    "zero_optimization.stage3_param_persistence_threshold": "engine.persistence_threshold",
    "zero_optimization.param_persistence_threshold": "engine.persistence_threshold",
    "zero_optimization.zero_hpz_partition_size": "engine.hpz_partition_size",
    "checkpoint.load_universal": "jp_train's own checkpoint protocol",
    "load_universal_checkpoint": "jp_train's own checkpoint protocol",
}
"""DeepSpeed keys that jp_train sets, and the jp_train key to change instead. `engine.deepspeed` may not name them."""


def deepspeed_config(cfg: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """The dictionary given to `deepspeed.initialize` and `zero.Init` on every rank.

    `cfg.engine.deepspeed` is merged last, key by key; raises ConfigError when it names a key of OWNED_KEYS, or
    misspells a section.
    """
    generated: dict[str, Any] = {
        "train_batch_size": plan.rows_per_step,
        "train_micro_batch_size_per_gpu": plan.micro_batch_rows,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": cfg.optimizer.clip,
        "bf16": {"enabled": cfg.precision is Precision.bf16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": cfg.optimizer.lr,
                "betas": [cfg.optimizer.beta1, cfg.optimizer.beta2],
                "eps": cfg.optimizer.eps,
                "weight_decay": cfg.optimizer.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": True,
            "stage3_param_persistence_threshold": cfg.engine.persistence_threshold,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": cfg.engine.hpz_partition_size,
        },
        "steps_per_print": 2**31,  # jp_train prints; DeepSpeed's own progress line is off
        "wall_clock_breakdown": False,
    }
    return _merge(generated, cfg.engine.deepspeed)


def _merge(generated: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    for path in _paths(extra):
        for owned, owner in OWNED_KEYS.items():
            if (
                path == owned
                or path.startswith(owned + ".")
                or (owned.startswith(path + ".") and not _is_section(extra, path))
            ):
                raise ConfigError(
                    f"engine.deepspeed.{path} is set by jp_train; change {owner} instead, and leave this key out"
                )
    merged = copy.deepcopy(generated)
    for key, value in extra.items():
        if key not in merged:
            close = difflib.get_close_matches(key, list(merged), n=1, cutoff=0.85)
            if close:
                raise ConfigError(
                    f"engine.deepspeed.{key}: did you mean {close[0]!r}? DeepSpeed would ignore the misspelt key"
                )
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = {**merged[key], **copy.deepcopy(dict(value))}
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted path of the tree, sections and leaves."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _is_section(tree: Mapping[str, Any], path: str) -> bool:
    node: Any = tree
    for part in path.split("."):
        node = node[part]
    return isinstance(node, Mapping)
