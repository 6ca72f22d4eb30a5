"""What rank 0 writes and prints about a run; on the other ranks every method does nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from signal import Signals
from types import MappingProxyType
from typing import Any

from jp_train.config import BatchPlan, RunConfig
from jp_train.data.ledger import LEDGER_FILE
from jp_train.data.snapshots import SNAPSHOTS_FILE, append_snapshot
from jp_train.engine.watch.stop import Stop, last_step
from jp_train.errors import JpTrainError
from jp_train.files import drop_later_lines, json_object
from jp_train.run.sinks import SINKS, Console, Events, Progress, Sink, StatusFile
from jp_train.types import KINDS, Kind

STATUS_FILE = "status.json"
ENDED_WELL = ("finished", "stopped_early")


class RunLog:
    """Console, events.jsonl and status.json from the start; metrics.jsonl, wandb and TensorBoard from `open`."""

    def __init__(self, cfg: RunConfig, *, active: bool, dp_world_size: int) -> None:
        self._cfg = cfg
        self._active = active
        self._sinks: list[Sink] = []
        self._step = 0
        self._checkpoint: dict[str, Any] | None = None
        self._failed_saves = 0
        self._over = False
        self._begun = False
        self._dp_world_size = dp_world_size
        if not active:
            return
        self.folder = Path(cfg.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._progress = Progress(last_step(cfg.stage))
        self._console = Console(cfg.logging.every_steps, self._progress)
        self._events = Events(self.folder / "events.jsonl")
        self._status: StatusFile | None = None

    def begin(self) -> None:
        """The run will train: from here on status.json is about this attempt. (One that is refused leaves it as it
        is.)"""
        if self._active:
            self._status = self._new_status()

    def _new_status(self) -> StatusFile:
        return StatusFile(
            Path(self._cfg.run_dir) / STATUS_FILE,
            stage=self._cfg.stage.name,
            planned_steps=last_step(self._cfg.stage),
            training_steps=self._cfg.stage.training_steps,
            dp_world_size=self._dp_world_size,
        )

    def open(self, *, batch: BatchPlan, resumed_step: int | None, checkpoint: Mapping[str, Any] | None) -> None:
        """Start the sinks. `resumed_step`: completed steps of the checkpoint that is resumed, None for a new run."""
        if not self._active:
            return
        self._step = resumed_step or 0
        self._checkpoint = {"step": checkpoint["step"], "time": round(checkpoint["time"], 3)} if checkpoint else None
        self._sinks = [self._console]
        for sink in SINKS:
            try:
                if (opened := sink.opened(self._cfg, resumed_step)) is not None:
                    self._sinks.append(opened)
            except OSError as error:
                if sink.essential:
                    raise
                self._sink_failed(sink, error)
        for name in (LEDGER_FILE, SNAPSHOTS_FILE):
            drop_later_lines(self.folder / name, resumed_step or 0)
        self.say(f"{batch.describe()}; losses of a line are means since the line before")

    def say(self, text: str) -> None:
        """A line on the console."""
        if self._active:
            self._console.say(text)

    def event(self, name: str, step: int, **details: Any) -> None:
        """A line of events.jsonl."""
        if self._active:
            self._events.write(name, step, **details)

    def snapshot(self, plan_state: dict[str, Any]) -> None:
        """A line of plan_snapshots.jsonl, from which `jp-train data explain` reaches the steps that follow."""
        if self._active:
            append_snapshot(self.folder / SNAPSHOTS_FILE, plan_state)

    def saved(self, step: int) -> None:
        """A checkpoint was completed."""
        self._checkpoint = {"step": step, "time": round(time.time(), 3)}

    def save_failed(self, total: int) -> None:
        """A checkpoint could not be written; `total` of them since this attempt began."""
        self._failed_saves = total

    def step(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        loss_tokens: Mapping[Kind, float] = MappingProxyType({}),
        skipped_documents: int = 0,
        skipped_steps: int = 0,
    ) -> None:
        """All values of one step (or, at step 0, of the validation before training). `loss_tokens`: its supervised
        tokens by kind."""
        if not self._active:
            return
        self._step, self._begun = step, True
        self._console.loss_tokens = loss_tokens
        if "loss/total" in values:
            self._progress.tick()
        for sink in list(self._sinks):
            self._attempt(sink, partial(sink.log, step, values))
        status: dict[str, Any] = {
            "state": "running",
            "step": step,
            "checkpoint": self._checkpoint,
            "eta_s": self._progress.eta_s(step),
        }
        status |= {"failed_saves": self._failed_saves}
        if "loss/total" in values:
            status |= {
                "loss": values["loss/total"],
                "losses": {kind.value: values[f"loss/{kind}"] for kind in KINDS if f"loss/{kind}" in values},
                "step_s": values["time/step_s"],
                "data_wait_s": values["time/data_wait_s"],
                "tokens_per_s": values["perf/tokens_per_s"],
                "skipped_documents": skipped_documents,
                "skipped_steps": skipped_steps,
            }
        assert self._status is not None, "begin comes first"
        self._status.update(**status)

    def finish(self, stop: Stop, step: int) -> None:
        """The run ended as planned, or by a stop signal."""
        if not self._active:
            return
        self.event(
            "stopped_early" if stop.state == "stopped_early" else "stop",
            step,
            reason=stop.reason,
            state=stop.state,
            exit_code=stop.exit_code,
        )
        assert self._status is not None, "begin comes first"
        self._status.update(state=stop.state, reason=stop.reason, step=step, checkpoint=self._checkpoint, eta_s=0)
        if stop.exit_code:  # a signal: the last save is complete, or an error has ended the run instead
            self.say(f"{stop.reason}: saved at step {step}; run the same command to resume")
        else:
            self.say(f"{stop.state.replace('_', ' ')} after step {step}: {stop.reason}")
        self.close()

    def stalled(self, error: JpTrainError, details: Mapping[str, Any]) -> None:
        """The watchdog ends the run, from its thread and on any rank. What the training thread may still report about
        its end is left out."""
        self._over = True
        folder = Path(self._cfg.run_dir)
        events = self._events if self._active else Events(folder / "events.jsonl")
        events.write(
            "stalled",
            details["step"],
            error=type(error).__name__,
            reason=str(error),
            **{k: v for k, v in details.items() if k != "step"},
        )
        status = (self._status if self._active else None) or self._new_status()
        status.update(
            state="failed", reason=f"{type(error).__name__}: {error}", step=details["step"], checkpoint=self._checkpoint
        )

    def stopped_by_force(self, code: int) -> None:
        """A signal ends the run at once, before its first step or by its repetition. Called from another thread than
        the training one, whatever that does; the newest checkpoint stays."""
        if self._over or not self._active:
            return
        self._over = True
        name = Signals(code - 128).name
        reason = (
            f"signal {name}, sent twice: nothing was saved since the last checkpoint"
            if self._begun
            else f"signal {name} before the first step"
        )
        if self._status is not None:  # first: it is quick, and what people look at
            self._status.update(state="stopped_by_signal", reason=reason, step=self._step, checkpoint=self._checkpoint)
        self.event("stop", self._step, reason=reason, state="stopped_by_signal", exit_code=code)
        again = "resume" if self._checkpoint else "start again"
        self.say(f"{reason}; run the same command to {again}")

    def fail(self, error: BaseException) -> None:
        """The run ended with an error. An attempt that is refused leaves no trace in the folder of a run that has
        ended well."""
        if not self._active or self._over:
            return
        if self._status is None and _has_ended_well(self.folder / STATUS_FILE):
            return
        self.event("failed", self._step, error=type(error).__name__, reason=str(error))
        if self._status is None and not (self.folder / STATUS_FILE).exists():
            self._status = self._new_status()
        if self._status is not None:
            self._status.update(state="failed", reason=f"{type(error).__name__}: {error}", checkpoint=self._checkpoint)
        self.close()

    def close(self) -> None:
        """Close all sinks."""
        for sink in list(self._sinks):
            self._attempt(sink, sink.close)
        self._sinks = []

    def _attempt(self, sink: Sink, action: Callable[[], str | None]) -> None:
        """Run `action`; a sink that is not essential and fails is named and dropped: wandb's troubles may not end a
        run."""
        try:
            if trouble := action():
                self.event("sink_failed", self._step, sink=type(sink).__name__, reason=trouble)
                self.say(trouble)
        except Exception as error:
            if sink.essential:
                raise
            self._sinks.remove(sink)
            self._sink_failed(type(sink), error)

    def _sink_failed(self, sink: type[Sink], error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        self.event("sink_failed", self._step, sink=sink.__name__, reason=reason)
        self.say(f"{sink.__name__} failed and is off for the rest of this attempt: {reason}")

    def damaged(self, problem: str) -> None:
        """A checkpoint was passed over."""
        self.event("damaged_checkpoint", self._step, reason=problem)
        self.say(f"passed over a damaged checkpoint: {problem}")


def _has_ended_well(status: Path) -> bool:
    """Whether this is the status.json of a run with nothing left to do."""
    try:
        return (json_object(status.read_text(encoding="utf-8")) or {}).get("state") in ENDED_WELL
    except (OSError, UnicodeDecodeError):
        return False
