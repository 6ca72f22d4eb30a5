"""What one check looks at, and what it has found so far."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jp_train.cluster.hostfile import world_size
from jp_train.cluster.options import LaunchOptions
from jp_train.cluster.restarts import has_checkpoints
from jp_train.config import BatchPlan, RunConfig, batch_plan
from jp_train.errors import DataError, JpTrainError

if TYPE_CHECKING:
    from jp_train.config.schema import SourceConfig
    from jp_train.data.index import SourceIndex
    from jp_train.data.plan import Plan
    from jp_train.data.tokenizer import Tokenizer
    from jp_train.tools.simulate.sample import SourceRates


NAMED = 4
"""Absent paths that a warning names."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage as it is planned. `documents`: that each source in use starts in the whole stage."""

    plan: Plan
    rates: dict[str, SourceRates]
    documents: dict[str, float]


@dataclass(kw_only=True)
class Subject:
    """A run before its start. A check that finds one problem raises it; one that finds several calls `problem` for each
    and returns what it could find out."""

    config: RunConfig
    options: LaunchOptions | None = None
    """Hostfile, filters and master port; None: `world` ranks."""
    world: int = 1
    here: bool = True
    """Whether this host must have what the ranks will read."""
    problems: list[JpTrainError] = field(default_factory=list)
    """What would stop the run."""
    warnings: list[str] = field(default_factory=list)
    """What lets it start, and its owner may not want."""
    unseen: list[str] = field(default_factory=list)
    """Absolute paths that are not `here`."""
    finished: str = ""
    """Why nothing is left to do."""

    @cached_property
    def ranks(self) -> int:
        """Raises LaunchError and ConfigError for a hostfile or a filter that cannot be used."""
        return self.world if self.options is None else world_size(self.options.selection())

    @cached_property
    def batch(self) -> BatchPlan:
        """Raises ConfigError for ranks that do not divide the rows of a step, and as `ranks`."""
        resumes = has_checkpoints(Path(self.config.run_dir))  # then the micro-batch may follow the number of ranks
        return batch_plan(self.config, self.ranks, shrink=resumes)

    @cached_property
    def steps(self) -> int:
        """Steps that the stage makes."""
        stage = self.config.stage
        return stage.early_stop.at_step or stage.training_steps

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded: seconds of CPU time. Raises ConfigError."""
        from jp_train.data.tokenizer import load_tokenizer

        return load_tokenizer(self.config.tokenizer)

    @cached_property
    def stage(self) -> Stage | None:
        """None where a source cannot be read. Raises ConfigError, DataError."""
        from jp_train.data.loader import build_plan
        from jp_train.tools.simulate.sample import source_rates, stage_documents

        config, indexes = self.config, self.indexes
        if len(indexes) < len(config.data.sources):
            return None
        plan = build_plan(config, indexes, self.batch, self.tokenizer)
        rates = source_rates(plan)
        documents = stage_documents(plan, rates, self.steps, plan.rows_per_step * plan.seq_len)
        return Stage(plan=plan, rates=rates, documents=documents)

    @cached_property
    def indexes(self) -> list[SourceIndex]:
        """The index of every source that can be read; the others are problems. Builds what is missing of it. Raises
        ConfigError."""
        return self._index(self.config.data.sources)

    @cached_property
    def held_out(self) -> list[SourceIndex]:
        """The same of the held-out sources."""
        sources = self.config.validation.sources
        return self._index(sources) if sources else []

    def _index(self, sources: Mapping[str, SourceConfig]) -> list[SourceIndex]:
        from jp_train.data.index import index_sources
        from jp_train.tools.index import IndexProgressLine

        line, tokenizer = IndexProgressLine(sys.stderr), self.tokenizer
        try:
            return index_sources(self.config, tokenizer, progress=line, sources=sources)
        except DataError:
            line.announces = False
        indexes = []
        for name, source in sources.items():
            with self.collecting():
                indexes += index_sources(self.config, tokenizer, progress=line, sources={name: source})
        return indexes

    def problem(self, error: JpTrainError) -> None:
        """Add one; the same words are said once (several checks need the tokenizer)."""
        if error.absent and not self.here:
            self.unseen.append(error.absent)
        elif str(error) not in map(str, self.problems):
            self.problems.append(error)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """A JpTrainError of the block becomes a problem, and the check goes on after it."""
        try:
            yield
        except JpTrainError as error:
            self.problem(error)

    def unseen_text(self) -> str:
        """What is not here and may be on the hosts of the ranks, in one sentence; empty where all is here."""
        if not self.unseen:
            return ""
        more = f" and {len(self.unseen) - NAMED} more" if len(self.unseen) > NAMED else ""
        return f"not on this host, so left to preflight on the ranks' hosts: {', '.join(self.unseen[:NAMED])}{more}"
