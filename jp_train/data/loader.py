"""The step loader: the plan is the sampler of an ordinary torch DataLoader whose workers are stateless.

The sampler runs in the trainer's process and hands out RowSpecs, so the order of the data is independent of ranks and
workers: rank k of W builds rows [kR/W, (k+1)R/W) of each step, with any number of worker processes. The plan runs ahead
of training by the prefetch; each step therefore carries the plan's state as it was right after that step, which is what
a checkpoint of the step must store.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from jp_train.config.batch import BatchPlan
from jp_train.config.choices import PadDropoutForm, Template
from jp_train.config.schema import RunConfig
from jp_train.data.collate import Collator
from jp_train.data.encode import Encoder
from jp_train.data.index import SourceIndex, index_sources
from jp_train.data.plan import Plan, PlanSource
from jp_train.data.processes import end_with_trainer, process_state, signals_deferred, worker_context
from jp_train.data.rows import RowBuilder
from jp_train.data.tokenizer import Tokenizer
from jp_train.data.vq_ids import IdsRecipe
from jp_train.data.vq_use import use_stored_ids
from jp_train.errors import ConfigError, DataError
from jp_train.types import KINDS, DocumentRef, Kind, PackedBatch, Provenance, Row, RowSpec

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """One optimizer step of one rank: its micro-batches in order, and the plan's state after the step (JSON-able,
    kilobytes)."""

    step: int
    micro_batches: list[PackedBatch]
    plan_state: dict[str, Any]

    @property
    def used_per_source(self) -> dict[str, int]:
        """Documents (spans of cut texts counted apart) used per source in this rank's rows, for the ledger."""
        used: dict[str, int] = {}
        for batch in self.micro_batches:
            for row in batch.provenance:
                for document in row:
                    used[document.source] = used.get(document.source, 0) + 1
        return used


def build_plan(cfg: RunConfig, indexes: Sequence[SourceIndex], batch_plan: BatchPlan, tokenizer: Tokenizer) -> Plan:
    """The plan of a run over indexed sources (in the order of `cfg.data.sources`).

    Raises ConfigError when `data.seq_len` cannot hold a kind's image and template.
    """
    data, stage = cfg.data, cfg.stage
    encoder = Encoder(cfg, tokenizer)
    shares = [getattr(stage.mixture, kind.value) for kind in KINDS]
    for kind, share in zip(KINDS, shares, strict=True):
        if share > 0 and encoder.min_tokens(kind) >= data.seq_len:
            raise ConfigError(
                f"data.seq_len {data.seq_len} leaves no room for text beside the image and template of a {kind.value} "
                f"document ({encoder.min_tokens(kind)} tokens); raise data.seq_len, shorten data.system_prompt, or "
                "use a smaller image"
            )
    return Plan(
        [_plan_source(cfg, index, encoder) for index in indexes],
        seed=cfg.seed,
        rows_per_step=batch_plan.rows_per_step,
        seq_len=data.seq_len,
        pool_size=data.pool_size,
        mixture=shares,
        ratio_unit=stage.ratio_unit,
        mix=stage.mix,
        samples_per_row=batch_plan.samples_per_row,
        pad_dropout=data.pad_dropout,
        first_sentence=data.first_sentence,
        over_long=data.over_long,
        snapshot_steps=data.snapshot_steps,
        training_steps=stage.early_stop.at_step or stage.training_steps,
    )


def _plan_source(cfg: RunConfig, index: SourceIndex, encoder: Encoder) -> PlanSource:
    source, generation = index.locator.config, index.kind is Kind.GENERATION
    same_length = cfg.data.pad_dropout_form is PadDropoutForm.every_token or cfg.data.pad_dropout == 0
    return PlanSource(
        name=index.name,
        kind=index.kind,
        tokens=index.tokens,
        short_tokens=index.short_tokens if generation and cfg.data.first_sentence > 0 else None,
        dropped_tokens=index.dropped_tokens if generation and not same_length else None,
        min_tokens=encoder.min_tokens(index.kind) if index.min_tokens is None else index.min_tokens,
        images=index.images,
        first_entry=index.first_entry,
        weight=source.weight,
        from_step=source.from_step,
        to_step=source.to_step,
        cuttable=index.kind is Kind.TEXT and (cfg.stage.template is not Template.stage3 or index.conversations == 0),
    )


