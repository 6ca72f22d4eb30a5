"""Import: a reader's entries -> samples made in parallel -> shards, a manifest and the list of what was skipped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from jp_train.data.processes import ordered_results
from jp_train.data.writer import ShardWriter, WrittenShard
from jp_train.errors import ConfigError, DataError
from jp_train.terminal import ProgressLine, printable
from jp_train.tools.importers.entries import Listing, Reader
from jp_train.tools.importers.files import refuse_output_in_source
from jp_train.tools.importers.manifest import SKIPPED, Manifest, OutputState, SkipLog, locked, resume_or_start
from jp_train.tools.importers.samples import MAIN, TEXT, EntryResult, SampleRules, make_chunk

FIRST_FAILURES = 1000
"""The import stops when none of the first entries, this many, becomes a sample: an option is wrong, not a thousand
entries."""

_FEW = 8
"""Fewer chunks than this are done without starting processes, which takes seconds."""


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Where an import writes and how. `shard_mib` in MiB; `text_out` is a folder for conversations without an image, or
    None."""

    out: Path
    text_out: Path | None = None
    shard_mib: float = 256
    shard_samples: int = 10_000
    processes: int = 1
    decode: bool = False
    max_image_pixels: int = 100_000_000


def import_source(reader: Reader, settings: ImportSettings, stream: TextIO | None = None) -> Manifest:
    """Write every entry of `reader` into shards under `settings.out`, or go on with an import that was interrupted
    there; returns the complete manifest.

    `stream` gets progress and remarks: how the source was understood, and what the import goes on from.

    Raises:
        ConfigError: for a source that is not the reader's layout, or a folder that holds another import.
        DataError: for I/O errors, a damaged listing, or a source without a usable entry. Shards written so far stay;
            the same command goes on from them.
    """

    def say(text: str) -> None:
        if stream is not None:
            print(f"import: {text}", file=stream, flush=True)

    say(f"reading the listing of {reader.source}")
    listing = checked_listing(reader, settings)
    for remark in listing.told:
        say(remark)
    folders = {MAIN: settings.out} | ({TEXT: settings.text_out} if settings.text_out else {})
    new = Manifest(
        format=reader.format,
        source=str(reader.source.absolute()),
        identity=listing.identity,
        options=_options(reader, settings),
        left_out=listing.left_out,
        outputs={name: OutputState(folder=str(folder.absolute())) for name, folder in folders.items()},
    )
    with ExitStack() as locks:
        for folder in folders.values():
            locks.enter_context(locked(folder))
        manifest = resume_or_start(settings.out, new)
        manifest.left_out = listing.left_out
        if manifest.log_end:
            state = "complete already" if manifest.complete else "going on"
            say(f"{state}: {_shards(manifest):,} shards are there, with the first {manifest.log_end:,} entries")
        if not manifest.complete:
            manifest.store(settings.out)
            _write(manifest, listing, reader, settings, stream)
    return manifest


def _write(
    manifest: Manifest, listing: Listing, reader: Reader, settings: ImportSettings, stream: TextIO | None
) -> None:
    """The entries that `manifest` does not have yet, into its shards."""
    rules = SampleRules(
        reader=reader,
        decode=settings.decode,
        max_image_pixels=settings.max_image_pixels,
        keep_text_only=settings.text_out is not None,
    )
    start = min(output.end for output in manifest.outputs.values())
    chunks = (chunk for chunk in listing.chunks() if chunk.first + chunk.count > start)
    work = ordered_results(
        chunks,
        partial(make_chunk, rules=rules),
        settings.processes,
        describe=lambda chunk: f"entry {chunk.first:,}",
        at_least=_FEW,
    )
    line: ProgressLine | None = None
    with _Outputs(manifest, settings) as outputs, work as results:
        for chunk, entries in results:
            outputs.add(entries)
            # the first chunk waits for the processes to start, and for what an earlier run did already
            line = line or ProgressLine("import", stream, done=chunk.done)
            line.show(
                chunk.done,
                listing.total,
                f"{manifest.counts['entries']:,} entries",
                f"{outputs.skipped:,} skipped",
                f"{outputs.shards:,} shards",
            )
        outputs.finish()


