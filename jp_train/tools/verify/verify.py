"""`jp-train data verify`: one pass over every shard of a run's training and held-out sources, in parallel processes.

Nothing stops the pass: a broken tar, an unreachable shard, even a process that dies on a shard is a line of the report.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from jp_train.config.schema import RunConfig, SourceConfig
from jp_train.data.encode import Encoder
from jp_train.data.exclusions import Excluded, known_exclusions, store_exclusions
from jp_train.data.processes import DeadWorkerError, ordered_results, worker_context
from jp_train.data.shards import Shard, ShardReader, expand_shards, passed_over, passed_over_text
from jp_train.data.tokenizer import Tokenizer, load_tokenizer
from jp_train.errors import ConfigError, DataError
from jp_train.terminal import ProgressLine
from jp_train.tools.verify.report import Report, format_report, write_report
from jp_train.tools.verify.shard import UNREADABLE, Fault, ShardReport, VerifyTask, verify_shard
from jp_train.types import Kind

EXIT_CLEAN, EXIT_FAULTS = 0, 3
DIED, PASSED_OVER, UNUSABLE = "process_died", "passed_over", "no_usable_sample"
_NONE_USABLE = "the source has no usable sample: its shards are empty, or all of their samples are excluded"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """`decode`: images decoded per source (None: all, 0: none); `exclude`: write down what the index must leave
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
    encoder = Encoder(cfg, tokenizer)  # a wrong tokenizer is an error of the configuration, not of every shard
    tasks: list[VerifyTask] = []
    unreachable: list[Fault] = []
    for name, source in sources.items():
        reachable, faults = _tasks(cfg, name, source, options.decode)
        tasks += reachable
        unreachable += faults
    excluded = {
        (task.source, task.shard.path, key)
        for task in tasks
        for key in known_exclusions(task.shard, Kind(task.config.kind.value))
    }
    reports = _verify_all(tasks, cfg, encoder, options.processes, progress)
    report = Report(
        sources={name: source.kind.value for name, source in sources.items()},
        shards=reports,
        unreachable=unreachable,
        decode=options.decode,
        seconds=0.0,
        excluded=excluded,
    )
    report.exclude = options.exclude
    if options.exclude:
        report.newly_excluded, report.exclusion_files = _exclude(tasks, reports, partial=options.decode is not None)
        report.excluded |= report.newly_excluded
    report.of_sources += [
        Fault(fault=PASSED_OVER, source=name, shard=source.shards, key=None, offset=None, reason=text, warning=True)
        for name, source in sources.items()
        if (text := passed_over_text(passed_over(source.shards, cfg.data.root)))
    ]
    report.of_sources += [
        Fault(fault=UNUSABLE, source=name, shard=sources[name].shards, key=None, offset=None, reason=_NONE_USABLE)
        for name in report.unusable_sources()
    ]
    report.seconds = time.monotonic() - started
    return report


def _tasks(cfg: RunConfig, name: str, source: SourceConfig, decode: int | None) -> tuple[list[VerifyTask], list[Fault]]:
    """A task for each shard that can be reached, a fault for each that cannot."""
    reader = ShardReader(cfg.data.io_retries, index_dir=cfg.data.index_dir)
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
    """Write the faults that only decoding shows; a pass that decoded everything replaces what earlier passes wrote.
    Returns the new samples and the written files."""
    bad_samples: dict[tuple[str, Kind], dict[str, Excluded]] = {}
    shards: dict[str, Shard] = {}
    new: set[tuple[str, str, str]] = set()
    for task, report in zip(tasks, reports, strict=True):
        if not report.whole:
            continue  # its later samples were not seen, and the index refuses it anyway
        kind = Kind(task.config.kind.value)
        shards[task.shard.path] = task.shard
        bad = bad_samples.setdefault((task.shard.path, kind), {})
        bad |= {
            fault.key: Excluded(fault.fault, fault.reason)
            for fault in report.faults
            if fault.image and fault.key is not None
        }
        known = known_exclusions(task.shard, kind)
        new |= {(task.source, task.shard.path, key) for key in bad.keys() - known.keys()}
    files = []
    for (path, kind), bad in bad_samples.items():
        known = known_exclusions(shards[path], kind)
        excluded = {**known, **bad} if partial else bad
        if excluded.keys() != known.keys():
            files.append(store_exclusions(shards[path], kind, excluded))
    return new, files


