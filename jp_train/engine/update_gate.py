"""Between backward and update: one decision per step, the same on all ranks, whether the update is made.

DeepSpeed has no hook there. ZeRO-3's `step` asks `_get_norm_groups` for the gradient's norm and leaves the update out
when that is not finite, before anything is written: weights, fp32 master weights and moments stay bit for bit what they
were. The gate stands in that one method: it passes the norms on, or an infinite one. The name is private: with another
DeepSpeed the constructor refuses, and tests/engine/test_forensics.py shows what broke.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from jp_train.engine.metrics import exchange
from jp_train.engine.outliers import UpdateDecision
from jp_train.errors import JpTrainError

_HOOK = "_get_norm_groups"


class UpdateGate:
    """Stands in the way of one ZeRO-3 optimizer's updates. Every rank makes one and calls its methods at the same
    steps.

    `judge(loss, gradient norm)` decides; `inspect()` is called on all ranks for a bad step while its gradients still
    exist, and may use collectives.
    """

    def __init__(
        self,
        optimizer: Any,
        judge: Callable[[float, float], UpdateDecision],
        inspect: Callable[[UpdateDecision], None] = lambda decision: None,
    ) -> None:
        if not callable(getattr(optimizer, _HOOK, None)) or not hasattr(optimizer, "grad_partitions_flat_buffer"):
            raise JpTrainError(
                f"{type(optimizer).__name__} of this DeepSpeed has no {_HOOK}, where jp_train decides about an "
                "update; install the version in setup.cfg"
            )
        from deepspeed.utils import logger

        logger.addFilter(_not_the_overflow_line)
        self._optimizer, self._judge, self._inspect = optimizer, judge, inspect
        self._norms = getattr(optimizer, _HOOK)
        self._loss: Callable[[], torch.Tensor] | None = None
        self.decision: UpdateDecision | None = None
        setattr(optimizer, _HOOK, self._decide)

    def begin_step(self, loss: Callable[[], torch.Tensor]) -> None:
        """`loss()`, called after the last backward: this rank's summed contribution to the step's loss, one element."""
        self._loss, self.decision = loss, None

    def end_step(self) -> UpdateDecision:
        """The decision about the step whose `engine.step` has just run. After a skipped one the gradient buffers are
        cleared: ZeRO-3 adds to them, or applies them again, for a parameter that the next step does not reach
        (docs/zero3.md, rule 2)."""
        assert self.decision is not None, (
            "engine.step did not reach the update: the step's micro-batches and gradient accumulation differ"
        )
        if not self.decision.applies:
            self._optimizer.grad_partitions_flat_buffer.zero_()
        return self.decision

    def _decide(self) -> list[torch.Tensor]:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        groups = list(self._norms())
        assert self._loss is not None, "begin_step comes before engine.step"
        norm = combine_grad_norm_groups(groups)
        mine = torch.cat(
            (self._loss().detach().reshape(1).double(), norm.detach().reshape(1).double().to(self._loss().device))
        )
        table = exchange(mine)  # every rank reads the same sum and rank 0's norm: no rank can decide otherwise
        self.decision = self._judge(float(table[:, 0].sum()), float(table[0, 1]) / float(self._optimizer.loss_scale))
        if self.decision.bad:
            self._inspect(self.decision)
        return groups if self.decision.applies else [torch.full_like(norm, float("inf"))]


def _not_the_overflow_line(record: logging.LogRecord) -> bool:
    """DeepSpeed says of every skipped step that its gradients are not finite; jp_train says what they were."""
    return "OVERFLOW! Skipping step" not in record.getMessage()
