"""One process of a training run: the lock of the run folder, stop signals, the watchdog, and the exit code.

`train` sets these up, lets `preparation.py` open data and engine, and hands over to `trainer.Trainer`, the loop.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jp_train.config import RunConfig
from jp_train.engine.checkpoint.resume import standing_of
from jp_train.engine.checkpoint.store import CheckpointStore
from jp_train.engine.device import told_out_of_memory
from jp_train.engine.init import Ranks, gather_objects, init_process_group, leave_process_group
from jp_train.engine.main_first import main_first
from jp_train.engine.watch.guard import Pace, is_collective_failure
from jp_train.engine.watch.stop import SignalFlag, Stop
from jp_train.engine.watch.watchdog import Watchdog
from jp_train.errors import JpTrainError, LaunchError
from jp_train.run.lock import RunLock, take, unwritable
from jp_train.run.log import RunLog
from jp_train.train.callbacks import standard_callbacks
from jp_train.train.preparation import prepare
from jp_train.train.trainer import Trainer


def train(cfg: RunConfig) -> int:
    """Train one stage on this rank, from its beginning or from its newest checkpoint. Returns the exit code.

    Every rank calls it with the same configuration; the environment says which rank this is (`engine/init.py`). 0: all
    planned steps are done, or an early stop; 128 + n: stopped by signal n after a save. Raises ConfigError, DataError,
    CheckpointError, LaunchError (another job trains in the folder, other ranks ended), and JpTrainError for a run that
    cannot go on (three non-finite steps in a row, a failed freeze proof, ranks that fell apart).
    """
    ranks = init_process_group(cfg)
    with exclusive_run_folder(cfg, ranks) as release_lock:
        return train_in_folder(cfg, ranks, release_lock)


@contextmanager
def exclusive_run_folder(cfg: RunConfig, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Holds the lock of run_dir for the duration of the block. Yields what releases it for a process that is about to
    end by force. Collective.

    Raises LaunchError on every rank when another job trains there, ConfigError when the folder cannot be written.
    """
    held: list[RunLock] = []
    try:
        try:
            main_first(ranks, lambda: held.append(lock_run_folder(cfg)) if ranks.is_main else None)
        except RuntimeError as error:
            if not is_collective_failure(error):
                raise
            raise LaunchError(
                f"rank {ranks.dp_rank}: another rank ended before training began; its own output is the cause: {error}"
            ) from error
        yield held[0].release_nowait if held else lambda: None
    finally:
        for lock in held:
            lock.release()


def lock_run_folder(cfg: RunConfig) -> RunLock:
    """The lock of run_dir. Raises LaunchError when another job holds it, ConfigError when it cannot be written."""
    try:
        return take(cfg.run_dir)
    except OSError as error:
        raise unwritable(cfg.run_dir, error) from error


def train_in_folder(cfg: RunConfig, ranks: Ranks, release_lock: Callable[[], None]) -> int:
    """`train` in a run folder that this job has locked; `release_lock` is called before an end by force."""
    log = RunLog(cfg, active=ranks.is_main, dp_world_size=ranks.dp_world_size)

    def exit_hook(code: int) -> None:
        log.stopped_by_force(code)
        release_lock()

    def end(code: int) -> None:
        release_lock()
        os._exit(code)

    try:
        attempt = gather_objects(ranks, uuid.uuid4().hex)[0]
        with (
            SignalFlag(exit_hook).installed() as flag,
            Watchdog(
                cfg,
                rank=ranks.dp_rank,
                world=ranks.dp_world_size,
                attempt=attempt,
                flag=flag,
                report=log.stalled,
                stopped=log.stopped_by_force,
                end=end,
            ) as watchdog,
            told_out_of_memory(ranks.dp_rank),
        ):
            stop = run_stage(cfg, ranks, log, flag, watchdog)
    except BaseException as error:
        log.fail(error)
        raise
    if stop is None:  # the collectives have failed: closing the process group could wait for ever
        return 128 + flag.number
    leave_process_group(stop.exit_code)
    return stop.exit_code


def run_stage(cfg: RunConfig, ranks: Ranks, log: RunLog, flag: SignalFlag, watchdog: Watchdog) -> Stop | None:
    """Resume or start, and train to the end. None: a stop signal came before the first step, and there is nothing to
    save."""
    store = CheckpointStore(Path(cfg.run_dir), cfg.checkpoint, dp_rank=ranks.dp_rank, dp_world_size=ranks.dp_world_size)
    standing = standing_of(cfg, store, on_damage=log.damaged)
    if standing.finished is not None:
        log.say(standing.nothing_to_do(cfg.run_dir))
        return standing.finished
    checkpoint = standing.checkpoint
    if standing.gone_back:
        log.say(
            f"the run has gone back to checkpoint.resume_from {cfg.checkpoint.resume_from} before: it goes on from its "
            "newest checkpoint"
        )
    if checkpoint is not None and standing.accepted:
        log.event("accepted_differences", checkpoint.step, differences=standing.accepted)
    try:
        with watchdog.guard.watch("starting", pace=Pace.SLOW):
            parts = prepare(cfg, ranks, log, store, checkpoint, flag, watchdog)
            trainer = Trainer(parts, standard_callbacks(parts))
    except JpTrainError as error:
        # a stop signal ends a starting rank at once, and one that obeys a moment earlier fails the collectives of the
        # others
        if not (is_collective_failure(error) and flag.arrives()):
            raise
        log.stopped_by_force(128 + flag.number)
        return None
    stop = trainer.run()
    watchdog.guard.enter("the end of the run", pace=Pace.SLOW)  # wandb may take its time
    log.finish(stop, parts.state.step)
    return stop
