"""Which steps are bad: not finite, or far above the steps before them. The same numbers give the same decision on
every rank.

Median and median distance are used because one spike moves a mean and a standard deviation so far that the next spike
looks normal. Only values above the median count: a falling loss is the purpose of training. Every finite step enters
the window, outliers too: after a lasting shift (another mixture, a new source) the window learns the new level within
half its length and stops reporting.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from jp_train.config.choices import OutlierAction
from jp_train.config.schema import GuardConfig

SPREAD_OF_MEDIAN_DISTANCE = 1.4826
"""Makes the median distance from the median the standard deviation of a normal distribution."""
SMALLEST_SPREAD = 0.02
"""A spread counts as at least this share of the median: a loss that hardly moves would make every ripple an outlier."""
SMALLEST_WINDOW = 8


@dataclass(frozen=True)
class UpdateDecision:
    """What was decided about one step before its update. `action`: apply, record, skip or stop; `what` is empty for
    a good step."""

    loss: float
    grad_norm: float
    action: str = "apply"
    what: str = ""
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Median, spread and limit of each judged value, once the window is long enough."""

    @property
    def bad(self) -> bool:
        return bool(self.what)

    @property
    def applies(self) -> bool:
        """Whether the update is made."""
        return self.action in ("apply", "record")


class RollingStatistics:
    """Loss and gradient norm of the last steps. Its state is part of the checkpoint: a resumed run judges as the
    whole one would."""

    def __init__(self, cfg: GuardConfig) -> None:
        self._cfg = cfg
        self._values: dict[str, deque[float]] = {
            name: deque(maxlen=cfg.outlier_window) for name in ("loss", "grad_norm")
        }

    def judge(self, loss: float, grad_norm: float) -> UpdateDecision:
        """Decide about a step with these values, and remember them."""
        cfg, values = self._cfg, {"loss": loss, "grad_norm": grad_norm}
        broken = [name.replace("_", " ") for name, value in values.items() if not math.isfinite(value)]
        if broken:
            return UpdateDecision(
                loss, grad_norm, cfg.nonfinite_action.value, f"{' and '.join(broken)} not finite", self.summary()
            )
        statistics, before = self.summary(), len(self._values["loss"])
        for name, value in values.items():
            self._values[name].append(value)
        if cfg.outlier_action is OutlierAction.off:
            return UpdateDecision(loss, grad_norm)
        high = [name for name, value in values.items() if name in statistics and value > statistics[name]["limit"]]
        if not high:
            return UpdateDecision(loss, grad_norm)
        reasons = [
            f"{name.replace('_', ' ')} {values[name]:.4g} is "
            f"{(values[name] - statistics[name]['median']) / statistics[name]['spread']:.0f} spreads above the median "
            f"{statistics[name]['median']:.4g} of the last {before} steps"
            for name in high
        ]
        return UpdateDecision(loss, grad_norm, cfg.outlier_action.value, " and ".join(reasons), statistics)

    def summary(self) -> dict[str, dict[str, float]]:
        """{"loss" | "grad_norm": {"median", "spread", "limit"}}; empty while the window is shorter than a quarter of
        its length."""
        if len(self._values["loss"]) < max(SMALLEST_WINDOW, self._cfg.outlier_window // 4):
            return {}
        return {name: self._describe(values) for name, values in self._values.items()}

    def _describe(self, values: Sequence[float]) -> dict[str, float]:
        middle = median(values)
        spread = SPREAD_OF_MEDIAN_DISTANCE * median(abs(value - middle) for value in values)
        spread = max(spread, SMALLEST_SPREAD * abs(middle), 1e-12)
        return {"median": middle, "spread": spread, "limit": middle + self._cfg.outlier_factor * spread}

    def state(self) -> dict[str, Any]:
        return {name: list(values) for name, values in self._values.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, values in self._values.items():
            values.extend(float(value) for value in state.get(name, ()))
