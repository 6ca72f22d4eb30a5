"""From a configuration to everything a training loop needs: data, model, engine, and the state of the checkpoint that
is resumed. `prepare` is the order; each step is a function of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train.config import BatchPlan, RunConfig, batch_plan, save_config
from jp_train.data.index import IndexProgress, SourceIndex, index_sources
from jp_train.data.ledger import Ledger, bad_share
from jp_train.data.loader import StepLoader, build_plan, validation_batches
from jp_train.data.plan import Plan
from jp_train.data.tokenizer import Tokenizer, load_tokenizer
from jp_train.data.vq_ids import IdsRecipe
from jp_train.data.vq_use import describe_use, use_stored_ids
from jp_train.engine.checkpoint.files import Checkpoint
from jp_train.engine.checkpoint.identity import environment
from jp_train.engine.checkpoint.saver import Saver
from jp_train.engine.checkpoint.store import CheckpointStore
from jp_train.engine.heldout import HeldOut
from jp_train.engine.init import Engine, Ranks, build_engine, gather_objects
from jp_train.engine.main_first import main_first
from jp_train.engine.proof import frozen_checksum
from jp_train.engine.state import TrainState
from jp_train.engine.vq_recipe import ids_recipe
from jp_train.engine.watch.guard import INDEXING, Pace, SequenceGuard
from jp_train.engine.watch.stop import SignalFlag
from jp_train.engine.watch.watchdog import Watchdog
from jp_train.errors import CheckpointError
from jp_train.model.export import RUN_CONFIG
from jp_train.model.start_weights import open_start
from jp_train.model.weight_places import export_folder
from jp_train.run.lock import unwritable
from jp_train.run.log import RunLog
from jp_train.run.reading import read_config
from jp_train.run.summary import template_change
from jp_train.terminal import ProgressLine
from jp_train.types import Kind

REPORT_S = 30.0
"""Seconds between two lines about an index that is being built."""


@dataclass(kw_only=True)
class Parts:
    """What one rank trains with, shared by the loop and its callbacks. The last three change from step to step."""

    cfg: RunConfig
    ranks: Ranks
    log: RunLog
    flag: SignalFlag
    tokenizer: Tokenizer
    engine: Engine
    loader: StepLoader
    held_out: HeldOut
    saver: Saver
    ledger: Ledger
    about: dict[str, Any]
    """What checkpoints are made with, for their manifests: packages, fingerprints, batch."""
    state: TrainState
    plan_state: dict[str, Any]
    """`Plan.state()` after the last completed step."""
    freeze_proof: dict[str, Any] | None = None
    """Set by the first step of every attempt (engine/proof.py)."""


@dataclass(frozen=True, kw_only=True)
class OpenData:
    """What a run reads: the tokenizer and the indexes of its sources. `ids_recipe`: what stored VQ ids must have been
    made with, None without generation sources."""

    tokenizer: Tokenizer
    indexes: list[SourceIndex]
    held_out_indexes: list[SourceIndex]
    ids_recipe: IdsRecipe | None


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
    guard = watchdog.guard
    batch = batch_plan(cfg, ranks.dp_world_size, shrink=checkpoint is not None)
    main_first(ranks, lambda: open_run_folder(cfg, log) if ranks.is_main else None)
    # headers only: weights that do not fit are not to be found after an hour of indexing
    main_first(ranks, lambda: open_start(cfg.model, cfg.stage.trainable) if ranks.is_main else None)
    data = open_data(cfg, ranks, log, guard)
    guard.enter("building the engine", pace=Pace.SLOW)
    plan = build_plan(cfg, data.indexes, batch, data.tokenizer)
    engine = open_engine(cfg, batch, ranks, log, data.tokenizer)
    saver = Saver(cfg, store, engine, log, saved_step=checkpoint.step if checkpoint else None)
    ledger = Ledger(Path(cfg.run_dir), cfg, write=ranks.is_main)
    if checkpoint is not None:
        guard.enter("restoring the checkpoint", pace=Pace.SLOW)
        resume(checkpoint, plan, saver, ledger)
    about = describe_inputs(ranks, data.tokenizer, engine)
    if checkpoint is not None:
        check_resumed_inputs(checkpoint, about)
    state = TrainState.restored(cfg, checkpoint.state["training"] if checkpoint else None)
    about |= {"batch": batch.describe()}
    if checkpoint is not None and checkpoint.step == cfg.checkpoint.resume_from:
        roll_back(store, log, checkpoint.step)
    begin_log(log, checkpoint, batch, ranks, engine, about)
    ledger.record_index(data.indexes)
    guard.enter("preparing the validation", pace=Pace.SLOW)
    held_out = open_held_out(cfg, ranks, log, data, engine, ledger)
    loader = StepLoader(cfg, plan, data.indexes, data.tokenizer, dp_rank=ranks.dp_rank,
                        dp_world_size=ranks.dp_world_size, batch_plan=batch)  # fmt: skip
    watchdog.follow(engine.guard, loader)
    return Parts(
        cfg=cfg,
        ranks=ranks,
        log=log,
        flag=flag,
        tokenizer=data.tokenizer,
        engine=engine,
        loader=loader,
        held_out=held_out,
        saver=saver,
        ledger=ledger,
        about=about,
        state=state,
        plan_state=plan.state(),
    )


def open_data(cfg: RunConfig, ranks: Ranks, log: RunLog, guard: SequenceGuard) -> OpenData:
    """The tokenizer and the index of every source, training and held out: read where they are stored, else built by
    rank 0 while the others wait. Collective.

    Raises ConfigError, DataError (also for `data.max_bad_share`), and CheckpointError when the VQ tokenizer's
    weights do not fit.
    """
    tokenizer = load_tokenizer(cfg.tokenizer)
    guard.enter(INDEXING, pace=Pace.FREE)
    log.say(f"indexing {len(cfg.data.sources) + len(cfg.validation.sources)} sources")
    report = IndexReport(log, guard)
    recipe = gather_objects(ranks, main_first(ranks, lambda: ids_recipe(cfg) if ranks.is_main else None))[0]
    indexes = main_first(
        ranks, lambda: use_stored_ids(cfg.data, index_sources(cfg, tokenizer, progress=report), recipe)
    )
    if recipe is not None:
        uses = [describe_use(index) for index in indexes if index.kind is Kind.GENERATION]
        log.say(f"VQ ids: {'; '.join(uses) or 'held-out only'}")
    held_out_indexes = main_first(
        ranks, lambda: index_sources(cfg, tokenizer, sources=cfg.validation.sources, progress=report)
    )
    for index in [*indexes, *held_out_indexes]:
        if index.passed_over:
            log.say(f"source {index.name}: {index.passed_over}")
    shares = [bad_share(index, cfg.data.max_bad_share) for index in indexes]
    shares += [bad_share(index, cfg.data.max_bad_share, "validation.sources") for index in held_out_indexes]
    for text in filter(None, shares):
        log.say(f"{text} (all are named in ledger.jsonl)")
    return OpenData(tokenizer=tokenizer, indexes=indexes, held_out_indexes=held_out_indexes, ids_recipe=recipe)


def open_engine(cfg: RunConfig, batch: BatchPlan, ranks: Ranks, log: RunLog, tokenizer: Tokenizer) -> Engine:
    """The engine with the stage's input weights; logs what is frozen and where the weights came from. Collective.

    Raises ConfigError and CheckpointError when the weights do not fit.
    """
    engine = build_engine(
        cfg, batch, ranks, n_sources=len(cfg.data.sources), image_token_id=tokenizer.special.image_placeholder
    )
    log.say(f"{engine.freeze_report.describe()}; weights: {engine.weights}")
    if ranks.is_main and cfg.validation.sources and (sentence := changed_template(cfg)):
        log.say(sentence)
    return engine


def changed_template(cfg: RunConfig) -> str:
    """A sentence where the stage asks in another form than the run that it starts from (a run folder, an export or a
    checkpoint); else empty."""
    if cfg.model.init_from is None:
        return ""
    folder = export_folder(cfg.model.init_from)
    before = read_config(folder / RUN_CONFIG) or read_config(folder / "config.yaml")
    stage = before.get("stage")
    template = stage.get("template") if isinstance(stage, dict) else None
    return template_change(template, cfg.stage.template.value, cfg.model.init_from)


def resume(checkpoint: Checkpoint, plan: Plan, saver: Saver, ledger: Ledger) -> None:
    """Put a checkpoint into a fresh plan, engine and ledger. Collective.

    Raises DataError when the plan is of other data, CheckpointError when the files are damaged or do not fit.
    """
    plan.restore(checkpoint.state["plan"])
    saver.restore(checkpoint)
    ledger.restore(checkpoint.state["ledger"])


RESUMED_INPUTS = {
    "tokenizer": "tokenizer.path",
    "frozen_checksum": "model.init_from",
    "vq_fingerprint": "VQ tokenizer (model.init_from or model.init_parts)",
}
"""What a resumed run must find unchanged where its configuration points: {key of the manifest: where it comes from}."""


def describe_inputs(ranks: Ranks, tokenizer: Tokenizer, engine: Engine) -> dict[str, Any]:
    """Packages and commit (rank 0 only), and the fingerprints named in RESUMED_INPUTS. Collective."""
    about = environment() if ranks.is_main else {}
    return about | {
        "tokenizer": tokenizer.fingerprint,
        "frozen_checksum": frozen_checksum(engine.model.named_parameters()),
        "vq_fingerprint": engine.vq.fingerprint(),
    }


def check_resumed_inputs(checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """Raises CheckpointError when the tokenizer, the frozen weights or the VQ tokenizer are not those that the
    checkpoint was made with: their places may move, their contents may not change."""
    for key, place in RESUMED_INPUTS.items():
        if checkpoint.manifest[key] != about[key]:
            raise CheckpointError(
                f"{checkpoint.path} was made with another {place}: what lies there now has other contents; put the "
                "old files back"
            )


def roll_back(store: CheckpointStore, log: RunLog, step: int) -> None:
    """Set aside what the run has beyond `step`, and say so; all that may be refused was refused before. Collective.
    Raises CheckpointError on every rank when it cannot be moved."""
    if (aside := store.set_aside(step)) is not None:
        log.event("rolled_back", step, from_step=aside.from_step, path=str(aside.folder))
        log.say(
            f"going back from step {aside.from_step} to {step}: what came after it lies in {aside.folder}, a run "
            "folder of its own"
        )


def begin_log(
    log: RunLog, checkpoint: Checkpoint | None, batch: BatchPlan, ranks: Ranks, engine: Engine, about: Mapping[str, Any]
) -> None:
    """Open the sinks at the step to go on from, and write the event `start` or `resume`."""
    step = checkpoint.step if checkpoint else 0
    log.open(
        batch=batch, resumed_step=step if checkpoint else None, checkpoint=checkpoint.manifest if checkpoint else None
    )
    details = {"dp_world_size": ranks.dp_world_size, "weights": engine.weights, **about}
    if checkpoint is None:
        log.event("start", step, **details)
        return
    log.snapshot(checkpoint.state["plan"])  # a crash right after the save may have come before its line
    change = resized(checkpoint, ranks.dp_world_size, batch)
    log.say(f"resumed {checkpoint.path} after step {step}{' with ' + change['resized'] if change else ''}")
    log.event("resume", step, **details, **change)


def open_held_out(cfg: RunConfig, ranks: Ranks, log: RunLog, data: OpenData, engine: Engine, ledger: Ledger) -> HeldOut:
    """This rank's batches of every held-out source, encoded; what cannot be used goes to the ledger. Collective."""
    batches = main_first(
        ranks,
        lambda: {
            name: validation_batches(cfg, data.tokenizer, name, ranks.dp_rank, ranks.dp_world_size, data.ids_recipe)
            for name in cfg.validation.sources
        },
    )
    skipped = [document for of_source in batches.values() for batch in of_source for document in batch.skipped]
    of_ranks = gather_objects(ranks, skipped)
    if lost := ledger.record_held_out(data.held_out_indexes, [document for rank in of_ranks for document in rank]):
        log.say(f"{lost} held-out documents cannot be used (named in ledger.jsonl)")
    return HeldOut(cfg, batches, engine, ranks)


