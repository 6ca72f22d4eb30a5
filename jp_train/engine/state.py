"""What a run remembers between steps besides weights, optimizer, plan and ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jp_train.config import RunConfig
from jp_train.engine.stop import Patience, SkipCounter


@dataclass
class TrainState:
    """What a run remembers between steps besides weights, optimizer and plan: kilobytes, in every checkpoint."""

    patience: Patience
    skips: SkipCounter = field(default_factory=SkipCounter)
    step: int = 0
    tokens: int = 0

    @classmethod
    def restored(cls, cfg: RunConfig, saved: dict[str, Any] | None) -> TrainState:
        """The saved state, or a new run's."""
        state = cls(Patience(cfg.stage.early_stop.patience))
        if saved is not None:
            state.patience.restore(saved["patience"])
            state.skips.restore(saved["skips"])
            state.step, state.tokens = saved["step"], saved["tokens"]
        return state

    def saved(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "patience": self.patience.state(), "skips": self.skips.state()}
