"""What happens between two steps: each such thing is one `Callback`, and `standard_callbacks` lists them in order.

To add one (samples every N steps, an alarm), write a class here or in a file of its own and give it its place in that
list; the loop in `trainer.py` stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from jp_train.engine.metrics import exchange
from jp_train.engine.watch.guard import Pace
from jp_train.engine.watch.stop import GraceCheck, Stop, decide
from jp_train.train.preparation import Parts
from jp_train.types import Kind


@dataclass
class StepEnd:
    """A step boundary as the callbacks see it, one after the other. `step`: completed steps, 0 before the first.

    `values` are the step's metrics so far: what a callback before WriteMetrics adds is written with them. `stop` is why
    the run ends here, the same on all ranks; a callback that wants to end the run sets it where it is None, and never
    changes or clears it.
    """

    step: int
    values: dict[str, float]
    stop: Stop | None = None
    saved: bool = False
    """A checkpoint was made at this boundary."""
    loss_tokens: Mapping[Kind, float] = field(default_factory=dict)
    """Supervised tokens of the step by kind."""


class Callback(Protocol):
    """One thing that happens every N steps. Every rank calls the same callbacks in the same order, so that they may
    run collectives. Inherit from this class: what a callback leaves out does nothing."""

    def before_first_step(self, end: StepEnd) -> None:
        """Once in a run that starts anew (`end.step` is 0), not after a resume."""
        return None

    def after_step(self, end: StepEnd) -> None:
        """After every step; `end.stop` may be set by the step itself (last step, stop signal)."""
        return None


def standard_callbacks(parts: Parts) -> list[Callback]:
    """What every run does after a step, in this order.

    Validation comes before WriteMetrics, as its values stand in the step's line, and before Checkpoints, as its
    decision on patience decides whether the save is the last one. A save comes after the step's line, so that a
    checkpoint never knows a step that metrics.jsonl lacks.
    """
    return [GraceWarning(parts), Validation(parts), WriteMetrics(parts), Checkpoints(parts), PlanSnapshots(parts)]


class GraceWarning(Callback):
    """Says when a stop signal could no longer be obeyed in `engine.grace_s`."""

    def __init__(self, parts: Parts) -> None:
        self._saver, self._log = parts.saver, parts.log
        self._check = GraceCheck(parts.cfg.engine.grace_s)

    def after_step(self, end: StepEnd) -> None:
        if late := self._check.observe(end.values["time/step_s"], self._saver.longest_s):
            self._log.event("grace", end.step, reason=late)
            self._log.say(late)


class Validation(Callback):
    """Held-out losses before the first step, every `validation.every_steps` steps, and at a planned end; ends the run
    when patience is over (measurements at the end do not count for it)."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def before_first_step(self, end: StepEnd) -> None:
        if self._parts.held_out:
            end.values |= self._measure()

    def after_step(self, end: StepEnd) -> None:
        parts, every = self._parts, self._parts.cfg.validation.every_steps
        due = bool(every) and end.step % every == 0
        planned_end = end.stop is not None and not end.stop.exit_code
        if not parts.held_out or not (due or planned_end):
            return
        measured = self._measure()
        end.values |= measured
        if due and parts.state.patience.observe(measured["val/total"]) and end.stop is None:
            end.stop = decide(parts.cfg.stage, step=end.step, signal_number=0, patience_over=True)
        end.stop = end.stop or signalled(parts)

    def _measure(self) -> dict[str, float]:
        with self._parts.engine.guard.watch("validation", pace=Pace.SLOW):
            return self._parts.held_out.measure(self._parts.engine)


class WriteMetrics(Callback):
    """The step's line to all sinks."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def before_first_step(self, end: StepEnd) -> None:
        if end.values:
            self._parts.log.step(0, end.values)

    def after_step(self, end: StepEnd) -> None:
        parts = self._parts
        parts.log.step(
            end.step,
            end.values,
            loss_tokens=end.loss_tokens,
            skipped_documents=parts.ledger.skipped,
            skipped_steps=parts.state.skips.total,
        )


class Checkpoints(Callback):
    """A save every `checkpoint.every_steps` steps and a last one, complete on return, when the run ends."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def after_step(self, end: StepEnd) -> None:
        parts = self._parts
        # otherwise the last save waits for the one under way, and is made whatever becomes of that
        if end.stop is None:
            with parts.engine.guard.watch("the completion of a checkpoint", pace=Pace.SLOW):
                parts.saver.poll(end.step)
        if end.stop is None and end.step % parts.cfg.checkpoint.every_steps:
            return
        self._save(end, final=end.stop is not None)
        if end.stop is None and (stop := signalled(parts)) is not None:
            end.stop = stop
            self._save(end, final=True)  # nothing more to write, but to wait for

    def _save(self, end: StepEnd, *, final: bool) -> None:
        """A checkpoint of the last completed step, unless there is one; a `final` one is complete on return."""
        parts, proof = self._parts, self._parts.freeze_proof
        state: dict[str, Any] = {
            "training": parts.state.saved(),
            "plan": parts.plan_state,
            "ledger": parts.ledger.state(),
            "freeze_proof": proof,
        }
        about = {
            **parts.about,
            "stage": parts.cfg.stage.name,
            "freeze_proof": proof,
            "val/total": end.values.get("val/total"),
        }
        if (back_to := parts.cfg.checkpoint.resume_from) is not None:
            about["resume_from"] = back_to  # a later attempt knows that the run has gone back
        with parts.engine.guard.watch("a checkpoint save", pace=Pace.SLOW):
            parts.saver.save(end.step, state, about, final=final)
        parts.log.snapshot(parts.plan_state)
        end.saved = True


class PlanSnapshots(Callback):
    """The plan's state every `data.snapshot_steps` steps, unless a save has just written it."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def after_step(self, end: StepEnd) -> None:
        if not end.saved and end.step % self._parts.cfg.data.snapshot_steps == 0:
            self._parts.log.snapshot(self._parts.plan_state)


def signalled(parts: Parts) -> Stop | None:
    """Whether a stop signal has reached any rank: asked after what may take longer than a step, whose own exchange
    carries it. Collective."""
    with parts.engine.guard.watch("the exchange of signals"):
        number = int(exchange(torch.tensor([float(parts.flag.number)], device=parts.ranks.device)).max())
    return decide(parts.cfg.stage, step=parts.state.step, signal_number=number, patience_over=False)
