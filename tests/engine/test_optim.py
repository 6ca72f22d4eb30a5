"""Learning rate by step, and which parameters are decayed or scaled."""

from __future__ import annotations

import pytest
import torch

from jp_train.config.schema import OptimizerConfig, Schedule
from jp_train.engine.optim import learning_rate, lr_factor, parameter_groups, set_learning_rate


def rates(steps: range, **changes) -> list[float]:
    cfg = OptimizerConfig(lr=2.0, **changes)
    return [learning_rate(cfg, 100, step) for step in steps]


def test_warm_up_is_linear_from_its_first_factor_and_reaches_the_full_rate_at_warmup_steps():
    assert rates(range(6), warmup_steps=4) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates(range(3), warmup_steps=2, warmup_from=0.5) == [1.0, 1.5, 2.0]


def test_a_constant_schedule_without_warm_up_is_the_rate_at_every_step():
    assert set(rates(range(200))) == {2.0}


def test_cosine_falls_to_half_midway_and_to_zero_at_the_last_planned_step():
    result = [
        lr_factor(step, warmup_steps=10, warmup_from=0.0, schedule=Schedule.cosine, training_steps=110)
        for step in (10, 35, 60, 85, 110, 200)
    ]
    assert result == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0], abs=1e-6)


def test_only_matrices_of_trainable_parameters_are_decayed_and_modules_keep_their_factor():
    named = {
        "model.vision_model.a.weight": torch.nn.Parameter(torch.zeros(2, 3)),
        "model.vision_model.a.bias": torch.nn.Parameter(torch.zeros(3)),
        "lm_head.weight": torch.nn.Parameter(torch.zeros(4, 2)),
        "model.aligner.frozen": torch.nn.Parameter(torch.zeros(4, 2), requires_grad=False),
    }
    cfg = OptimizerConfig(lr=1e-3, weight_decay=0.1)
    cfg.lr_scale.vision_model = 0.1
    result = parameter_groups(
        named.items(), cfg, lambda name: "language_model" if name == "lm_head.weight" else "vision_model"
    )
    assert [group["weight_decay"] for group in result.groups] == [0.1, 0.0, 0.1] and result.lr_scales == (0.1, 0.1, 1.0)
    assert [id(p) for group in result.groups for p in group["params"]] == [id(p) for p in list(named.values())[:3]]
    optimizer = torch.optim.AdamW(result.groups, lr=1.0)
    set_learning_rate(optimizer, 0.5, result.lr_scales)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.5]


def test_a_partitioned_parameter_is_judged_by_its_whole_shape():
    parameter = torch.nn.Parameter(torch.zeros(0))
    parameter.ds_shape = torch.Size((3, 2))
    assert (
        parameter_groups([("x", parameter)], OptimizerConfig(weight_decay=0.3), lambda name: "aligner").groups[0][
            "weight_decay"
        ]
        == 0.3
    )
