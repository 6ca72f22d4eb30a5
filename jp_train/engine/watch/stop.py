"""When a run ends before its last planned step: signals, early stop, patience, and steps that are not finite.

Every decision here is either made from values that all ranks share, or (signals) is shared by the end-of-step exchange
of `engine/metrics.py`.
"""

from __future__ import annotations

import _thread
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from jp_train.config.schema import GuardConfig, StageConfig

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SIGNAL_S = 2.0
"""A repeat within this many seconds belongs to the first: Ctrl-C reaches a rank both from the terminal and from the
launcher."""

EXIT_HOOK_S = 2.0
"""Seconds for `exit_hook` between a second signal and the end."""


class SignalFlag:
    """Remembers the first stop signal; the loop acts on it at the step boundary. A second one (after SAME_SIGNAL_S)
    exits at once.

    A save inside the handler would deadlock: the DeepSpeed launcher signals rank k + 1 only after rank k has exited
    (docs/zero3.md, rule 8). Python's handlers wait while the main thread is inside a collective or a system call, so
    signals are also written to a pipe, which `must_exit` reads in the watchdog's thread.

    `exit_hook` is called with the exit status before a second signal ends the process, `end` ends it. The hook has
    EXIT_HOOK_S seconds in another thread: the handler interrupts the training thread anywhere, so it may wait for no
    lock and for no disk.
    """

    def __init__(self, exit_hook: Callable[[int], None] | None = None, end: Callable[[int], Any] = os._exit) -> None:
        self._exit_hook, self._end = exit_hook, end
        self.number = 0
        self._handled_at: float | None = None
        self._pipe: tuple[int, int] | None = None
        self._heard: tuple[int, float] | None = None

    def handle(self, number: int, _frame: FrameType | None = None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number = int(number)
        if self._handled_at is None:
            # not when `must_exit` has heard of it: this call may come seconds later, for the same signal
            self._handled_at = now
        elif now - self._handled_at > SAME_SIGNAL_S:
            self._leave(128 + number)

    def _leave(self, code: int) -> None:
        hook = self._exit_hook
        if hook is not None:
            done: list[bool] = []

            def call() -> None:
                try:
                    hook(code)
                finally:
                    done.append(True)

            # threading.Thread.start waits for locks that the interrupted thread may hold
            _thread.start_new_thread(call, ())
            until = time.monotonic() + EXIT_HOOK_S
            while not done and time.monotonic() < until:
                time.sleep(0.01)
        self._end(code)

    def must_exit(self, *, starting: bool) -> int:
        """The exit status with which this process should end now, 0 to go on. Call it from one thread, often.

        A first signal ends a run that is still `starting`, as there is nothing to save; a second one ends any run, even
        one whose main thread is stuck and cannot run `handle`.
        """
        now = time.monotonic()
        for number in self._read_pipe():
            if self._heard is None:
                self._heard = number, now
                self.number = self.number or number
            elif now - self._heard[1] > SAME_SIGNAL_S:
                return 128 + number
        return 128 + self._heard[0] if starting and self._heard is not None else 0

    def arrives(self, within_s: float = SAME_SIGNAL_S) -> bool:
        """Whether a stop signal has come, or comes within this time: launchers signal one rank after the other."""
        until = time.monotonic() + within_s
        while not self.number and time.monotonic() < until:
            time.sleep(0.02)
        return bool(self.number)

    def _read_pipe(self) -> list[int]:
        if self._pipe is None:
            return []
        try:
            return [number for number in os.read(self._pipe[0], 1024) if number in STOP_SIGNALS]
        except BlockingIOError:
            return []

    @contextmanager
    def installed(self) -> Iterator[SignalFlag]:
        """Install the handlers for the duration of the block (main thread only), and put the old ones back."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        pipe_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        before: dict[int, Any] = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(pipe_before)
            ends, self._pipe = self._pipe, None
            for end in ends:
                os.close(end)


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
    """Updates that were left out because the loss or the gradient was not finite or an outlier. `recent` holds their
    steps."""

    total: int = 0
    consecutive: int = 0
    recent: list[int] = field(default_factory=list)

    def observe(self, applied: bool, step: int, limits: GuardConfig) -> str:
        """Take the outcome of `step`. Returns why the run must stop, empty when it may go on."""
        if applied:
            self.consecutive = 0
            return ""
        self.total += 1
        self.consecutive += 1
        self.recent = [earlier for earlier in self.recent if earlier > step - limits.skip_window] + [step]
        allowed = int(limits.max_skip_share * limits.skip_window + 1e-9)  # 0.29 x 100 is 28.999...
        if self.consecutive >= limits.max_consecutive_skips:
            return f"{self.consecutive} updates in a row were left out (guard.max_consecutive_skips)"
        if len(self.recent) > allowed:
            return (
                f"{len(self.recent)} updates of the last {limits.skip_window} steps were left out, {allowed} are "
                "allowed (guard.max_skip_share)"
            )
        return ""

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "consecutive": self.consecutive, "recent": self.recent}

    def restore(self, state: dict[str, Any]) -> None:
        self.total, self.consecutive = int(state["total"]), int(state["consecutive"])
        self.recent = [int(step) for step in state.get("recent", ())]


class GraceCheck:
    """Says in time that a stop signal could not be obeyed: the step under way must end, and a save follow, before
    the scheduler kills."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._step_s = 0.0
        self._warned_s = 0.0

    def observe(self, step_s: float, save_s: float) -> str:
        """Take a step's seconds and the longest save's so far. Returns a warning, empty for none; repeated when it
        has become half as bad again."""
        self._step_s = max(self._step_s, step_s)
        needed = self._step_s + save_s
        if needed <= max(self._grace_s, 1.5 * self._warned_s):
            return ""
        self._warned_s = needed
        return (
            f"a stop signal would come too late: the longest step ({self._step_s:.0f} s) and save ({save_s:.0f} s) "
            f"take {needed:.0f} s, engine.grace_s is {self._grace_s:g} s. Ask the scheduler for its signal earlier "
            f"(launch/slurm.sbatch: --signal=B:USR1@{int(needed * 1.5) + 1}) and set engine.grace_s to that; else the "
            "work since the last checkpoint is lost"
        )


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
    """Whether to end after `step` completed steps. A finished stage wins over a signal that arrives in its last
    step."""
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
