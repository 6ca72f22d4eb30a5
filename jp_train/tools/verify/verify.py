"""`jp-train data verify`: one pass over every shard of a run's training and held-out sources, in parallel processes.

Nothing stops the pass: a broken tar, an unreachable shard, even a process that dies on a shard is a line of the report.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from jp_train.config.schema import RunConfig, SourceConfig
from jp_train.data.encode import Encoder
from jp_train.data.exclusions import Excluded, known_exclusions, store_exclusions
from jp_train.data.processes import end_with_trainer, kill_workers, signals_deferred, worker_context
from jp_train.data.shards import Shard, ShardReader, expand_shards
from jp_train.data.tokenizer import Tokenizer, load_tokenizer
from jp_train.errors import ConfigError, DataError
from jp_train.tools.verify.report import Report, format_report, write_report
from jp_train.tools.verify.shard import UNREADABLE, Fault, ShardReport, VerifyTask, verify_shard
from jp_train.types import Kind

EXIT_CLEAN, EXIT_FAULTS = 0, 3
DIED = "process_died"

_TICK_S = 0.5
_SHARE_S = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """`decode`: pictures decoded per source (None: all, 0: none); `exclude`: write down what the index must leave
    out; `out`: folder of verify.json and lengths.png (None: `verify` in the run folder)."""

    processes: int = 1
    decode: int | None = None
    exclude: bool = False
    out: Path | None = None


def verify_command(
    cfg: RunConfig, options: VerifyOptions, *, table: TextIO | None = None, progress: TextIO | None = None
) -> tuple[dict[str, Any], int]:
    """Verify the sources of a run, print the report to `table` (default: stdout), write verify.json and lengths.png.

    Returns the report as a JSON-able dict, and the exit status: 0 when nothing is wrong that is not excluded, 3
    otherwise.

    Raises:
        ConfigError: when the config names no source, or shards that cannot be named so, or for a folder that cannot be
        written.
        DataError: for a damaged tokenizer or file of exclusions.
    """
    folder = options.out or Path(cfg.run_dir) / "verify"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:  # known before hours of reading, not after them
        raise ConfigError(
            f"the report cannot be written to {folder}: {error}; name another folder with --out"
        ) from None
    report = verify_sources(cfg, load_tokenizer(cfg.tokenizer), options, progress=progress or sys.stderr)
    document = write_report(report, cfg, folder)
    print(format_report(report, document), file=table or sys.stdout)
    return document, EXIT_CLEAN if report.clean else EXIT_FAULTS


def verify_sources(
    cfg: RunConfig, tokenizer: Tokenizer, options: VerifyOptions, *, progress: TextIO | None = None
) -> Report:
    """The report of one pass over all shards; writes exclusions when the options say so, and nothing else."""
    sources = dict(cfg.data.sources) | {f"validation/{name}": source for name, source in cfg.validation.sources.items()}
    if not sources:
        raise ConfigError("the config has no data.sources: name a recipe, or list sources under data.sources")
    started = time.monotonic()
    Encoder(cfg, tokenizer)  # a wrong tokenizer is an error of the configuration, not of every shard
    tasks: list[VerifyTask] = []
    unreachable: list[Fault] = []
    for name, source in sources.items():
        found, faults = _tasks(cfg, name, source, options.decode)
        tasks += found
        unreachable += faults
    excluded = {
        (task.source, task.shard.path, key)
        for task in tasks
        for key in known_exclusions(task.shard, Kind(task.config.kind.value))
    }
    reports = _run_all(tasks, cfg, tokenizer, max(1, options.processes), _ProgressLine(progress, tasks))
    report = Report(
        sources={name: source.kind.value for name, source in sources.items()},
        shards=reports,
        unreachable=unreachable,
        decode=options.decode,
        seconds=0.0,
        excluded=excluded,
    )
    if options.exclude:
        report.newly_excluded, report.exclusion_files = _exclude(tasks, reports, partial=options.decode is not None)
        report.excluded |= report.newly_excluded
    report.seconds = time.monotonic() - started
    return report


def _tasks(cfg: RunConfig, name: str, source: SourceConfig, decode: int | None) -> tuple[list[VerifyTask], list[Fault]]:
    """A task for each shard that can be reached, a fault for each that cannot."""
    reader = ShardReader(cfg.data.io_retries)
    shards: list[Shard] = []
    faults: list[Fault] = []
    try:
        paths = expand_shards(source.shards, cfg.data.root)
    except DataError as error:
        return [], [Fault(fault=UNREADABLE, source=name, shard=source.shards, key=None, offset=None, reason=str(error))]
    for path in paths:
        try:
            shards.append(reader.stat(path))
        except DataError as error:
            faults.append(Fault(fault=UNREADABLE, source=name, shard=path, key=None, offset=None, reason=str(error)))
    reader.close()
    total = len(shards)
    return [
        VerifyTask(
            source=name,
            config=source,
            shard=shard,
            decode=None if decode is None else (number + 1) * decode // total - number * decode // total,
        )
        for number, shard in enumerate(shards)
    ], faults


def _exclude(
    tasks: Sequence[VerifyTask], reports: Sequence[ShardReport], *, partial: bool
) -> tuple[set[tuple[str, str, str]], list[Path]]:
    """Write what only decoding shows; a pass that decoded everything replaces what earlier passes wrote. (new
    samples, written files)."""
    found: dict[tuple[str, Kind], dict[str, Excluded]] = {}
    shards: dict[str, Shard] = {}
    new: set[tuple[str, str, str]] = set()
    for task, report in zip(tasks, reports, strict=True):
        if not report.whole:
            continue  # its later samples were not seen, and the index refuses it anyway
        kind = Kind(task.config.kind.value)
        shards[task.shard.path] = task.shard
        bad = found.setdefault((task.shard.path, kind), {})
        bad |= {
            fault.key: Excluded(fault.fault, fault.reason)
            for fault in report.faults
            if fault.picture and fault.key is not None
        }
        known = known_exclusions(task.shard, kind)
        new |= {(task.source, task.shard.path, key) for key in bad.keys() - known.keys()}
    files = []
    for (path, kind), bad in found.items():
        known = known_exclusions(shards[path], kind)
        wanted = {**known, **bad} if partial else bad
        if wanted.keys() != known.keys():
            files.append(store_exclusions(shards[path], kind, wanted))
    return new, files


def _run_all(
    tasks: Sequence[VerifyTask], cfg: RunConfig, tokenizer: Tokenizer, processes: int, progress: _ProgressLine
) -> list[ShardReport]:
    """The report of each task, in their order. After a process died, what is left runs in a process per shard, so
    that the one that kills it is known."""
    if processes == 1 or len(tasks) < 2:
        reader, encoder = ShardReader(cfg.data.io_retries), Encoder(cfg, tokenizer)
        reports = []
        for task in tasks:
            began, done = progress.bytes, progress.samples

            def moved(samples: int, at: int, began: int = began, done: int = done) -> None:
                progress.show(done + samples, began + at)

            reports.append(verify_shard(task, cfg, encoder, reader, moved))
            progress.finished(task, reports[-1], began, done)
        reader.close()
        return reports
    found: dict[int, ShardReport] = {}
    for number, report in _in_processes(dict(enumerate(tasks)), cfg, tokenizer, processes, progress):
        found[number] = report
    for number in sorted(set(range(len(tasks))) - found.keys()):
        alone = dict(_in_processes({number: tasks[number]}, cfg, tokenizer, 1, progress))
        found[number] = alone.get(number) or _died(tasks[number])
    return [found[number] for number in range(len(tasks))]


def _died(task: VerifyTask) -> ShardReport:
    report = ShardReport(source=task.source, kind=task.config.kind.value, shard=task.shard, whole=False)
    reason = "the process that read it died twice (killed for memory, or a decoder crashed): a loader worker of training would die here too"
    report.faults.append(
        Fault(fault=DIED, source=task.source, shard=task.shard.path, key=None, offset=None, reason=reason)
    )
    return report


def _in_processes(
    tasks: dict[int, VerifyTask], cfg: RunConfig, tokenizer: Tokenizer, processes: int, progress: _ProgressLine
) -> Iterator[tuple[int, ShardReport]]:
    """(number, report) of the tasks as they finish; those that a dying process took with it are missing."""
    context = worker_context()
    with signals_deferred():
        samples, read = context.Value("q", 0), context.Value("q", 0)
        pool = ProcessPoolExecutor(
            min(processes, len(tasks)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(cfg, tokenizer, samples, read),
        )
        largest_first = sorted(tasks, key=lambda number: -tasks[number].shard.size)
        pending: dict[Future[ShardReport], int] = {
            pool.submit(_run_in_worker, tasks[number]): number for number in largest_first
        }
    try:
        while pending:
            finished, _ = wait(pending, timeout=_TICK_S, return_when=FIRST_COMPLETED)
            for future in finished:
                number = pending.pop(future)
                try:
                    report = future.result()
                except BrokenProcessPool:
                    continue
                progress.shards += 1
                yield number, report
            progress.show(samples.value, read.value)
    except BaseException:
        kill_workers(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[RunConfig, Encoder, ShardReader, Callable[[int, int], None]] | None = None


def _start_worker(cfg: RunConfig, tokenizer: Tokenizer, samples: Any, read: Any) -> None:
    global _worker
    end_with_trainer()

    def add(more_samples: int, more_bytes: int) -> None:
        with samples.get_lock():
            samples.value += more_samples
        with read.get_lock():
            read.value += more_bytes

    _worker = (cfg, Encoder(cfg, tokenizer), ShardReader(cfg.data.io_retries), add)


def _run_in_worker(task: VerifyTask) -> ShardReport:
    assert _worker is not None
    cfg, encoder, reader, add = _worker
    told = [0, 0]
    last = time.monotonic()

    def moved(samples: int, at: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _SHARE_S:
            add(samples - told[0], at - told[1])
            told[:], last = [samples, at], now

    report = verify_shard(task, cfg, encoder, reader, moved)
    add(report.samples - told[0], task.shard.size - told[1])
    return report


class _ProgressLine:
    """A line at most every half second, with the time left estimated from bytes."""

    def __init__(self, stream: TextIO | None, tasks: Sequence[VerifyTask]) -> None:
        self._stream, self._total, self._count = stream, sum(task.shard.size for task in tasks), len(tasks)
        self._started = self._last = time.monotonic()
        self.samples = self.bytes = self.shards = 0

    def finished(self, task: VerifyTask, report: ShardReport, began: int, done: int) -> None:
        self.shards += 1
        self.show(done + report.samples, began + task.shard.size)

    def show(self, samples: int, read: int) -> None:
        self.samples, self.bytes = samples, read
        now = time.monotonic()
        if self._stream is None or (now - self._last < _TICK_S and self.shards < self._count):
            return
        self._last = now
        elapsed = now - self._started
        left = elapsed * (self._total - read) / max(read, 1)
        print(
            f"verify: shard {self.shards}/{self._count}, {samples:,} samples, {read / 2**20:,.1f} of {self._total / 2**20:,.1f} MiB, "
            f"{elapsed:.0f} s, {left:.0f} s left",
            file=self._stream,
            flush=True,
        )
