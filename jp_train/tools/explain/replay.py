"""Rebuilds the micro-batches of any step, bit for bit as training consumed them, in one process.

Rows are a pure function of the configuration and the indexed data, and micro-batch m of a step holds its rows [m * b,
(m + 1) * b), with b = engine.micro_batch_rows, for every number of ranks. A run's plan snapshots only save time:
without them the plan is folded from step 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TextIO

from jp_train.cluster.restarts import Standing, standing
from jp_train.config import RunConfig, batch_plan
from jp_train.data.collate import Collator
from jp_train.data.index import SourceIndex, index_sources
from jp_train.data.loader import build_plan
from jp_train.data.plan import Plan
from jp_train.data.rows import RowBuilder
from jp_train.data.snapshots import nearest_snapshots
from jp_train.data.tokenizer import Tokenizer, load_tokenizer
from jp_train.data.vq_ids import IdsRecipe
from jp_train.data.vq_use import use_stored_ids
from jp_train.errors import ConfigError
from jp_train.terminal import ProgressLine
from jp_train.tools.index import IndexProgressLine
from jp_train.types import PackedBatch, Row, RowSpec

FOLD_AT_ONCE = 50
"""Steps planned between two calls of the progress line."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch as trained: the number of its first row within the step, its batch, and its rows and their
    specs."""

    first_row: int
    batch: PackedBatch
    rows: tuple[Row, ...]
    specs: tuple[RowSpec, ...]


class Replay:
    """The rows of a configuration. Steps are the numbers of metrics.jsonl and wandb: step n, from 1, is made of plan
    step n - 1.

    `run_dir`: a run folder whose plan snapshots save time, and prove that the data are still those it was trained on.
    `recipe`: of the run's VQ, so that VQ ids stored beside the shards are used as in training (None: they are not, and
    images are read). `notes` are remarks for the reader of the result. Close it, or use it as a context.

    The data are opened when the first row is asked for, so that a step or row that cannot be is refused at once. Then:

    Raises:
        ConfigError, DataError: as training would for this configuration and data; DataError also when the run's plan
            states belong to other data or another recipe (the message names what differs).
    """

    def __init__(
        self,
        cfg: RunConfig,
        run_dir: Path | None = None,
        *,
        recipe: IdsRecipe | None = None,
        progress: TextIO | None = None,
    ) -> None:
        self.cfg, self._run_dir = cfg, run_dir
        self._progress = sys.stderr if progress is None else progress
        self.notes: list[str] = []
        self._recipe, self._batch, self._starts = recipe, batch_plan(cfg, 1), [0]
        self.rows_per_step, self.micro_batch_rows = self._batch.rows_per_step, self._batch.micro_batch_rows

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """As training loads it."""
        return load_tokenizer(self.cfg.tokenizer)

    @cached_property
    def _indexes(self) -> list[SourceIndex]:
        self._say(f"indexing {len(self.cfg.data.sources)} sources")
        indexes = index_sources(self.cfg, self.tokenizer, progress=IndexProgressLine(self._progress))
        return indexes if self._recipe is None else use_stored_ids(self.cfg.data, indexes, self._recipe)

    @cached_property
    def plan(self) -> Plan:
        """Of the whole stage."""
        return build_plan(self.cfg, self._indexes, self._batch, self.tokenizer)

    @cached_property
    def _builder(self) -> RowBuilder:
        return RowBuilder(self.cfg, [index.locator for index in self._indexes], self.tokenizer)

    @cached_property
    def _standing(self) -> Standing:
        """Of the run; of a folder without status.json, which does not say how far it is, and without one: empty."""
        return Standing() if self._run_dir is None else standing(self._run_dir)

    @cached_property
    def _collator(self) -> Collator:
        return Collator(self.cfg, self.tokenizer.special.pad)

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards."""
        if "_builder" in vars(self):
            self._builder.close()

    def rows_of_rank(self, rank: int, world: int) -> range:
        """The rows of every step that data-parallel rank `rank` of `world` trains. Raises ConfigError when the world
        does not fit."""
        batch_plan(self.cfg, world)
        if not 0 <= rank < world:
            raise ConfigError(f"--rank counts from 0: expected 0 to {world - 1} with --world {world}, got {rank}")
        share = self.rows_per_step // world
        return range(rank * share, (rank + 1) * share)

    def specs(self, step: int) -> list[RowSpec]:
        """The plan's rows of a step. Raises ConfigError for a step before 1."""
        if step < 1:
            raise ConfigError(f"--step counts as metrics.jsonl and wandb do: the first optimizer step is 1, got {step}")
        target = step - 1
        self._note_untrained(step)
        self._use_snapshots(target)
        start = max(start for start in self._starts if start <= target)
        line = ProgressLine("replay", self._progress, every_s=1, done=start)
        for reached in range(start + FOLD_AT_ONCE, target, FOLD_AT_ONCE):
            self.plan.rows_at(reached)
            line.show(reached, target, f"planning: step {reached:,} of {target:,}")
        specs = self.plan.rows_at(target)
        self._starts.append(target)
        return specs

    def micro_batches(self, step: int, rows: range | None = None) -> Iterator[MicroBatch]:
        """The micro-batches of `step` that hold at least one of `rows` (default: all), in order.

        Raises DataError for unreadable shards, ConfigError for a row that the step does not have.
        """
        rows = range(self.rows_per_step) if rows is None else rows
        if rows and not 0 <= rows[0] <= rows[-1] < self.rows_per_step:
            raise ConfigError(
                f"a step has {self.rows_per_step} rows, numbered from 0 to {self.rows_per_step - 1}; "
                f"asked for {rows[-1]}"
            )
        specs = self.specs(step)
        size = self.micro_batch_rows
        numbers = sorted({row // size for row in rows})
        line = ProgressLine("replay", self._progress, every_s=1)
        for done, number in enumerate(numbers, 1):
            part = specs[number * size : (number + 1) * size]
            built = [self._builder.build(spec) for spec in part]
            yield MicroBatch(number * size, self._collator(built), tuple(built), tuple(part))
            if done < len(numbers):
                line.show(done, len(numbers), f"rebuilding: micro-batch {done} of {len(numbers)}")

    def with_images(self, spec: RowSpec) -> Row:
        """The row of `spec` with every image read, also where training takes stored VQ ids instead; samples
        without an image are skipped."""
        locators = [
            replace(index.locator, ids_fingerprint="", shards_with_ids=frozenset(), embedded_ids=False)
            for index in self._indexes
        ]
        builder = RowBuilder(self.cfg, locators, self.tokenizer)
        try:
            return builder.build(spec)
        finally:
            builder.close()

    def _note_untrained(self, step: int) -> None:
        """A remark on a step after the stage's end, or that the run has not come to."""
        stage = self.cfg.stage
        last = stage.early_stop.at_step or stage.training_steps
        run = self._standing
        if step > last:
            note = f"the stage ends after step {last:,}: step {step:,} is what it would go on with"
        elif run.state and step > run.step:
            note = f"{self._run_dir} has trained {run.step:,} steps: step {step:,} is still to come"
        else:
            return
        if note not in self.notes:
            self.notes.append(note)

    def _use_snapshots(self, target: int) -> None:
        if self._run_dir is None:
            return
        state = next(nearest_snapshots(self._run_dir, target), None)
        if state is None:  # the state of a later step still proves that the data are the same
            state = next(nearest_snapshots(self._run_dir, sys.maxsize), None)
        if state is None:
            note = (
                f"{self._run_dir} holds no plan state yet: "
                "it cannot be checked that the data are those it is trained on"
            )
            if note not in self.notes:
                self.notes.append(note)
            return
        if state["step"] not in self._starts:
            self.plan.add_snapshot(state)
            self._starts.append(state["step"])

    def _say(self, text: str) -> None:
        print(f"replay: {text}", file=self._progress, flush=True)
