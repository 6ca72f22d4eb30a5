"""When to save, what goes into a checkpoint, and what happens when a save fails (`checkpoint.on_error`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from jp_train.config import RunConfig, dump_config
from jp_train.config.choices import SaveErrorAction
from jp_train.engine.checkpoint import partitions
from jp_train.engine.checkpoint.files import Checkpoint
from jp_train.engine.checkpoint.identity import training_identity
from jp_train.engine.checkpoint.rollback import LOGS
from jp_train.engine.checkpoint.store import CheckpointStore, Content, Saved
from jp_train.engine.init import Engine
from jp_train.errors import CheckpointError


class SaveLog(Protocol):
    """What a Saver says, and to whom (`runlog.RunLog`)."""

    def say(self, text: str) -> None: ...

    def event(self, name: str, step: int, **details: Any) -> None: ...

    def saved(self, step: int) -> None: ...

    def save_failed(self, total: int) -> None: ...


class Saver:
    """Saves and restores one run's engine. Every method that is not a property is collective.

    `stall_s` is the time that training waited for the newest save so far: copying to host memory, handing over, and,
    where the disk is slower than the interval, waiting for the save before.
    """

    def __init__(
        self, cfg: RunConfig, store: CheckpointStore, engine: Engine, log: SaveLog, *, saved_step: int | None
    ) -> None:
        self.stall_s = 0.0
        self.longest_s = 0.0
        """Seconds that the longest save so far took, from its begin to its completion."""
        self.saved_step = saved_step
        """The step of the newest save that was begun and has not failed, or of the checkpoint that was resumed."""
        self._cfg = cfg
        self._store = store
        self._engine = engine
        self._log = log
        self._identity, self._config_text = training_identity(cfg), dump_config(cfg)
        self._reported = True
        self._failures_in_a_row = 0
        self._failures = 0
        self._with_frozen = cfg.model.init_from is None
        """Whether checkpoints hold what does not change too: where there is no other place that it came from."""

    def save(self, step: int, state: dict[str, Any], about: dict[str, Any], *, final: bool) -> None:
        """A checkpoint of `step` completed steps, unless there is one. `final`: the run ends; return when it is
        complete.

        Raises CheckpointError on every rank when a final save fails, or another one by `checkpoint.on_error`.
        """
        self.settle(step, final=False, tolerant=final)  # a final save is tried whatever became of the one before
        if self.saved_step == step:
            return
        self.stall_s, self._reported = 0.0, False
        with self._stalls():
            try:
                self._store.begin(step, self._content(state, about))
            except CheckpointError as error:
                self._failed(step, error, fatal=final)
                return
            self.saved_step = step
        if final or not self._cfg.checkpoint.background:
            self.settle(step, final=final)

    def poll(self, step: int) -> None:
        """At a step boundary: complete the save under way if all ranks have written it."""
        if self._store.pending_step is not None:
            self._complete(step, lambda: self._store.poll(), fatal=False)

    def settle(self, step: int, *, final: bool, tolerant: bool = False) -> None:
        """Wait for the save under way, and for the deletion of old checkpoints."""
        self._complete(step, self._store.settle, fatal=final, tolerant=tolerant)

    def values(self) -> dict[str, float]:
        """`checkpoint/stall_s` of a save since the last call, for metrics.jsonl."""
        if self._reported:
            return {}
        self._reported = True
        return {"checkpoint/stall_s": self.stall_s}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint into the fresh engine."""
        engine = self._engine.deepspeed
        partitions.partition_gathered(engine)
        self._store.load(checkpoint, lambda reader: partitions.fill(engine, reader), self._engine.vq)
        partitions.gather_persistent(engine)
        # the only copy of it, whatever init_from says now
        self._with_frozen |= bool(checkpoint.manifest["with_frozen"])
        engine.global_steps = checkpoint.step

    def _content(self, state: dict[str, Any], about: dict[str, Any]) -> Content:
        engine, init_from = self._engine.deepspeed, self._cfg.model.init_from
        with_frozen = self._with_frozen or init_from is None
        if init_from is not None and not with_frozen:
            about = {**about, "frozen_from": str(Path(init_from).resolve())}
        return Content(
            tensors=partitions.local_slices(engine, with_frozen=with_frozen),
            parameters=partitions.parameters(engine),
            optimizer_step=partitions.optimizer_step(engine),
            with_frozen=with_frozen,
            vq=[(f"model.{name}", tensor) for name, tensor in self._engine.vq.state_dict().items()]
            if with_frozen
            else (),
            state=state,
            identity=self._identity,
            config_text=self._config_text,
            about=about,
            logs=[Path(self._cfg.run_dir) / name for name in LOGS],
        )

    def _complete(self, step: int, action: Callable[[], Saved | None], *, fatal: bool, tolerant: bool = False) -> None:
        saved = failure = None
        with self._stalls():
            try:
                saved = action()
            except CheckpointError as error:
                failure = error
        problems = self._store.problems
        while problems:  # one by one: the deletion of old checkpoints may add to them meanwhile
            problem = problems.pop(0)
            self._log.event("save_problem", step, reason=problem)
            self._log.say(problem)
        if failure is not None:
            self.saved_step = None
            self._failed(step, failure, fatal=fatal, tolerant=tolerant)
        if saved is not None:
            self.longest_s = max(self.longest_s, saved.total_s)
            self._failures_in_a_row = 0
            self._log.saved(saved.step)
            self._log.event(
                "save",
                saved.step,
                path=str(saved.path),
                bytes=saved.bytes,
                stall_s=round(self.stall_s, 3),
                total_s=round(saved.total_s, 3),
            )

    def _failed(self, step: int, error: CheckpointError, *, fatal: bool, tolerant: bool = False) -> None:
        cfg = self._cfg.checkpoint
        self._failures += 1
        self._failures_in_a_row += 1
        self._log.save_failed(self._failures)
        self._log.event("save_failed", step, reason=str(error), in_a_row=self._failures_in_a_row)
        too_many = self._failures_in_a_row >= cfg.max_failed_saves
        if not tolerant and (fatal or cfg.on_error is SaveErrorAction.stop or too_many):
            hint = (
                f" ({self._failures_in_a_row} failed saves in a row)"
                if too_many and cfg.on_error is not SaveErrorAction.stop
                else ""
            )
            raise CheckpointError(
                f"{error}{hint}. The checkpoint before is untouched: resume from it with the same command"
            ) from error
        next_try = "with the last save" if tolerant else f"after step {step - step % cfg.every_steps + cfg.every_steps}"
        self._log.say(f"step {step}: the checkpoint was NOT saved, trying again {next_try}: {error}")

    @contextmanager
    def _stalls(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stall_s += time.perf_counter() - began
