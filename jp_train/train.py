"""Training one stage: start here.

`train` prepares everything and hands over to `Trainer.run`, the loop; `Trainer.train_step` is one optimizer step. A step is honest about
tokens: all its micro-batches are fetched first, their supervised positions are counted and summed over ranks once, and every micro-batch then
contributes its summed loss divided by that number (`engine/objective.py`).

`step` counts completed steps: metrics line, checkpoint and status of step n are those after n updates, made of the rows of plan step n - 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jp_train.config import BatchPlan, RunConfig, batch_plan, dump_config, save_config
from jp_train.data.index import index_sources
from jp_train.data.ledger import Ledger
from jp_train.data.loader import StepLoader, build_plan, validation_batches
from jp_train.data.tokenizer import Tokenizer, load_tokenizer
from jp_train.engine.checkpoint import Checkpoint, CheckpointStore, refuse_other_configuration, refuse_other_world
from jp_train.engine.export import export
from jp_train.engine.guard import compare_signatures
from jp_train.engine.heldout import HeldOut
from jp_train.engine.identity import environment, identity
from jp_train.engine.init import (
    Engine,
    Ranks,
    build_engine,
    gather_objects,
    init_process_group,
    leave_process_group,
    main_first,
)
from jp_train.engine.objective import SupervisedTotals, count_supervised, micro_batch_loss
from jp_train.engine.optim import learning_rate, set_learning_rate
from jp_train.engine.proof import FreezeWatch, frozen_checksum
from jp_train.engine.state import TrainState
from jp_train.engine.stop import MAX_CONSECUTIVE_SKIPS, SignalFlag, Stop, decide
from jp_train.errors import CheckpointError, DataError, JpTrainError
from jp_train.metrics import StepTally, StepTotals, exchange, step_values
from jp_train.model.flops import BatchStatistics, step_flops
from jp_train.model.freeze import module_of
from jp_train.model.vq import fill_pending
from jp_train.runlog import RunLog
from jp_train.types import PackedBatch


def train(cfg: RunConfig) -> int:
    """Train one stage on this rank, from its beginning or from its newest checkpoint. Returns the exit code.

    Every rank calls it with the same configuration; the environment says which rank this is (`engine/init.py`). 0: all planned steps are done, or
    an early stop; 128 + n: stopped by signal n after a save. Raises ConfigError, DataError, CheckpointError, and JpTrainError for a run that
    cannot go on (three non-finite steps in a row, a failed freeze proof, ranks that fell apart).
    """
    ranks = init_process_group(cfg)
    log = RunLog(cfg, active=ranks.is_main, dp_world_size=ranks.dp_world_size)
    try:
        with SignalFlag().installed() as flag:
            store = CheckpointStore(Path(cfg.run_dir), cfg.checkpoint, dp_rank=ranks.dp_rank, dp_world_size=ranks.dp_world_size)
            checkpoint = store.newest(on_damage=log.damaged)
            if checkpoint is not None:
                refuse_other_configuration(checkpoint, identity(cfg))
            stop = finished_before(cfg, checkpoint)
            if stop is None:
                trainer = prepare(cfg, ranks, log, store, checkpoint, flag)
                stop = trainer.run()
                log.finish(stop, trainer.state.step)
            else:
                log.say(f"nothing to do, {cfg.run_dir} is finished ({stop.reason}); to train on, raise its steps or use another run_dir")
    except BaseException as error:
        log.fail(error)
        raise
    leave_process_group()
    return stop.exit_code


def finished_before(cfg: RunConfig, checkpoint: Checkpoint | None) -> Stop | None:
    """Why nothing is left to do, None when there is: steps, or a missing export."""
    if checkpoint is None or (cfg.checkpoint.export_at_end and not (Path(cfg.run_dir) / "export").is_dir()):
        return None
    state = TrainState.restored(cfg, checkpoint.state["training"])
    return decide(cfg.stage, step=state.step, signal_number=0, patience_over=state.patience.over)


def prepare(cfg: RunConfig, ranks: Ranks, log: RunLog, store: CheckpointStore, checkpoint: Checkpoint | None, flag: SignalFlag) -> Trainer:
    """Data, model, engine and, for a resumed run, the checkpoint's state in them. Cheap checks come before slow work. Collective."""
    batch = batch_plan(cfg, ranks.dp_world_size)
    if checkpoint is not None:
        refuse_other_world(checkpoint, ranks.dp_world_size)
    log.begin()
    if ranks.is_main:
        save_config(cfg, Path(cfg.run_dir) / "config.yaml")
    tokenizer = load_tokenizer(cfg.tokenizer)
    log.say(f"indexing {len(cfg.data.sources) + len(cfg.validation.sources)} sources")
    indexes = main_first(ranks, lambda: index_sources(cfg, tokenizer))
    plan = build_plan(cfg, indexes, batch, tokenizer)
    engine = build_engine(cfg, batch, ranks, n_sources=len(cfg.data.sources), image_token_id=tokenizer.special.image_placeholder)
    log.say(f"{engine.freeze_report.describe()}; weights: {engine.weights}")

    about = environment() if ranks.is_main else {}
    about |= {"tokenizer": tokenizer.fingerprint, "frozen_checksum": frozen_checksum(engine.model.named_parameters())}
    if checkpoint is not None:
        for key, what in (("tokenizer", "tokenizer.path"), ("frozen_checksum", "model.init_from")):
            if checkpoint.manifest[key] != about[key]:
                raise CheckpointError(
                    f"{checkpoint.path} was made with another {what}: what lies there now has other contents; put the old files back"
                )
        store.load(engine.deepspeed, checkpoint)
        plan.restore(checkpoint.state["plan"])
    state = TrainState.restored(cfg, checkpoint.state["training"] if checkpoint else None)
    log.open(batch=batch, resumed_step=state.step if checkpoint else None, checkpoint=checkpoint.manifest if checkpoint else None)
    about_run = {"dp_world_size": ranks.dp_world_size, "batch": batch.describe(), "weights": engine.weights, **about}
    log.event("resume" if checkpoint else "start", state.step, **about_run)
    if checkpoint:
        log.say(f"resumed {checkpoint.path} after step {state.step}")
    ledger = Ledger(Path(cfg.run_dir), cfg, write=ranks.is_main)
    if checkpoint is not None:
        ledger.restore(checkpoint.state["ledger"])
    left_out = ledger.record_index(indexes)
    if left_out:
        log.say(f"the index leaves out {left_out} bad samples (named in ledger.jsonl)")
    names = list(cfg.validation.sources)
    held_out = HeldOut(
        cfg,
        main_first(ranks, lambda: {n: validation_batches(cfg, tokenizer, n, ranks.dp_rank, ranks.dp_world_size) for n in names}),
        engine,
        ranks,
    )
    loader = StepLoader(cfg, plan, indexes, tokenizer, dp_rank=ranks.dp_rank, dp_world_size=ranks.dp_world_size, batch_plan=batch)
    return Trainer(
        cfg=cfg, batch=batch, ranks=ranks, tokenizer=tokenizer, engine=engine, loader=loader, held_out=held_out, store=store, log=log, flag=flag,
        ledger=ledger, state=state, about=about, plan_state=plan.state(), saved_step=state.step if checkpoint else -1,
    )  # fmt: skip