class StepLoader:
    """Iterates over the steps of one rank, endlessly, from the plan's current step. Close it when done (or use it as a
    context).

    The plan belongs to the loader from now on: it runs ahead. `cfg.data.workers` = 0 builds rows in this process.

    Raises:
        ConfigError: when the world size does not divide the rows of a step.
        DataError: while iterating, for unreadable data or a worker that died; it names the row and its first document.
    """

    def __init__(
        self,
        cfg: RunConfig,
        plan: Plan,
        indexes: Sequence[SourceIndex],
        tokenizer: Tokenizer,
        *,
        dp_rank: int,
        dp_world_size: int,
        batch_plan: BatchPlan,
    ) -> None:
        rows, rest = divmod(batch_plan.rows_per_step, dp_world_size)
        if rest or rows % batch_plan.micro_batch_rows or not 0 <= dp_rank < dp_world_size:
            raise ConfigError(
                f"rank {dp_rank} of {dp_world_size} cannot take its share of {batch_plan.rows_per_step} rows a step "
                f"in micro-batches of {batch_plan.micro_batch_rows}: the world size times engine.micro_batch_rows "
                "must divide the rows"
            )
        self._rows, self._micro = rows, batch_plan.micro_batch_rows
        self._workers, self._prefetch = cfg.data.workers, cfg.data.prefetch_rows
        shared = self._workers > 0 and _fits_shared_memory(image_bytes_ahead(cfg))
        self._builder = RowBuilder(cfg, [index.locator for index in indexes], tokenizer, shared_images=shared)
        self._collator = Collator(cfg, tokenizer.special.pad)
        self._sampler = _PlanSampler(plan, dp_rank * rows, (dp_rank + 1) * rows)
        self._iterator: Iterator[Row | _Failure] | None = None
        self.received = 0
        """Rows that have arrived from the workers since the start."""
        self._step = plan.step

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        if self._iterator is None:
            self._iterator = self._start()
        rows = [self._row() for _ in range(self._rows)]
        step, state = self._sampler.states.popleft()
        wrong = [row.step for row in rows if row.step != step]
        assert not wrong, f"rows of steps {wrong} arrived in step {step}"
        batches = [self._collator(rows[start : start + self._micro]) for start in range(0, len(rows), self._micro)]
        self._step = step + 1
        return StepBatches(step=step, micro_batches=batches, plan_state=state)

    def _start(self) -> Iterator[Row | _Failure]:
        dataset = _Rows(self._builder)
        if not self._workers:
            return map(dataset.__getitem__, self._sampler)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._sampler,
            num_workers=self._workers,
            collate_fn=_unchanged,
            worker_init_fn=end_with_trainer,
            generator=torch.Generator(),  # its own: the training generator must not depend on the loader
            multiprocessing_context=worker_context(),
            prefetch_factor=self._prefetch,
        )
        try:
            with signals_deferred():
                return iter(loader)
        except (OSError, EOFError) as error:
            # how multiprocessing reports a worker, or the server that forks them, that is gone
            raise _dead_worker("the workers were started", error) from error

    def close(self) -> None:
        """End the workers and close the shards. Safe to call twice."""
        iterator, self._iterator = self._iterator, None
        processes = list(getattr(iterator, "_workers", ()))
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        for process in processes:  # they do not answer SIGTERM (see processes.py): one stuck in a read must not linger
            if process.is_alive():
                process.kill()
        self._builder.close()

    def awaited(self) -> dict[str, Any]:
        """The row that the trainer waits for, for another thread to report: {"row", "step" (from 1), "document" (its
        first), "workers": [{"pid", "state"}]}. Finding the document's name may read an index file."""
        workers = [process.pid for process in getattr(self._iterator, "_workers", ())]
        state: dict[str, Any] = {
            "workers": [{"pid": pid, "state": process_state(pid)} for pid in workers if pid is not None]
        }
        spec = next(iter(self._sampler.handed_out), None)
        if spec is not None:
            first = self._builder.describe(spec.documents[0]) if spec.documents else "none"
            state |= {"row": spec.row, "step": spec.step + 1, "document": first}
        return state

    def _row(self) -> Row:
        assert self._iterator is not None
        waiting = self._sampler.handed_out
        try:
            result = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            # how torch reports a dead worker, or images that died with it
            spec = waiting[0] if waiting else None
            where = f"row {spec.row} of step {spec.step}" if spec is not None else f"a row of step {self._step}"
            first = (
                f", whose first document is {self._builder.describe(spec.documents[0])}"
                if spec is not None and spec.documents
                else ""
            )
            raise _dead_worker(f"{where} was awaited{first}", error) from error
        waiting.popleft()
        self.received += 1
        if isinstance(result, _Failure):
            raise DataError(result.message)
        return result