def checked_listing(reader: Reader, settings: ImportSettings) -> Listing:
    """The listing of a source, after a check of the settings. Raises ConfigError and DataError as `import_source`."""
    if (
        not 0 < settings.shard_mib < math.inf
        or min(settings.processes, settings.shard_samples, settings.max_image_pixels) < 1
    ):
        raise ConfigError("--processes, --shard-size, --shard-samples and --max-image-pixels must be positive")
    if settings.text_out is not None and settings.text_out.resolve() == settings.out.resolve():
        raise ConfigError(
            f"--text-out is OUT itself ({settings.out}): text shards have another kind and need another folder"
        )
    for folder in (settings.out, settings.text_out):
        if folder is not None:
            refuse_output_in_source(reader.source, folder)
    listing = reader.listing()
    if reader.images is not None and not reader.images.is_dir():
        raise ConfigError(
            f"--images {reader.images} is no folder; name the folder that the paths of the images start in"
        )
    return listing


def _shards(manifest: Manifest) -> int:
    return sum(len(output.shards) for output in manifest.outputs.values())


class _Outputs:
    """Writes samples and skips in listing order, and keeps shards, `skipped.jsonl` and the manifest consistent.

    After a resume, each output ignores the entries it already holds, and the log those that are already counted.
    """

    def __init__(self, manifest: Manifest, settings: ImportSettings) -> None:
        self._manifest, self._settings = manifest, settings
        self._writers = {
            name: ShardWriter(
                Path(output.folder),
                max_bytes=max(1, int(settings.shard_mib * 2**20)),
                max_samples=settings.shard_samples,
                number=len(output.shards),
            )
            for name, output in manifest.outputs.items()
        }
        self._next = 0
        self._example = ""
        self._log = SkipLog(settings.out, manifest)

    @property
    def skipped(self) -> int:
        return sum(self._manifest.skipped.values())

    @property
    def shards(self) -> int:
        """Shards that are complete or being written."""
        return sum(writer.begun for writer in self._writers.values())

    def add(self, results: Iterable[EntryResult]) -> None:
        for result in results:
            self._next = result.number
            if result.packed is not None:
                self._write(result)
            if result.number >= self._manifest.log_end:
                self._count(result)
            self._next = result.number + 1

    def finish(self) -> None:
        """Close the last shards and mark the import complete. Raises DataError when no entry became a sample."""
        for name, writer in self._writers.items():
            if (shard := writer.finish()) is not None:
                self._commit(name, shard)
        self._log.sync(self._next)
        manifest = self._manifest
        for output in manifest.outputs.values():
            output.end = manifest.log_end
        if manifest.wrote_nothing:
            raise DataError(f"no entry of {manifest.source} became a sample ({self.skipped:,} skipped){self._example}")
        manifest.complete = True
        manifest.store(self._settings.out)

    def __enter__(self) -> _Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.discard()
        self._log.close()

    def _write(self, result: EntryResult) -> None:
        if result.number < self._manifest.outputs[result.output].end:
            return
        assert result.packed is not None
        shard = self._writers[result.output].append(result.packed)
        if shard is not None:
            self._commit(result.output, shard)

    def _count(self, result: EntryResult) -> None:
        counts = self._manifest.counts
        counts["entries"] += 1
        counts["converted"] += result.converted
        if not result.reason:
            return
        self._manifest.count_skip(result.reason)
        self._example = self._example or printable(f"; the first: {result.name}: {result.message}")
        self._log.write(entry=result.number, name=result.name, reason=result.reason, message=result.message)
        if counts["entries"] == FIRST_FAILURES == self.skipped:
            raise DataError(
                f"none of the first {FIRST_FAILURES:,} entries became a sample{self._example}. "
                "Check the options (image folder, columns, kind); "
                f"{self._settings.out / SKIPPED} names every entry"
            )

    def _commit(self, output: str, shard: WrittenShard) -> None:
        """A shard is complete: it holds this output's samples of every entry before `_next`."""
        state = self._manifest.outputs[output]
        state.shards.append(shard)
        state.end = self._next
        self._log.sync(self._next)
        self._manifest.store(self._settings.out)


def _options(reader: Reader, settings: ImportSettings) -> dict[str, Any]:
    """Everything besides the source that decides the content of the shards, as JSON values: not the processes."""
    settled = {
        "kind": reader.kind.value,
        "shard_mib": settings.shard_mib,
        "shard_samples": settings.shard_samples,
        "decode": settings.decode,
        "max_image_pixels": settings.max_image_pixels,
    }
    return json.loads(json.dumps({**reader.options(), **settled}))