def _verify_all(
    tasks: Sequence[VerifyTask], cfg: RunConfig, encoder: Encoder, processes: int, stream: TextIO | None
) -> list[ShardReport]:
    """The report of each task, in their order. After a process died, what is left runs in a process per shard, so
    that the shard that kills it is known."""
    reports: dict[int, ShardReport] = {}
    reader = ShardReader(cfg.data.io_retries, index_dir=cfg.data.index_dir)

    def run(numbers: Sequence[int], processes: int, at_least: int) -> None:
        progress = _Progress(stream, tasks, list(reports.values()))
        with ordered_results(
            [tasks[number] for number in numbers],
            partial(_verify, cfg=cfg, encoder=encoder, reader=reader, progress=progress),
            processes,
            describe=lambda task: f"shard {task.shard.path}",
            at_least=at_least,
            waiting=progress.show,
        ) as results:
            for number, (_, report) in zip(numbers, results, strict=True):
                reports[number] = report
                progress.shards += 1
                progress.show()

    largest_first = sorted(range(len(tasks)), key=lambda number: -tasks[number].shard.size)
    try:
        run(largest_first, min(processes, len(tasks)), at_least=2)
    except DeadWorkerError:
        for number in largest_first[len(reports) :]:
            with suppress(DeadWorkerError):
                run([number], 2, at_least=1)
            reports.setdefault(number, _died(tasks[number]))
    reader.close()
    return [reports[number] for number in range(len(tasks))]


def _verify(
    task: VerifyTask, *, cfg: RunConfig, encoder: Encoder, reader: ShardReader, progress: _Progress
) -> ShardReport:
    moved = progress.of_shard()
    report = verify_shard(task, cfg, encoder, reader, moved)
    moved(report.samples, task.shard.size)
    return report


def _died(task: VerifyTask) -> ShardReport:
    report = ShardReport(source=task.source, kind=task.config.kind.value, shard=task.shard, whole=False)
    reason = (
        "the process that read it died twice (killed for memory, or a decoder crashed): a loader worker of training "
        "would die here too"
    )
    report.faults.append(
        Fault(fault=DIED, source=task.source, shard=task.shard.path, key=None, offset=None, reason=reason)
    )
    return report


class _Progress:
    """Samples and bytes that all processes have read, and the line that shows them; in a worker it only counts."""

    def __init__(self, stream: TextIO | None, tasks: Sequence[VerifyTask], done: Sequence[ShardReport]) -> None:
        samples, read = sum(report.samples for report in done), sum(report.shard.size for report in done)
        self._count, self._total = len(tasks), sum(task.shard.size for task in tasks)
        self._samples, self._bytes = worker_context().Value("q", samples), worker_context().Value("q", read)
        self.shards = len(done)
        self._line: ProgressLine | None = ProgressLine("verify", stream, done=read)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_line": None}

    def of_shard(self) -> Callable[[int, int], None]:
        """What is to be called with the samples and bytes of one shard that have been read so far."""
        before = (0, 0)

        def moved(samples: int, read: int) -> None:
            nonlocal before
            with self._samples.get_lock():
                self._samples.value += samples - before[0]
            with self._bytes.get_lock():
                self._bytes.value += read - before[1]
            before = samples, read
            self.show()

        return moved

    def show(self) -> None:
        if self._line is not None:  # read without the locks, which a killed worker may hold
            samples, read = self._samples.get_obj().value, self._bytes.get_obj().value
            size = f"{read / 2**20:,.1f} of {self._total / 2**20:,.1f} MiB"
            done = read if self.shards == self._count else min(read, self._total - 1)  # one last line
            self._line.show(done, self._total, f"shard {self.shards}/{self._count}", f"{samples:,} samples", size)
