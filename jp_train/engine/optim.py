"""Learning rate and AdamW groups.

The rate is a pure function of our own step counter and is written into the optimizer's groups before each step. There
is no DeepSpeed scheduler: it is not stepped when an update is skipped, and would then lag behind the step that
checkpoints, logs and `early_stop` count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from jp_train.config.choices import Schedule
from jp_train.config.schema import OptimizerConfig


def lr_factor(step: int, *, warmup_steps: int, warmup_from: float, schedule: Schedule, training_steps: int) -> float:
    """Factor on `optimizer.lr` for step number `step` (0 is the first).

    Linear from `warmup_from` at step 0 to 1 at step `warmup_steps` (docs/open_points.md, point 18); then 1, or a half
    cosine that reaches 0 at `training_steps` (Janus stage 1).
    """
    if step < warmup_steps:
        return warmup_from + (1.0 - warmup_from) * step / warmup_steps
    if schedule is Schedule.constant:
        return 1.0
    progress = (step - warmup_steps) / max(1, training_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def learning_rate(cfg: OptimizerConfig, training_steps: int, step: int) -> float:
    """`optimizer.lr` times the factor of this step, before `lr_scale`."""
    return cfg.lr * lr_factor(
        step,
        warmup_steps=cfg.warmup_steps,
        warmup_from=cfg.warmup_from,
        schedule=cfg.schedule,
        training_steps=training_steps,
    )


@dataclass(frozen=True)
class ParameterGroups:
    """`groups` for the optimizer and, parallel to them, the factor each group's rate is multiplied by."""

    groups: list[dict[str, Any]]
    lr_scales: tuple[float, ...]


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], cfg: OptimizerConfig, module_of: Callable[[str], str]
) -> ParameterGroups:
    """Trainable parameters by (lr_scale of their module, decayed or not), in a stable order.

    Matrices (two or more dimensions) are decayed, norms and biases never. `module_of` gives the module name of a
    parameter name.
    """
    buckets: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # a ZeRO-3 parameter's own shape is (0,)
        scale = float(getattr(cfg.lr_scale, module_of(name)))
        decay = cfg.weight_decay if len(shape) >= 2 else 0.0
        buckets.setdefault((scale, decay), []).append(parameter)
    return ParameterGroups(
        groups=[
            {"params": parameters, "weight_decay": decay, "lr": cfg.lr * scale}
            for (scale, decay), parameters in buckets.items()
        ],
        lr_scales=tuple(scale for scale, _ in buckets),
    )


def set_learning_rate(optimizer: Any, lr: float, lr_scales: tuple[float, ...]) -> None:
    """Write this step's rate into the groups of a torch or DeepSpeed optimizer (which keeps their order)."""
    groups = optimizer.param_groups
    assert len(groups) == len(lr_scales), f"{len(groups)} optimizer groups but {len(lr_scales)} factors"
    for group, scale in zip(groups, lr_scales, strict=True):
        group["lr"] = lr * scale
