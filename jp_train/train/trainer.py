"""Training one stage: start here.

`train` prepares everything and hands over to `Trainer.run`, the loop; `Trainer.train_step` is one optimizer step. A
step is honest about
tokens: all its micro-batches are fetched first, their supervised positions are counted and summed over ranks once, and
every micro-batch then contributes its summed loss divided by that number (`engine/objective.py`).

`step` counts completed steps: metrics line, checkpoint and status of step n are those after n updates, made of the rows
of plan step n - 1.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jp_train.config import RunConfig, dump_config
from jp_train.engine.checkpoint.identity import accepted_differences, identity
from jp_train.engine.checkpoint.store import Checkpoint, CheckpointStore
from jp_train.engine.export import export
from jp_train.engine.init import Ranks, gather_objects, init_process_group, leave_process_group
from jp_train.engine.main_first import main_first
from jp_train.engine.metrics import StepTally, StepTotals, exchange, step_values
from jp_train.engine.objective import SupervisedTotals, count_supervised, micro_batch_loss
from jp_train.engine.optim import learning_rate, set_learning_rate
from jp_train.engine.outliers import Verdict
from jp_train.engine.proof import FreezeWatch, refuse_leaks
from jp_train.engine.state import TrainState
from jp_train.engine.watch.guard import WAITING_FOR_DATA, Pace, compare_signatures, is_collective_failure
from jp_train.engine.watch.stop import SignalFlag, Stop, decide
from jp_train.engine.watch.watchdog import Watchdog
from jp_train.errors import DataError, JpTrainError, LaunchError
from jp_train.model.flops import BatchStatistics, step_flops
from jp_train.model.freeze import module_of
from jp_train.model.vq import fill_pending
from jp_train.run.lock import RunLock, take
from jp_train.run.log import RunLog
from jp_train.train.preparation import Parts, prepare, unwritable
from jp_train.types import PackedBatch


def train(cfg: RunConfig) -> int:
    """Train one stage on this rank, from its beginning or from its newest checkpoint. Returns the exit code.

    Every rank calls it with the same configuration; the environment says which rank this is (`engine/init.py`). 0: all
    planned steps are done, or an early stop; 128 + n: stopped by signal n after a save. Raises ConfigError, DataError,
    CheckpointError, and JpTrainError for a run that cannot go on (three non-finite steps in a row, a failed freeze
    proof, ranks that fell apart).
    """
    ranks = init_process_group(cfg)
    with folder_to_itself(cfg, ranks) as give_back:
        return train_with(cfg, ranks, give_back)


@contextmanager
def folder_to_itself(cfg: RunConfig, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Nobody else trains in run_dir inside the block. Gives what a process calls that ends by force inside it.
    Collective.

    Raises LaunchError on every rank when another job trains there, ConfigError when the folder cannot be written.
    """
    held: list[RunLock] = []
    try:
        try:
            main_first(ranks, lambda: held.append(locked(cfg)) if ranks.is_main else None)
        except RuntimeError as error:
            if not is_collective_failure(error):
                raise
            raise LaunchError(
                f"rank {ranks.dp_rank}: another rank ended before training began; its own output is the cause: {error}"
            ) from error
        yield held[0].abandon if held else lambda: None
    finally:
        for lock in held:
            lock.release()


def locked(cfg: RunConfig) -> RunLock:
    """The lock of the run folder."""
    try:
        return take(cfg.run_dir)
    except OSError as error:
        raise unwritable(cfg, error) from error


def train_with(cfg: RunConfig, ranks: Ranks, give_back: Callable[[], None]) -> int:
    """`train` in a run folder of its own; `give_back` is called before an end by force."""
    log = RunLog(cfg, active=ranks.is_main, dp_world_size=ranks.dp_world_size)

    def last_words(code: int) -> None:
        log.stopped_by_force(code)
        give_back()

    def end(code: int) -> None:
        give_back()
        os._exit(code)

    try:
        attempt = gather_objects(ranks, uuid.uuid4().hex)[0]
        with (
            SignalFlag(last_words).installed() as flag,
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
        ):
            store = CheckpointStore(
                Path(cfg.run_dir), cfg.checkpoint, dp_rank=ranks.dp_rank, dp_world_size=ranks.dp_world_size
            )
            checkpoint = store.newest(on_damage=log.damaged)
            if checkpoint is not None:
                accepted = accepted_differences(
                    checkpoint.path, checkpoint.manifest["identity"], identity(cfg), cfg.checkpoint.accept
                )
                if accepted:
                    log.event("accepted_differences", checkpoint.step, differences=accepted)
            stop = finished_before(cfg, checkpoint)
            if stop is None:
                try:
                    with watchdog.guard.watch("starting", pace=Pace.SLOW):
                        trainer = Trainer(**vars(prepare(cfg, ranks, log, store, checkpoint, flag, watchdog)))
                except JpTrainError as error:
                    # a stop signal ends a starting rank at once, and one that obeys a moment earlier fails the
                    # collectives of the others
                    if not (is_collective_failure(error) and flag.arrives()):
                        raise
                    log.stopped_by_force(128 + flag.number)
                    return 128 + flag.number
                stop = trainer.run()
                watchdog.guard.enter("the end of the run", pace=Pace.SLOW)  # wandb may take its time
                log.finish(stop, trainer.state.step)
            else:
                log.say(
                    f"nothing to do, {cfg.run_dir} is finished ({stop.reason}); to train on, raise its steps or use another run_dir"
                )
    except BaseException as error:
        log.fail(error)
        raise
    leave_process_group(stop.exit_code)
    return stop.exit_code