@dataclass
class Trainer:
    """One rank's run. `plan_state` is the plan's state after the last completed step; `proof` is set by the first step."""

    cfg: RunConfig
    batch: BatchPlan
    ranks: Ranks
    tokenizer: Tokenizer
    engine: Engine
    loader: StepLoader
    held_out: HeldOut
    store: CheckpointStore
    log: RunLog
    flag: SignalFlag
    ledger: Ledger
    state: TrainState
    about: dict[str, Any]
    plan_state: dict[str, Any]
    saved_step: int
    proof: dict[str, Any] | None = None

    def run(self) -> Stop:
        """Train until a stop rule says so; then save, export, and tell why."""
        cfg, state, log = self.cfg, self.state, self.log
        steps = iter(self.loader)
        stop = decide(cfg.stage, step=state.step, signal_number=0, patience_over=state.patience.over)
        if state.step == 0 and self.held_out:
            log.step(0, self.validate())
        while stop is None:
            began = time.perf_counter()
            micro_batches, plan_state, totals = self.next_step(steps)
            data_wait_s = time.perf_counter() - began
            result = self.train_step(micro_batches, totals, began=began, data_wait_s=data_wait_s)
            self.plan_state = plan_state
            state.step += 1
            self.account(result, micro_batches)
            stop = decide(cfg.stage, step=state.step, signal_number=result.totals.signal, patience_over=False)
            values = result.values
            due = cfg.validation.every_steps and state.step % cfg.validation.every_steps == 0
            ends = stop is not None and not stop.exit_code
            if self.held_out and (due or ends):
                measured = self.validate()
                values |= measured
                if due and state.patience.observe(measured["val/total"]) and stop is None:
                    stop = decide(cfg.stage, step=state.step, signal_number=0, patience_over=True)
            log.step(state.step, values, skipped_documents=self.ledger.skipped, skipped_steps=state.skips.total)
            if stop is not None or state.step % cfg.checkpoint.every_steps == 0:
                self.save()
        self.loader.close()
        if stop.exit_code == 0 and cfg.checkpoint.export_at_end:
            self.export()
        return stop

    def train_step(self, micro_batches: Sequence[PackedBatch], totals: SupervisedTotals, *, began: float, data_wait_s: float) -> StepResult:
        """One optimizer step on this rank's micro-batches (CPU); `totals` are the supervised positions of the step over all ranks."""
        cfg, engine, world = self.cfg, self.engine.deepspeed, self.ranks.dp_world_size
        guard, tally = self.engine.guard, StepTally(len(cfg.data.sources))
        lr = learning_rate(cfg.optimizer, cfg.stage.training_steps, self.state.step)
        set_learning_rate(engine.optimizer, lr, self.engine.groups.lr_scales)
        watch = None if self.proof else FreezeWatch(self.engine.model.named_parameters(), module_of, len(micro_batches))
        guard.begin_step(self.state.step + 1)
        for number, batch in enumerate(micro_batches):
            tally.count(batch)
            batch = fill_pending(batch.to(self.ranks.device), self.engine.vq)
            with guard.watch("forward", number):
                terms = engine(batch)
            loss = micro_batch_loss(terms, totals, cfg.loss)
            tally.add_losses(terms, loss)
            with guard.watch("backward", number):
                engine.backward(loss * world, scale_wrt_gas=False)  # ZeRO-3 averages over ranks; the totals already cover accumulation
            with guard.watch("step", number):
                engine.step()  # updates after the last micro-batch
        grad_norm = float(engine.get_global_grad_norm())
        applied = engine.was_step_applied()
        if watch is not None:
            self.proof = watch.finish(step=self.state.step + 1, grad_norm=grad_norm, applied=applied).as_dict()
            self.log.event("freeze_proof", self.state.step + 1, **self.proof)
        vector = tally.vector(
            step_s=time.perf_counter() - began, data_wait_s=data_wait_s, signal_number=self.flag.number, signature=guard.signature
        )
        with guard.watch("the exchange of metrics"):
            table = StepTotals(tally.n_sources, exchange(vector))
        compare_signatures(table.signatures, self.state.step + 1)
        return StepResult(table, applied, self.step_values(table, lr, grad_norm))

    def next_step(self, steps: Any) -> tuple[Sequence[PackedBatch], dict[str, Any], SupervisedTotals]:
        """This rank's micro-batches of the next step, and the supervised positions of all ranks: the step's ONE reduction before the first forward.

        A rank whose data failed takes part in the reduction, so that all ranks raise the same DataError at the same step.
        """
        failure: JpTrainError | None = None
        item, mine = None, SupervisedTotals(0, 0, 0)
        try:
            item = next(steps)
            mine = count_supervised(item.micro_batches)
        except JpTrainError as error:
            failure = error
        counts = torch.tensor([mine.text_tokens, mine.image_tokens, mine.documents, int(failure is not None)], device=self.ranks.device)
        with self.engine.guard.watch(f"the count of supervised tokens of step {self.state.step + 1}"):
            if self.ranks.dp_world_size > 1:
                dist.all_reduce(counts)
        text, image, documents, failed = counts.tolist()
        if failed:
            reasons = gather_objects(self.ranks, str(failure) if failure else None)
            if failure is not None:
                raise failure
            raise DataError("; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason))
        assert item is not None and item.step == self.state.step, (
            f"the loader is at step {item and item.step}, the trainer at {self.state.step}"
        )
        return item.micro_batches, item.plan_state, SupervisedTotals(text, image, documents)

    def account(self, result: StepResult, micro_batches: Sequence[PackedBatch]) -> None:
        """Skipped documents to the ledger, skipped updates to events.jsonl; raises when a budget is over, on all ranks at the same step."""
        state, step = self.state, self.state.step
        state.tokens += int(result.values["tokens/total"])
        skipped = []
        if result.totals.skipped:  # the same number on every rank, so all gather or none
            skipped = [
                document for own in gather_objects(self.ranks, [d for batch in micro_batches for d in batch.skipped]) for document in own
            ]
        self.ledger.record(skipped, dict(zip(self.cfg.data.sources, result.totals.source_samples(), strict=True)), step)
        too_many = state.skips.observe(result.applied)
        if not result.applied:
            rows = [
                row
                for own in gather_objects(self.ranks, [explained(row) for batch in micro_batches for row in batch.provenance])
                for row in own
            ]
            loss, norm = result.values["loss/total"], result.values["optim/grad_norm"]
            self.log.event("spike", step, reason="the gradient is not finite: update skipped", loss=loss, grad_norm=norm, rows=rows)
            self.log.say(f"step {step}: the gradient is not finite, the update was skipped (rows in events.jsonl)")
        if too_many:
            raise JpTrainError(
                f"{MAX_CONSECUTIVE_SKIPS} updates in a row were skipped because the gradient is not finite, the last at step {step}. The weights are those "
                "of the last good step; events.jsonl names the rows. Lower optimizer.lr, or look at those rows with `jp-train data explain`"
            )

    def step_values(self, totals: StepTotals, lr: float, grad_norm: float) -> dict[str, float]:
        """The metrics of one step."""
        cfg = self.cfg
        single = {name: int(totals.total(name)[0]) for name in ("squared_lengths", "und_images", "gen_images")}
        statistics = BatchStatistics(
            tokens=int(sum(totals.total("kind_all_tokens"))),
            text_positions=int(totals.total("text_tokens")[0]),
            image_positions=int(totals.total("image_tokens")[0]),
            **single,
        )
        return step_values(
            totals,
            source_names=list(cfg.data.sources),
            ratio_unit=cfg.stage.ratio_unit,
            lr=lr,
            grad_norm=grad_norm,
            flops=step_flops(cfg.model, statistics, cfg.stage.trainable).total,
            peak_flops=cfg.logging.peak_tflops * 1e12 * self.ranks.dp_world_size,
        )

    def validate(self) -> dict[str, float]:
        """Held-out losses. Collective."""
        with self.engine.guard.watch("validation"):
            return self.held_out.measure(self.engine)

    def save(self) -> None:
        """A checkpoint of the last completed step, unless there is one. Collective."""
        if self.saved_step == self.state.step:
            return
        began = time.perf_counter()
        with self.engine.guard.watch("a checkpoint save"):
            path = self.store.save(
                self.engine.deepspeed,
                step=self.state.step,
                state={"training": self.state.saved(), "plan": self.plan_state, "ledger": self.ledger.state(), "freeze_proof": self.proof},
                identity=identity(self.cfg),
                config_text=dump_config(self.cfg),
                about={**self.about, "stage": self.cfg.stage.name, "freeze_proof": self.proof},
                with_frozen=self.cfg.model.init_from is None,
            )
        self.saved_step = self.state.step
        self.log.saved(self.state.step)
        self.log.event("save", self.state.step, path=str(path), seconds=round(time.perf_counter() - began, 3))

    def export(self) -> None:
        """The folder that the next stage starts from. Collective."""
        path = Path(self.cfg.run_dir) / "export"
        self.log.say(f"exporting to {path}")
        with self.engine.guard.watch("the export"):
            export(
                self.engine,
                path,
                tokenizer=self.tokenizer,
                precision=self.cfg.precision,
                config_text=dump_config(self.cfg),
                is_main=self.ranks.is_main,
            )
        self.log.event("export", self.state.step, path=str(path))


@dataclass(frozen=True)
class StepResult:
    """What one step gave: the exchanged table, whether the update was applied, and its metrics."""

    totals: StepTotals
    applied: bool
    values: dict[str, float]


def explained(row: Sequence[Any]) -> list[list[Any]]:
    """The documents of a row as [source, shard, key, first token, tokens]."""
    return [[document.source, document.shard, document.key, document.start, document.length] for document in row]
