"""The training loop of one stage: start here.

`Trainer.run` is the loop, `Trainer.train_step` one optimizer step; what happens between steps is listed in
`callbacks.py`, what comes before the loop in `session.py` and `preparation.py`. A step is honest about tokens: all its
micro-batches are fetched first, their supervised positions are counted and summed over ranks once, and every
micro-batch then contributes its summed loss divided by that number (`engine/objective.py`).

`step` counts completed steps: metrics line, checkpoint and status of step n are those after n updates, made of the rows
of plan step n - 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jp_train.config import dump_config
from jp_train.data.loader import StepBatches
from jp_train.engine.device import peak_tflops
from jp_train.engine.export import export
from jp_train.engine.forensics import Forensics
from jp_train.engine.init import gather_objects
from jp_train.engine.metrics import StepTally, StepTotals, exchange, step_values
from jp_train.engine.objective import SupervisedTotals, count_supervised, micro_batch_loss
from jp_train.engine.optim import learning_rate, set_learning_rate
from jp_train.engine.outliers import UpdateDecision
from jp_train.engine.proof import FreezeWatch, refuse_leaks
from jp_train.engine.update_gate import UpdateGate
from jp_train.engine.watch.guard import WAITING_FOR_DATA, Pace, compare_signatures
from jp_train.engine.watch.stop import Stop, decide
from jp_train.errors import DataError, JpTrainError
from jp_train.model.flops import BatchStatistics, step_flops
from jp_train.model.freeze import module_of
from jp_train.model.vq import fill_pending
from jp_train.train.callbacks import Callback, StepEnd
from jp_train.train.preparation import Parts
from jp_train.types import KINDS, PackedBatch


class Trainer:
    """One rank's training loop over its parts (`preparation.py`), with what happens between steps (`callbacks.py`)."""

    def __init__(self, parts: Parts, callbacks: Sequence[Callback]) -> None:
        self.parts, self.callbacks = parts, callbacks
        self.cfg, self.ranks, self.engine, self.state = parts.cfg, parts.ranks, parts.engine, parts.state
        optimizer = self.engine.deepspeed.optimizer
        self.forensics = Forensics(self.cfg, self.ranks, parts.tokenizer, self.engine.model, optimizer)
        self.gate = UpdateGate(
            optimizer,
            self.state.statistics.judge,
            lambda _: self.forensics.inspect() if self.state.dumps < self.cfg.guard.max_dumps else None,
        )

    def run(self) -> Stop:
        """Train until a stop rule says so; then export, and tell why. Collective."""
        cfg, state, parts = self.cfg, self.state, self.parts
        steps = iter(parts.loader)
        stop = decide(cfg.stage, step=state.step, signal_number=0, patience_over=state.patience.over)
        if state.step == 0:
            start = StepEnd(0, {})
            for callback in self.callbacks:
                callback.before_first_step(start)
        while stop is None:
            began = time.perf_counter()
            micro_batches, plan_state, totals = self.next_step(steps)
            data_wait_s = time.perf_counter() - began
            result = self.train_step(micro_batches, totals, began=began, data_wait_s=data_wait_s)
            parts.plan_state = plan_state
            state.step += 1
            with self.engine.guard.watch("the accounts of the step", pace=Pace.SLOW):
                self.account(result, micro_batches)
            end = StepEnd(
                state.step,
                result.values | parts.saver.values(),
                decide(cfg.stage, step=state.step, signal_number=result.totals.signal, patience_over=False),
                loss_tokens=dict(zip(KINDS, result.totals.total("kind_tokens"), strict=True)),
            )
            for callback in self.callbacks:
                callback.after_step(end)
            stop = end.stop
        parts.loader.close()
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
        watch = None if self.parts.freeze_proof else self.freeze_watch(len(micro_batches))
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
        decision = self.gate.end_step()
        assert engine.was_step_applied() == decision.applies, f"DeepSpeed did not do as decided: {decision}"
        if watch is not None:
            self.prove_freeze(watch, decision)
        vector = tally.vector(
            step_s=time.perf_counter() - began,
            data_wait_s=data_wait_s,
            signal_number=self.parts.flag.number,
            signature=guard.signature,
        )
        with guard.watch("the exchange of metrics"):
            table = StepTotals(tally.n_sources, exchange(vector))
        compare_signatures(table.signatures, self.state.step + 1, guard.explain)
        return StepResult(table, decision, self.step_values(table, lr, decision.grad_norm))

    def freeze_watch(self, n_micro_batches: int) -> FreezeWatch:
        """The evidence of the first step, and the proof that the optimizer holds what the stage trains and nothing
        else."""
        engine = self.engine
        held = [parameter for group in engine.deepspeed.optimizer.fp16_groups for parameter in group]
        refuse_leaks(engine.model.named_parameters(), held, engine.freeze_report.trainable_names)
        outside = [(f"model.{name}", parameter) for name, parameter in engine.vq.named_parameters()]
        return FreezeWatch(engine.model.named_parameters(), module_of, n_micro_batches, outside=outside)

    def prove_freeze(self, watch: FreezeWatch, decision: UpdateDecision) -> None:
        """Keep the proof of the first step for checkpoints. Raises JpTrainError when the freeze did not hold."""
        step = self.state.step + 1
        proof = watch.finish(step=step, grad_norm=decision.grad_norm, applied=decision.applies).as_dict()
        self.parts.freeze_proof = proof
        self.parts.log.event("freeze_proof", step, **proof)

    def next_step(self, steps: Iterator[StepBatches]) -> tuple[Sequence[PackedBatch], dict[str, Any], SupervisedTotals]:
        """This rank's micro-batches of the next step, and the supervised positions of all ranks: the step's ONE
        reduction before the first forward.

        A rank whose data failed takes part in the reduction, so that all ranks raise the same DataError at the same
        step.
        """
        guard = self.engine.guard
        guard.begin_step(self.state.step + 1)
        guard.enter(WAITING_FOR_DATA)
        failure: JpTrainError | None = None
        item, local = None, SupervisedTotals(0, 0, 0)
        try:
            item = next(steps)
            local = count_supervised(item.micro_batches)
        except JpTrainError as error:
            failure = error
        counts = torch.tensor(
            [local.text_tokens, local.image_tokens, local.documents, int(failure is not None)], device=self.ranks.device
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
        result.values["tokens/seen"] = float(state.tokens)
        skipped = []
        if result.totals.skipped:  # the same number on every rank, so all gather or none
            of_ranks = gather_objects(self.ranks, [d for batch in micro_batches for d in batch.skipped])
            skipped = [document for of_rank in of_ranks for document in of_rank]
        used = dict(zip(self.cfg.data.sources, result.totals.source_samples(), strict=True))
        self.parts.ledger.record(skipped, used, step)
        decision = result.decision
        over = state.skips.observe(decision.applies, step, self.cfg.guard)
        if decision.bad:
            self.report_spike(result, micro_batches)
        if over or decision.action == "stop":
            raise JpTrainError(
                f"step {step}: {decision.what}; {over or 'guard asks to stop at such a step'}. The weights are those "
                f"of the last good step. The rows and norms of the bad steps lie in {self.cfg.run_dir}/forensics: "
                "lower optimizer.lr, or look at those rows with `jp-train data explain`"
            )

    def report_spike(self, result: StepResult, micro_batches: Sequence[PackedBatch]) -> None:
        """A bad step: its rows and norms under forensics/, `guard.max_dumps` times, and an event. Collective."""
        state, step, log, decision = self.state, self.state.step, self.parts.log, result.decision
        dump: Any = f"no dump: guard.max_dumps {self.cfg.guard.max_dumps} are made"
        if state.dumps < self.cfg.guard.max_dumps:
            state.dumps += 1
            dump = self.forensics.dump(step, decision, micro_batches, result.values)
        outcome = "the update was made" if decision.applies else "the update was skipped"
        log.event(
            "spike",
            step,
            reason=f"{decision.what}: {outcome}",
            loss=decision.loss,
            grad_norm=decision.grad_norm,
            dump=str(dump),
        )
        log.say(f"step {step}: {decision.what}; {outcome}; {dump}")

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
            peak_flops=peak_tflops(cfg.logging.peak_tflops) * 1e12 * self.ranks.dp_world_size,
        )

    def export(self) -> None:
        """The folder that the next stage starts from. Collective."""
        path = Path(self.cfg.run_dir) / "export"
        self.parts.log.say(f"exporting to {path}")
        with self.engine.guard.watch("the export", pace=Pace.SLOW):
            export(
                self.engine,
                path,
                tokenizer=self.parts.tokenizer,
                precision=self.cfg.precision,
                config_text=dump_config(self.cfg),
                is_main=self.ranks.is_main,
            )
        self.parts.log.event("export", self.state.step, path=str(path))


@dataclass(frozen=True)
class StepResult:
    """What one step gave: the exchanged table, the decision about its update, and its metrics."""

    totals: StepTotals
    decision: UpdateDecision
    values: dict[str, float]
