"""`jp-train data import`: run or only describe an import, and say what came of it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jp_train.errors import ConfigError
from jp_train.terminal import printable
from jp_train.tools.importers.entries import Reader, Skip
from jp_train.tools.importers.manifest import SKIPPED
from jp_train.tools.importers.pictures import read_inside, refuse_outside
from jp_train.tools.importers.run import ImportProgress, ImportSettings, checked_listing, import_source
from jp_train.tools.importers.summary import (
    ProgressLine,
    format_summary,
    recipe_lines,
    skipped_examples,
    skipped_lines,
    summarise,
)
from jp_train.tools.importers.tars import find_tars
from jp_train.tools.importers.tars_run import import_tars, usable_samples
from jp_train.types import Kind

SAMPLED_PICTURES = 200
"""Pictures that a dry run reads to estimate the size of the shards."""


def import_command(
    reader: Reader, settings: ImportSettings, *, dry_run: bool = False, stream: TextIO | None = None
) -> tuple[dict[str, Any], str]:
    """Import (or with `dry_run` only read the listing); returns the JSON object and the text for people. Progress goes
    to `stream` (default: stderr).

    Raises:
        ConfigError, DataError: see `import_source`.
    """
    stream = stream or sys.stderr
    started = time.monotonic()
    if dry_run:
        return _dry_run(reader, settings, stream)

    def say(text: str) -> None:
        print(f"import: {text}", file=stream, flush=True)

    say(f"reading the listing of {reader.source}")
    with _interruptible(stream):
        manifest = import_source(reader, settings, ProgressLine(stream), say=say)
    summary = summarise(manifest, reader.kind.value, reader.source_keys(), settings.out, time.monotonic() - started)
    return summary, format_summary(summary, skipped_examples(settings.out / SKIPPED))


def import_tars_command(
    source: str,
    out: Path,
    kind: Kind,
    *,
    processes: int,
    allow_pipe: bool,
    dry_run: bool = False,
    stream: TextIO | None = None,
) -> tuple[dict[str, Any], str]:
    """The same for an existing WebDataset; see tars.py."""
    stream = stream or sys.stderr
    started = time.monotonic()
    if processes < 1:
        raise ConfigError(f"--processes must be positive, got {processes}")
    found = find_tars(source, allow_pipe=allow_pipe)
    where = f"copied into {out.absolute()} as plain shards" if found.copies else "validated and indexed where they are"
    if dry_run:
        text = f"import webdataset: {len(found.names):,} tars would be {where}; nothing was written\n" + "\n".join(
            f"  {name}" for name in found.names[:5]
        )
        return {"format": "webdataset", "dry_run": True, "tars": len(found.names), "copies": found.copies}, text
    print(f"import: {len(found.names):,} tars, {where}", file=stream, flush=True)
    with _interruptible(stream):
        manifest = import_tars(source, found, out, kind, processes, ProgressLine(stream))
    summary = summarise(manifest, kind.value, {}, out, time.monotonic() - started)
    summary["samples"] = usable_samples(manifest)
    if not found.copies:
        one = summary["sources"][0]
        one |= {"name": out.name, "folder": str(Path(found.names[0]).parent), "spec": found.spec}
        summary["recipe"] = "\n".join(recipe_lines(summary["sources"]))
    return summary, format_summary(summary, skipped_examples(out / SKIPPED))


@contextlib.contextmanager
def _interruptible(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(
            "import: stopped; finished shards are kept, and the same command goes on from them", file=stream, flush=True
        )
        raise


def _dry_run(reader: Reader, settings: ImportSettings, stream: TextIO) -> tuple[dict[str, Any], str]:
    """Reads the whole listing and a few pictures; writes nothing."""
    listing = checked_listing(reader, settings)
    progress = ProgressLine(stream)
    counts: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    sizes: list[int] = []
    looked_at = 0

    def skipped(name: str, skip: Skip) -> None:
        skips[skip.fault] += 1
        if len(found := examples.setdefault(skip.fault, [])) < 2:
            found.append(f"{name}: {skip}")

    for chunk in listing.chunks():
        # The first entry of every so many chunks: spread over the listing, the same every time.
        look = looked_at < SAMPLED_PICTURES and chunk.done * SAMPLED_PICTURES >= looked_at * listing.total
        for entry in reader.entries(chunk, pictures=False):
            counts["entries"] += 1
            if entry.skip is not None:
                skipped(entry.name, entry.skip)
            elif entry.text_only:
                counts["text_only"] += 1
            elif isinstance(entry.image, str) and reader.images is not None:
                try:
                    refuse_outside(reader.images, entry.image)
                except Skip as skip:
                    skipped(entry.name, skip)
                    continue
                if not look:
                    continue
                look, looked_at = False, looked_at + 1
                try:
                    sizes.append(len(read_inside(reader.images, entry.image)))
                except Skip as skip:
                    counts["pictures_missing"] += 1
                    if len(missing := examples.setdefault("pictures", [])) < 2:
                        missing.append(f"{entry.name}: {skip}")
        progress(
            ImportProgress(
                done=chunk.done,
                total=listing.total,
                resumed=0,
                entries=counts["entries"],
                skipped=skips.total(),
                shards=0,
            )
        )
    samples = counts["entries"] - skips.total() - counts["text_only"]
    mib = samples * sum(sizes) / len(sizes) / 2**20 if sizes else None
    shards = max(-(-samples // settings.shard_samples), 0 if mib is None else int(-(-mib // settings.shard_mib)))
    result = {
        "format": reader.format,
        "dry_run": True,
        "entries": counts["entries"],
        "samples": samples,
        "text_only": counts["text_only"],
        "skipped": dict(skips),
        "pictures_read": looked_at,
        "pictures_bad": counts["pictures_missing"],
        "estimated_mib": None if mib is None else round(mib, 1),
        "estimated_shards": shards,
    }
    good = "" if reader.kind is Kind.TEXT else " if every picture is good"
    lines = [
        f"import {reader.format}, dry run: {counts['entries']:,} entries, {samples:,} {reader.kind.value} samples{good}, "
        f"{skips.total():,} skipped by the listing alone; nothing was written",
        *(f"  {remark}" for remark in listing.remarks),
    ]
    if counts["text_only"]:
        kept = (
            f"would go to {settings.text_out}"
            if settings.text_out
            else "would be skipped: give --text-out FOLDER to keep them"
        )
        lines.append(f"  {counts['text_only']:,} dialogues without a picture {kept}")
    if looked_at:
        lines.append(f"  {looked_at:,} pictures looked at, {counts['pictures_missing']:,} of them missing or refused")
        lines += [f"             e.g. {printable(example)}" for example in examples.get("pictures", [])]
    size = "" if mib is None else f", about {mib:,.0f} MiB"
    lines.append(f"  would write about {shards:,} shards{size} to {settings.out}")
    return result, "\n".join([*lines, *skipped_lines(skips, examples)])
