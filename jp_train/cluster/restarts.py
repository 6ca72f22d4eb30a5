"""Starting a run again after a host or a rank has failed: whether, on which hosts, and what it cost.

A run is started again when a host is gone, a rank was killed, ranks lost each other, or a rank ended with an exception
(a broken device looks like that); never for a configuration, data or checkpoint error, which would come back, nor after
a stop signal. Hosts that do not answer are left out, and as many others as it takes for the rows of a step to divide
among the ranks that remain.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jp_train.cluster.hostfile import Selection, world_size
from jp_train.errors import CheckpointError, ConfigError, DataError

FINAL_CODES = (ConfigError.exit_code, DataError.exit_code, CheckpointError.exit_code)
LOOK_S = 1.0
_CHECKPOINT = re.compile(r"step_(\d{7,})")


def largest_usable(selection: Selection, fits: Callable[[int], bool]) -> dict[str, tuple[int, ...]]:
    """The whole hosts with the most slots whose number of ranks `fits`, in their order; among equals the first.
    Empty when none does."""
    best: dict[int, tuple[str, ...]] = {0: ()}
    for host, slots in selection.items():
        for total, chosen in sorted(best.items(), reverse=True):
            best.setdefault(total + len(slots), (*chosen, host))
    for total in sorted(best, reverse=True):
        if total and fits(total):
            return {host: selection[host] for host in selection if host in best[total]}
    return {}


def worth_starting(again: str, *, first: bool, advanced: bool, fell_short: bool, before: bool) -> bool:
    """Whether a start that ended with `Outcome.again` is worth another one.

    An exception is: where the run had got further than ever (`advanced`), and once where a restart did not even reach
    the step at which the run had stood (`fell_short`; `before`: so did the start before), as a network that has just
    lost a host may fail once more. One at the `first` start, or at the same step again, would come back.
    """
    return again == "yes" or (again == "if_advanced" and (advanced or (not first and fell_short and not before)))


@dataclass(frozen=True)
class Standing:
    """Where a run is, from its run folder. `step_s`: seconds of its last step; `updated`: when status.json was written
    last, seconds since 1970 by the clock of rank 0's host, which only tells one writing from another."""

    state: str = ""
    reason: str = ""
    step: int = 0
    step_s: float | None = None
    updated: float = 0.0
    checkpoint_step: int | None = None


def standing(run_dir: Path) -> Standing:
    """Read status.json and the names of the checkpoints; what is not there is left at its default."""
    steps = [
        int(match[1])
        for path in (run_dir / "checkpoints").glob("step_*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    newest = max(steps, default=None)
    try:
        status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
        step_s = status.get("step_s")
        return Standing(
            state=str(status["state"]),
            reason=str(status.get("reason") or ""),
            step=int(status.get("step") or 0),
            step_s=None if step_s is None else float(step_s),
            updated=float(status["updated"]),
            checkpoint_step=newest,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Standing(checkpoint_step=newest)


def has_checkpoints(run_dir: Path) -> bool:
    """Whether the run goes on from a checkpoint: then the micro-batch may follow the number of ranks."""
    return any((run_dir / "checkpoints").glob("step_*"))


@dataclass(frozen=True)
class Restart:
    """One restart, as events.jsonl keeps it. Times in seconds."""

    number: int
    of: int
    cause: str
    left_out: list[str]
    hosts: list[str]
    ranks_before: int
    ranks: int
    failed_at_step: int
    resumes_at_step: int
    lost_steps: int
    lost_steps_s: float
    """Steps since the newest checkpoint, which are trained again, at the length of the last one."""
    down_s: float
    """From the last sign of progress to this restart: noticing the fault, ending what was left, checking the hosts."""

    def describe(self) -> str:
        """One line for the terminal."""
        out = f", without {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"restart {self.number} of {self.of} on {self.ranks} ranks ({', '.join(self.hosts)}{out}) from step "
            f"{self.resumes_at_step}: {self.lost_steps} steps since the last checkpoint are trained again "
            f"({self.lost_steps_s:.1f} s), {self.down_s:.1f} s since the run last made progress. Cause: {self.cause}"
        )

    def event(self) -> dict[str, Any]:
        """The line of events.jsonl."""
        return asdict(self) | {"lost_steps_s": round(self.lost_steps_s, 3), "down_s": round(self.down_s, 3)}


def plan_restart(
    number: int,
    of: int,
    cause: str,
    everything: Selection,
    before: Selection,
    after: Selection,
    last: Standing,
    *,
    down_s: float,
) -> Restart:
    """What a restart costs so far. `everything`, `before`, `after`: all slots of the launch, those of the failed
    start and of the next one; `last`: the run folder after the failure; `down_s`: seconds since its last progress."""
    resumes = last.checkpoint_step or 0
    lost = max(0, last.step - resumes)
    return Restart(
        number=number,
        of=of,
        cause=cause,
        left_out=[host for host in everything if host not in after],
        hosts=list(after),
        ranks_before=world_size(before),
        ranks=world_size(after),
        failed_at_step=last.step,
        resumes_at_step=resumes,
        lost_steps=lost,
        lost_steps_s=lost * (last.step_s or 0.0),
        down_s=down_s,
    )


class Progress:
    """What one start makes of the run, by the changes of status.json and the clock of this process: the clock of rank
    0's host, whose times that file holds, may be another hour's. Make it when nothing of an earlier start runs any
    more. `restart`: None for a first start."""

    def __init__(
        self, run_dir: Path, restart: Restart | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir, self._restart, self._clock = run_dir, restart, clock
        self._before = self._last = standing(run_dir)
        self._began = self._changed_at = self._looked_at = clock()
        self._reported = restart is None

    @property
    def moved(self) -> bool:
        """Whether this start has written status.json: what stands there is its own."""
        return self._last.updated not in (0.0, self._before.updated)  # 0: there is none, or it cannot be read

    @property
    def quiet_s(self) -> float:
        """Seconds since status.json changed last, or since the start where it has not."""
        return self._clock() - self._changed_at

    def now(self) -> Standing:
        """Look at the run folder."""
        self._looked_at = self._clock()
        last, self._last = self._last, standing(self._run_dir)
        if self._last.updated not in (0.0, last.updated):
            self._changed_at = self._looked_at
        return self._last

    def look(self) -> dict[str, Any] | None:
        """Call often. The whole cost of the restart, when the first new step is done: {"step", "start_s", "lost_s"},
        in seconds; None before, and ever after."""
        if self._clock() - self._looked_at < LOOK_S:
            return None
        now = self.now()
        if self._reported or not self.moved or now.state == "starting" or now.step <= self._resumes_at:
            return None
        self._reported = True
        assert self._restart is not None
        start_s = self._changed_at - self._began
        # the steps up to the one that the run had reached are trained a second time
        return {
            "step": now.step,
            "start_s": round(start_s, 3),
            "lost_s": round(self._restart.lost_steps_s + self._restart.down_s + start_s, 3),
        }

    @property
    def _resumes_at(self) -> int:
        return self._restart.resumes_at_step if self._restart is not None else 0
