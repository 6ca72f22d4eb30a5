"""What a run remembers between steps besides weights, optimizer, plan and ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jp_train.config import RunConfig
from jp_train.engine.outliers import RollingStatistics
from jp_train.engine.watch.stop import Patience, SkipCounter


@dataclass
class TrainState:
    """What a run remembers between steps besides weights, optimizer and plan: kilobytes, in every checkpoint."""

    patience: Patience
    statistics: RollingStatistics
    skips: SkipCounter = field(default_factory=SkipCounter)
    step: int = 0
    tokens: int = 0
    dumps: int = 0
    """Bad steps whose rows and norms lie under forensics/."""

    @classmethod
    def restored(cls, cfg: RunConfig, saved: dict[str, Any] | None) -> TrainState:
        """The saved state, or a new run's."""
        state = cls(Patience(cfg.stage.early_stop.patience), RollingStatistics(cfg.guard))
        if saved is not None:
            state.patience.restore(saved["patience"])
            state.skips.restore(saved["skips"])
            state.statistics.restore(saved.get("usual", {}))
            state.step, state.tokens, state.dumps = saved["step"], saved["tokens"], saved.get("dumps", 0)
        return state

    def saved(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "dumps": self.dumps,
            "patience": self.patience.state(),
            "skips": self.skips.state(),
            "usual": self.statistics.state(),
        }
