"""When a run ends before its last planned step: signals, early stop, patience, and steps that are not finite.

Every decision here is either made from values that all ranks share, or (signals) is shared by the end-of-step exchange of `metrics.py`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from jp_train.config.schema import StageConfig

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MAX_CONSECUTIVE_SKIPS = 3
"""Steps with a non-finite gradient in a row that stop the run. One can be a bad document; three are a diverged model, and each costs a step."""

SAME_SIGNAL_S = 2.0
"""A repeat within this many seconds belongs to the first: Ctrl-C reaches a rank both from the terminal and from the launcher."""


class SignalFlag:
    """Remembers the first stop signal; the loop acts on it at the step boundary. A second one (after SAME_SIGNAL_S) exits at once.

    A save inside the handler would deadlock: the DeepSpeed launcher signals rank k + 1 only after rank k has exited (DEEPSPEED.md section 7).
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def handle(self, number: int, _frame: FrameType | None = None) -> None:
        now = time.monotonic()
        if self.number and now - self._since > SAME_SIGNAL_S:
            os._exit(128 + number)
        if not self.number:
            self.number, self._since = int(number), now

    @contextmanager
    def installed(self) -> Iterator[SignalFlag]:
        """Install the handlers for the duration of the block (main thread only), and put the old ones back."""
        before: dict[int, Any] = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Patience:
    """Held-out loss that no longer improves. `best` and `waited` are part of the checkpoint."""

    limit: int | None
    best: float | None = None
    waited: int = 0

    def observe(self, loss: float) -> bool:
        """Take one validation's `val/total`; True when the run should stop."""
        if self.best is None or loss < self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.over

    @property
    def over(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self.waited >= self.limit

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], int(state["waited"])


@dataclass
class SkipCounter:
    """Updates that were skipped because the gradient was not finite."""

    total: int = 0
    consecutive: int = 0

    def observe(self, applied: bool) -> bool:
        """Take one step's outcome; True when MAX_CONSECUTIVE_SKIPS is reached."""
        if applied:
            self.consecutive = 0
            return False
        self.total += 1
        self.consecutive += 1
        return self.consecutive >= MAX_CONSECUTIVE_SKIPS

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "consecutive": self.consecutive}

    def restore(self, state: dict[str, Any]) -> None:
        self.total, self.consecutive = int(state["total"]), int(state["consecutive"])


@dataclass(frozen=True)
class Stop:
    """Why the loop ends: `reason` for events.jsonl, the exit code, and the state of status.json."""

    reason: str
    state: str
    exit_code: int = 0


def last_step(stage: StageConfig) -> int:
    """The step after which this run ends by plan: `early_stop.at_step`, or `training_steps`."""
    return min(stage.training_steps, stage.early_stop.at_step or stage.training_steps)


def decide(stage: StageConfig, *, step: int, signal_number: int, patience_over: bool) -> Stop | None:
    """Whether to end after `step` completed steps. A finished stage wins over a signal that arrives in its last step."""
    if step >= stage.training_steps:
        return Stop("all training steps done", "finished")
    at_step = stage.early_stop.at_step
    if at_step is not None and step >= at_step:
        return Stop(f"stage.early_stop.at_step {at_step} of {stage.training_steps} training steps", "stopped_early")
    if patience_over:
        return Stop(f"no better held-out loss for {stage.early_stop.patience} validations", "stopped_early")
    if signal_number:
        return Stop(f"signal {signal.Signals(signal_number).name}", "stopped_by_signal", 128 + signal_number)
    return None