def finished_before(cfg: RunConfig, checkpoint: Checkpoint | None) -> Stop | None:
    """Why nothing is left to do, None when there is: steps, or a missing export."""
    if checkpoint is None or (cfg.checkpoint.export_at_end and not (Path(cfg.run_dir) / "export").is_dir()):
        return None
    state = TrainState.restored(cfg, checkpoint.state["training"])
    return decide(cfg.stage, step=state.step, signal_number=0, patience_over=state.patience.over)


class Trainer(Parts):
    """One rank's run with its parts (`preparation.py` beside this file)."""

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
            with self.engine.guard.watch("the accounts of the step", pace=Pace.SLOW):
                self.account(result, micro_batches)
            stop = decide(cfg.stage, step=state.step, signal_number=result.totals.signal, patience_over=False)
            values = result.values | self.saver.values()
            if late := self.grace.observe(values["time/step_s"], self.saver.longest_s):
                log.event("grace", state.step, reason=late)
                log.say(late)
            due = cfg.validation.every_steps and state.step % cfg.validation.every_steps == 0
            ends = stop is not None and not stop.exit_code
            if self.held_out and (due or ends):
                measured = self.validate()
                values |= measured
                if due and state.patience.observe(measured["val/total"]) and stop is None:
                    stop = decide(cfg.stage, step=state.step, signal_number=0, patience_over=True)
                stop = stop or self.asked_to_stop()
            log.step(state.step, values, skipped_documents=self.ledger.skipped, skipped_steps=state.skips.total)
            # otherwise the last save waits for the one under way, and is made whatever becomes of that
            if stop is None:
                with self.engine.guard.watch("the completion of a checkpoint", pace=Pace.SLOW):
                    self.saver.poll(state.step)
            if stop is not None or state.step % cfg.checkpoint.every_steps == 0:
                self.save(held_out_loss=values.get("val/total"), final=stop is not None)
                if stop is None and (stop := self.asked_to_stop()) is not None:
                    # nothing more to write, but to wait for
                    self.save(held_out_loss=values.get("val/total"), final=True)
            elif state.step % cfg.data.snapshot_steps == 0:
                log.snapshot(plan_state)
        self.loader.close()
        if stop.exit_code == 0 and cfg.checkpoint.export_at_end:
            self.export()
        return stop

    def train_step(
        self, micro_batches: Sequence[PackedBatch], totals: SupervisedTotals, *, began: float, data_wait_s: float
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches (CPU); `totals` are the supervised positions of the step
        over all ranks."""
        cfg, engine, world = self.cfg, self.engine.deepspeed, self.ranks.dp_world_size
        guard, tally = self.engine.guard, StepTally(len(cfg.data.sources))
        lr = learning_rate(cfg.optimizer, cfg.stage.training_steps, self.state.step)
        set_learning_rate(engine.optimizer, lr, self.engine.groups.lr_scales)
        watch = None if self.proof else self.freeze_watch(len(micro_batches))
        self.gate.begin_step(lambda: tally.contribution)
        for number, batch in enumerate(micro_batches):
            tally.count(batch)
            batch = fill_pending(batch.to(self.ranks.device), self.engine.vq)
            with guard.watch("forward", number):
                terms = engine(batch)
            loss = micro_batch_loss(terms, totals, cfg.loss)
            tally.add_losses(terms, loss)
            with guard.watch("backward", number):
                # ZeRO-3 averages over ranks; the totals already cover accumulation
                engine.backward(loss * world, scale_wrt_gas=False)
            with guard.watch("step", number):
                engine.step()  # updates after the last micro-batch
        verdict = self.gate.end_step()
        assert engine.was_step_applied() == verdict.applies, f"DeepSpeed did not do as decided: {verdict}"
        if watch is not None:
            self.proof = watch.finish(
                step=self.state.step + 1, grad_norm=verdict.grad_norm, applied=verdict.applies
            ).as_dict()
            self.log.event("freeze_proof", self.state.step + 1, **self.proof)
        vector = tally.vector(
            step_s=time.perf_counter() - began,
            data_wait_s=data_wait_s,
            signal_number=self.flag.number,
            signature=guard.signature,
        )
        with guard.watch("the exchange of metrics"):
            table = StepTotals(tally.n_sources, exchange(vector))
        compare_signatures(table.signatures, self.state.step + 1, guard.explain)
        return StepResult(table, verdict, self.step_values(table, lr, verdict.grad_norm))

    def freeze_watch(self, n_micro_batches: int) -> FreezeWatch:
        """The evidence of the first step, and the proof that the optimizer holds what the stage trains and nothing
        else."""
        engine = self.engine
        held = [parameter for group in engine.deepspeed.optimizer.fp16_groups for parameter in group]
        refuse_leaks(engine.model.named_parameters(), held, engine.freeze_report.trainable_names)
        outside = [(f"model.{name}", parameter) for name, parameter in engine.vq.named_parameters()]
        return FreezeWatch(engine.model.named_parameters(), module_of, n_micro_batches, outside=outside)

    def next_step(self, steps: Any) -> tuple[Sequence[PackedBatch], dict[str, Any], SupervisedTotals]:
        """This rank's micro-batches of the next step, and the supervised positions of all ranks: the step's ONE
        reduction before the first forward.

        A rank whose data failed takes part in the reduction, so that all ranks raise the same DataError at the same
        step.
        """
        guard = self.engine.guard
        guard.begin_step(self.state.step + 1)
        guard.enter(WAITING_FOR_DATA)
        failure: JpTrainError | None = None
        item, mine = None, SupervisedTotals(0, 0, 0)
        try:
            item = next(steps)
            mine = count_supervised(item.micro_batches)
        except JpTrainError as error:
            failure = error
        counts = torch.tensor(
            [mine.text_tokens, mine.image_tokens, mine.documents, int(failure is not None)], device=self.ranks.device
        )
        with guard.watch("the count of supervised tokens"):
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
        """Skipped documents to the ledger, skipped updates to events.jsonl; raises when a budget is over, on all
        ranks at the same step."""
        state, step = self.state, self.state.step
        state.tokens += int(result.values["tokens/total"])
        skipped = []
        if result.totals.skipped:  # the same number on every rank, so all gather or none
            skipped = [
                document
                for own in gather_objects(self.ranks, [d for batch in micro_batches for d in batch.skipped])
                for document in own
            ]
        self.ledger.record(skipped, dict(zip(self.cfg.data.sources, result.totals.source_samples(), strict=True)), step)
        verdict = result.verdict
        over = state.skips.observe(verdict.applies, step, self.cfg.guard)
        if verdict.bad:
            dump: Any = f"no dump: guard.max_dumps {self.cfg.guard.max_dumps} are made"
            if state.dumps < self.cfg.guard.max_dumps:
                state.dumps += 1
                dump = self.forensics.dump(step, verdict, micro_batches, result.values)
            told = "the update was made" if verdict.applies else "the update was skipped"
            self.log.event(
                "spike",
                step,
                reason=f"{verdict.what}: {told}",
                loss=verdict.loss,
                grad_norm=verdict.grad_norm,
                dump=str(dump),
            )
            self.log.say(f"step {step}: {verdict.what}; {told}; {dump}")
        if over or verdict.action == "stop":
            raise JpTrainError(
                f"step {step}: {verdict.what}; {over or 'guard asks to stop at such a step'}. The weights are those of the last good step. The rows and "
                f"norms of the bad steps lie in {self.cfg.run_dir}/forensics: lower optimizer.lr, or look at those rows with `jp-train data explain`"
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
        with self.engine.guard.watch("validation", pace=Pace.SLOW):
            return self.held_out.measure(self.engine)

    def asked_to_stop(self) -> Stop | None:
        """Whether a signal has reached any rank: asked after what may take longer than a step, whose own exchange
        tells it. Collective."""
        with self.engine.guard.watch("the exchange of signals"):
            number = int(exchange(torch.tensor([float(self.flag.number)], device=self.ranks.device)).max())
        return decide(self.cfg.stage, step=self.state.step, signal_number=number, patience_over=False)

    def save(self, *, held_out_loss: float | None, final: bool) -> None:
        """A checkpoint of the last completed step, unless there is one; a `final` one is complete on return.
        Collective."""
        state = {
            "training": self.state.saved(),
            "plan": self.plan_state,
            "ledger": self.ledger.state(),
            "freeze_proof": self.proof,
        }
        about = {**self.about, "stage": self.cfg.stage.name, "freeze_proof": self.proof, "val/total": held_out_loss}
        with self.engine.guard.watch("a checkpoint save", pace=Pace.SLOW):
            self.saver.save(self.state.step, state, about, final=final)
        self.log.snapshot(self.plan_state)

    def export(self) -> None:
        """The folder that the next stage starts from. Collective."""
        path = Path(self.cfg.run_dir) / "export"
        self.log.say(f"exporting to {path}")
        with self.engine.guard.watch("the export", pace=Pace.SLOW):
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
    """What one step gave: the exchanged table, the decision about its update, and its metrics."""

    totals: StepTotals
    verdict: Verdict
    values: dict[str, float]