def _dead_worker(when: str, error: Exception) -> DataError:
    cause = str(error) or type(error).__name__
    return DataError(
        f"a loader worker died while {when}: {cause}. Out of memory? Lower data.workers or data.prefetch_rows; "
        "data.workers=0 shows a fault in the open"
    )


def image_bytes_ahead(cfg: RunConfig) -> int:
    """The most that the images of finished rows can take in one rank, in bytes: `prefetch_rows` rows a worker wait
    to be taken, and each worker may have one more at hand. A row holds at most seq_len / S images of 3 x H x W
    bytes (S image slots each)."""
    size = cfg.model.vision.image_size
    slots = (size // cfg.model.vision.patch_size) ** 2
    return cfg.data.workers * (cfg.data.prefetch_rows + 1) * (cfg.data.seq_len // slots) * 3 * size * size


def _fits_shared_memory(bytes_needed: int) -> bool:
    """Whether /dev/shm has room. Writing past it would kill the process with SIGBUS, so the images of rows go
    through pipes then."""
    try:
        file_system = os.statvfs("/dev/shm")
    except OSError:
        return True  # no such file system: the platform keeps shared memory elsewhere
    free = file_system.f_bavail * file_system.f_frsize
    if bytes_needed > free:
        print(
            f"loader: /dev/shm has {free / 2**20:.0f} MiB free, the rows ahead may take {bytes_needed / 2**20:.0f} "
            "MiB: images go through pipes, which is slower. Enlarge it (docker: --shm-size), or lower data.workers "
            "or data.prefetch_rows",
            file=sys.stderr,
        )
    return bytes_needed <= free


class _PlanSampler:
    """Yields this rank's RowSpecs step by step; `states` gets (step, plan state after it), `handed_out` the specs
    not yet returned."""

    def __init__(self, plan: Plan, first: int, last: int) -> None:
        self._plan, self._first, self._last = plan, first, last
        self.states: deque[tuple[int, dict[str, Any]]] = deque()
        self.handed_out: deque[RowSpec] = deque()

    def __iter__(self) -> Iterator[RowSpec]:
        while True:
            step = self._plan.step
            specs = self._plan.next_step(self._first, self._last)
            self.states.append((step, self._plan.state()))
            for spec in specs:
                self.handed_out.append(spec)
                yield spec


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error that a worker returns: torch would replace an exception's type and add a traceback."""

    message: str


class _Rows(Dataset[Any]):
    """RowSpec -> Row, as the map-style dataset that DataLoader wants."""

    def __init__(self, builder: RowBuilder) -> None:
        self._builder = builder

    def __getitem__(self, spec: RowSpec) -> Row | _Failure:
        try:
            return self._builder.build(spec)
        except DataError as error:
            return _Failure(f"row {spec.row} of step {spec.step}: {error}")
        except Exception:  # reported with its place, and it stops the run
            first = self._builder.describe(spec.documents[0]) if spec.documents else "none"
            return _Failure(
                f"row {spec.row} of step {spec.step} (first document: {first}) failed in the loader; this is a fault "
                f"of jp_train:\n{traceback.format_exc()}"
            )


def _unchanged(item: _Item) -> _Item:
    return item


def rows_hash(rows: Iterable[PackedBatch | Row | Sequence[Provenance]]) -> str:
    """Hex digest over (source, shard file name, key, start, length) of every document, row by row: equal data, equal
    digest.

    Takes batches, rows, or the provenance of rows; an empty row counts too. How rows are spread over batches does not
    matter.
    """
    digest = hashlib.sha256()
    for item in rows:
        for row in _provenance_rows(item):
            for document in row:
                fields = (document.source, document.shard, document.key, str(document.start), str(document.length))
                digest.update("\0".join(fields).encode("utf-8", "surrogateescape") + b"\1")
            digest.update(b"\2")
    return digest.hexdigest()


def _provenance_rows(item: PackedBatch | Row | Sequence[Provenance]) -> Iterable[Sequence[Provenance]]:
    if isinstance(item, PackedBatch):
        return item.provenance
    return [item.provenance] if isinstance(item, Row) else [item]


def validation_batches(
    cfg: RunConfig,
    tokenizer: Tokenizer,
    source_name: str,
    dp_rank: int,
    dp_world_size: int,
    recipe: IdsRecipe | None = None,
) -> list[PackedBatch]:
    """Held-out documents of one `cfg.validation.sources` entry, packed in order: this rank's batches.

    The first `cfg.validation.documents` documents, without random choices, fill rows one after another. Every rank gets
    the same number of batches; the last ones may hold empty rows. `document_sources` counts within
    `cfg.validation.sources`. With `recipe`, that of the run's VQ, stored VQ ids are used as `data.vq_ids` says;
    without, images are.

    Raises:
        ConfigError: for an unknown source name.
        DataError: for missing, corrupt or empty shards, or stored VQ ids that may not be used.
    """
    sources = cfg.validation.sources
    if source_name not in sources:
        raise ConfigError(
            f"validation source {source_name!r} is unknown; validation.sources has {', '.join(sources) or 'none'}"
        )
    (index,) = index_sources(cfg, tokenizer, sources={source_name: sources[source_name]})
    if recipe is not None:
        (index,) = use_stored_ids(cfg.data, [index], recipe)
    number = list(sources).index(source_name)
    specs = _validation_rows(cfg, index)
    micro = cfg.engine.micro_batch_rows
    batches = -(-len(specs) // (micro * dp_world_size))
    mine = range(dp_rank * batches * micro, (dp_rank + 1) * batches * micro)
    builder, collator = RowBuilder(cfg, [index.locator], tokenizer, held_out=True), Collator(cfg, tokenizer.special.pad)
    rows = [builder.build(specs[row] if row < len(specs) else RowSpec(step=0, row=row, documents=())) for row in mine]
    builder.close()
    rows = [replace(row, source_indices=(number,) * len(row.source_indices)) for row in rows]
    return [collator(rows[start : start + micro]) for start in range(0, len(rows), micro)]


def _validation_rows(cfg: RunConfig, index: SourceIndex) -> list[RowSpec]:
    seq_len = cfg.data.seq_len
    rows: list[list[DocumentRef]] = [[]]
    room = seq_len
    for sample in range(min(cfg.validation.documents, len(index))):
        tokens = int(index.tokens[index.entry(sample)])
        length = min(tokens, seq_len)
        if length > room:
            rows.append([])
            room = seq_len
        room -= length
        rows[-1].append(
            DocumentRef(source=0, epoch=0, sample=sample, start=0, length=length, truncated=tokens - length)
        )
    return [RowSpec(step=0, row=row, documents=tuple(documents)) for row, documents in enumerate(rows)]