class IndexReport:
    """Says how far the index is, every REPORT_S seconds: the other ranks wait for it without a time limit
    (engine/main_first.py)."""

    def __init__(self, log: RunLog, guard: SequenceGuard) -> None:
        self._log, self._guard, self._line = log, guard, ProgressLine("index", None, every_s=REPORT_S)

    def __call__(self, done: IndexProgress) -> None:
        self._guard.enter(INDEXING, pace=Pace.FREE)
        if not done.shards_done:
            self._line = ProgressLine("index", None, every_s=REPORT_S)
            self._log.say(f"index: {done.announcement()} (`jp-train data index` does it beforehand, in parallel)")
        elif text := self._line.text(done.bytes_done, done.bytes, *done.details()):
            self._log.say(text)


def open_run_folder(cfg: RunConfig, log: RunLog) -> None:
    """Say in the run folder that this attempt trains, and with which configuration. Raises ConfigError when it
    cannot be written."""
    try:
        log.begin()
        save_config(cfg, Path(cfg.run_dir) / "config.yaml")
    except OSError as error:
        raise unwritable(cfg.run_dir, error) from error


def resized(checkpoint: Checkpoint, dp_world_size: int, batch: BatchPlan) -> dict[str, str]:
    """For the `resume` event of a run that goes on with another number of ranks: what it was and what it is."""
    before = int(checkpoint.manifest["dp_world_size"])
    if before == dp_world_size:
        return {}
    return {"resized": f"{before} -> {dp_world_size} ranks ({checkpoint.manifest['batch']} -> {batch.describe()})"}
