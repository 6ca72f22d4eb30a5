"""From a configuration to everything a training loop needs: data, model, engine, and the state of the checkpoint
that is resumed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train.config import BatchPlan, RunConfig, batch_plan, save_config
from jp_train.data.index import IndexProgress, index_sources
from jp_train.data.ledger import Ledger
from jp_train.data.loader import StepLoader, build_plan, validation_batches
from jp_train.data.tokenizer import Tokenizer, load_tokenizer
from jp_train.data.vq_use import describe_use, use_stored_ids
from jp_train.engine.checkpoint.identity import environment
from jp_train.engine.checkpoint.saver import Saver
from jp_train.engine.checkpoint.store import Checkpoint, CheckpointStore
from jp_train.engine.forensics import Forensics
from jp_train.engine.heldout import HeldOut
from jp_train.engine.init import Engine, Ranks, build_engine, gather_objects
from jp_train.engine.main_first import main_first
from jp_train.engine.proof import frozen_checksum
from jp_train.engine.state import TrainState
from jp_train.engine.update_gate import UpdateGate
from jp_train.engine.vq_recipe import ids_recipe
from jp_train.engine.watch.guard import INDEXING, Pace, SequenceGuard
from jp_train.engine.watch.stop import GraceCheck, SignalFlag
from jp_train.engine.watch.watchdog import Watchdog
from jp_train.errors import CheckpointError, ConfigError
from jp_train.run.log import RunLog
from jp_train.run.sinks import format_seconds
from jp_train.types import Kind

REPORT_S = 30.0
"""Seconds between two lines about an index that is being built."""


@dataclass(kw_only=True)
class Parts:
    """What one rank trains with. `plan_state` is the plan's state after the last completed step; `proof` is set by
    the first step."""

    cfg: RunConfig
    batch: BatchPlan
    ranks: Ranks
    tokenizer: Tokenizer
    engine: Engine
    loader: StepLoader
    held_out: HeldOut
    saver: Saver
    log: RunLog
    flag: SignalFlag
    ledger: Ledger
    forensics: Forensics
    gate: UpdateGate
    state: TrainState
    about: dict[str, Any]
    plan_state: dict[str, Any]
    grace: GraceCheck
    proof: dict[str, Any] | None = None


def prepare(
    cfg: RunConfig,
    ranks: Ranks,
    log: RunLog,
    store: CheckpointStore,
    checkpoint: Checkpoint | None,
    flag: SignalFlag,
    watchdog: Watchdog,
) -> Parts:
    """Data, model, engine and, for a resumed run, the checkpoint's state in them. Cheap checks come before slow work.
    Collective.

    Raises ConfigError, DataError and CheckpointError, on every rank.
    """
    batch = batch_plan(cfg, ranks.dp_world_size, shrink=checkpoint is not None)
    main_first(ranks, lambda: open_run_folder(cfg, log) if ranks.is_main else None)
    tokenizer = load_tokenizer(cfg.tokenizer)
    watchdog.guard.enter(INDEXING, pace=Pace.FREE)
    log.say(f"indexing {len(cfg.data.sources) + len(cfg.validation.sources)} sources")
    told = IndexReport(log, watchdog.guard)
    recipe = gather_objects(ranks, main_first(ranks, lambda: ids_recipe(cfg) if ranks.is_main else None))[0]
    indexes = main_first(ranks, lambda: use_stored_ids(cfg.data, index_sources(cfg, tokenizer, progress=told), recipe))
    if recipe is not None:
        log.say(
            f"VQ ids: {'; '.join(describe_use(index) for index in indexes if index.kind is Kind.GENERATION) or 'held-out only'}"
        )
    held_indexes = main_first(
        ranks, lambda: index_sources(cfg, tokenizer, sources=cfg.validation.sources, progress=told)
    )
    watchdog.guard.enter("building the engine", pace=Pace.SLOW)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    engine = build_engine(
        cfg, batch, ranks, n_sources=len(cfg.data.sources), image_token_id=tokenizer.special.image_placeholder
    )
    log.say(f"{engine.freeze_report.describe()}; weights: {engine.weights}")

    saver = Saver(cfg, store, engine, log, saved_step=checkpoint.step if checkpoint else None)
    if checkpoint is not None:
        watchdog.guard.enter("restoring the checkpoint", pace=Pace.SLOW)
        plan.restore(checkpoint.state["plan"])
        saver.restore(checkpoint)
    about = environment() if ranks.is_main else {}
    frozen = frozen_checksum(engine.model.named_parameters())
    about |= {"tokenizer": tokenizer.fingerprint, "frozen_checksum": frozen, "vq_fingerprint": engine.vq.fingerprint()}
    if checkpoint is not None:
        for key, what in (
            ("tokenizer", "tokenizer.path"),
            ("frozen_checksum", "model.init_from"),
            ("vq_fingerprint", "VQ tokenizer (model.init_from or model.init_parts)"),
        ):
            if checkpoint.manifest[key] != about[key]:
                raise CheckpointError(
                    f"{checkpoint.path} was made with another {what}: what lies there now has other contents; put the old files back"
                )
    state = TrainState.restored(cfg, checkpoint.state["training"] if checkpoint else None)
    log.open(
        batch=batch,
        resumed_step=state.step if checkpoint else None,
        checkpoint=checkpoint.manifest if checkpoint else None,
    )
    if checkpoint is not None:
        log.snapshot(checkpoint.state["plan"])  # a crash right after the save may have come before its line
    about |= {"batch": batch.describe()}
    about_run = {"dp_world_size": ranks.dp_world_size, "weights": engine.weights, **about}
    if checkpoint:
        about_run |= resized(checkpoint, ranks.dp_world_size, batch)
        log.say(
            f"resumed {checkpoint.path} after step {state.step}{' with ' + about_run['resized'] if 'resized' in about_run else ''}"
        )
    log.event("resume" if checkpoint else "start", state.step, **about_run)
    ledger = Ledger(Path(cfg.run_dir), cfg, write=ranks.is_main)
    if checkpoint is not None:
        ledger.restore(checkpoint.state["ledger"])
    left_out = ledger.record_index(indexes)
    if left_out:
        log.say(f"the index leaves out {left_out} bad samples (named in ledger.jsonl)")
    watchdog.guard.enter("preparing the validation", pace=Pace.SLOW)
    names = list(cfg.validation.sources)
    held_batches = main_first(
        ranks,
        lambda: {n: validation_batches(cfg, tokenizer, n, ranks.dp_rank, ranks.dp_world_size, recipe) for n in names},
    )
    lost = gather_objects(ranks, [bad for own in held_batches.values() for batch in own for bad in batch.skipped])
    if held_lost := ledger.record_held_out(held_indexes, [bad for own in lost for bad in own]):
        log.say(f"{held_lost} held-out documents cannot be used (named in ledger.jsonl)")
    held_out = HeldOut(cfg, held_batches, engine, ranks)
    loader = StepLoader(
        cfg, plan, indexes, tokenizer, dp_rank=ranks.dp_rank, dp_world_size=ranks.dp_world_size, batch_plan=batch
    )
    watchdog.follow(engine.guard, loader)
    forensics = Forensics(cfg, ranks, tokenizer, engine.model, engine.deepspeed.optimizer)
    gate = UpdateGate(
        engine.deepspeed.optimizer,
        state.usual.judge,
        lambda _: forensics.inspect() if state.dumps < cfg.guard.max_dumps else None,
    )
    return Parts(
        cfg=cfg, batch=batch, ranks=ranks, tokenizer=tokenizer, engine=engine, loader=loader, held_out=held_out, saver=saver, log=log, flag=flag,
        ledger=ledger, forensics=forensics, gate=gate, state=state, about=about, plan_state=plan.state(), grace=GraceCheck(cfg.engine.grace_s),
    )  # fmt: skip


class IndexReport:
    """Tells how far the index is, every REPORT_S seconds: the other ranks wait for it without a time limit
    (engine/main_first.py)."""

    def __init__(self, log: RunLog, guard: SequenceGuard) -> None:
        self._log, self._guard = log, guard
        self._began = self._told = time.monotonic()

    def __call__(self, done: IndexProgress) -> None:
        self._guard.enter(INDEXING, pace=Pace.FREE)
        now = time.monotonic()
        if done.shards_done == 0:
            self._began = self._told = now
            self._log.say(f"index: {done.announcement()}")
        if now - self._told < REPORT_S or not done.bytes_done:
            return
        self._told = now
        left = (now - self._began) * (done.bytes - done.bytes_done) / done.bytes_done
        self._log.say(
            f"index: {done.shards_done} of {done.shards} shards, {done.samples:,} samples, ETA {format_seconds(left)} (`jp-train data index` does it "
            "beforehand, in parallel)"
        )


def open_run_folder(cfg: RunConfig, log: RunLog) -> None:
    """Say in the run folder that this attempt trains, and with which configuration. Raises ConfigError when it
    cannot be written."""
    try:
        log.begin()
        save_config(cfg, Path(cfg.run_dir) / "config.yaml")
    except OSError as error:
        raise unwritable(cfg, error) from error


def unwritable(cfg: RunConfig, error: OSError) -> ConfigError:
    """The error for a run folder that takes no file."""
    return ConfigError(
        f"run_dir {cfg.run_dir} cannot be written: {error}; make room or make it writable, or choose another run_dir"
    )


def resized(checkpoint: Checkpoint, dp_world_size: int, batch: BatchPlan) -> dict[str, str]:
    """For the `resume` event of a run that goes on with another number of ranks: what it was and what it is."""
    before = int(checkpoint.manifest["dp_world_size"])
    if before == dp_world_size:
        return {}
    return {"resized": f"{before} -> {dp_world_size} ranks ({checkpoint.manifest['batch']} -> {batch.describe()})"}
