"""`jp-train data import`: run an import, or describe it with --dry-run, and summarise the result."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from jp_train.errors import ConfigError
from jp_train.terminal import ProgressLine, printable
from jp_train.tools.importers.entries import Entry, Reader, Skip
from jp_train.tools.importers.images import read_inside, refuse_outside
from jp_train.tools.importers.manifest import SKIPPED
from jp_train.tools.importers.run import ImportSettings, checked_listing, import_source
from jp_train.tools.importers.summary import format_summary, recipe_lines, skipped_examples, skipped_lines, summarise
from jp_train.tools.importers.tars import find_tars
from jp_train.tools.importers.tars_run import import_tars, usable_samples
from jp_train.types import Kind

SAMPLED_IMAGES = 200
"""Images that a dry run reads to estimate the size of the shards."""


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

    with _interruptible(stream):
        manifest = import_source(reader, settings, stream)
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
    tars = find_tars(source, allow_pipe=allow_pipe)
    where = f"copied into {out.absolute()} as plain shards" if tars.copies else "validated and indexed where they are"
    if dry_run:
        text = f"import webdataset: {len(tars.names):,} tars would be {where}; nothing was written\n" + "\n".join(
            f"  {name}" for name in tars.names[:5]
        )
        return {"format": "webdataset", "dry_run": True, "tars": len(tars.names), "copies": tars.copies}, text
    print(f"import: {len(tars.names):,} tars, {where}", file=stream, flush=True)
    with _interruptible(stream):
        manifest = import_tars(source, tars, out, kind, processes, stream)
    summary = summarise(manifest, kind.value, {}, out, time.monotonic() - started)
    summary["samples"] = usable_samples(manifest)
    if not tars.copies:
        summary["sources"][0] |= {"name": out.name, "folder": str(Path(tars.names[0]).parent), "spec": tars.spec}
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


@dataclass(kw_only=True)
class _Survey:
    """What a listing holds, and what a few of its images show. `sizes`: bytes of the images that were read."""

    entries: int = 0
    text_only: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    images_read: int = 0
    images_bad: int = 0
    sizes: list[int] = field(default_factory=list)

    def add(self, entry: Entry, images: Path | None, *, look: bool) -> bool:
        """Count an entry and, with `look`, read its image. Returns whether an image was read."""
        self.entries += 1
        skip = entry.skip
        path = entry.image if images is not None and isinstance(entry.image, str) else None
        try:
            if skip is None and path is not None and images is not None:
                refuse_outside(images, path)
        except Skip as outside:
            skip = outside
        if skip is not None:
            self.skipped[skip.fault] += 1
            self._example(skip.fault, entry, skip)
            return False
        self.text_only += entry.text_only
        if not look or path is None or images is None:
            return False
        self.images_read += 1
        try:
            self.sizes.append(len(read_inside(images, path)))
        except Skip as bad:
            self.images_bad += 1
            self._example("images", entry, bad)
        return True

    def _example(self, reason: str, entry: Entry, skip: Skip) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 2:
            examples.append(f"{entry.name}: {skip}")


def _dry_run(reader: Reader, settings: ImportSettings, stream: TextIO) -> tuple[dict[str, Any], str]:
    """What an import would write, from the whole listing and a few images; nothing is written."""
    listing = checked_listing(reader, settings)
    survey, line = _Survey(), ProgressLine("import", stream)
    for chunk in listing.chunks():
        # The first image of every so many chunks: spread over the listing, the same every time.
        look = survey.images_read < SAMPLED_IMAGES and chunk.done * SAMPLED_IMAGES >= survey.images_read * listing.total
        for entry in reader.entries(chunk, image_bytes=False):
            look = not survey.add(entry, reader.images, look=look) and look
        line.show(
            chunk.done,
            listing.total,
            f"{survey.entries:,} entries",
            f"{survey.skipped.total():,} skipped by the listing",
        )
    samples = survey.entries - survey.skipped.total() - survey.text_only
    mib = samples * sum(survey.sizes) / len(survey.sizes) / 2**20 if survey.sizes else None
    shards = max(-(-samples // settings.shard_samples), 0 if mib is None else int(-(-mib // settings.shard_mib)))
    summary = {
        "format": reader.format,
        "dry_run": True,
        "entries": survey.entries,
        "samples": samples,
        "text_only": survey.text_only,
        "skipped": dict(survey.skipped),
        "pictures_read": survey.images_read,
        "pictures_bad": survey.images_bad,
        "estimated_mib": None if mib is None else round(mib, 1),
        "estimated_shards": shards,
    }
    good = "" if reader.kind is Kind.TEXT else " if every image is good"
    lines = [
        f"import {reader.format}, dry run: {survey.entries:,} entries, {samples:,} {reader.kind.value} samples{good}, "
        f"{survey.skipped.total():,} skipped by the listing alone; nothing was written",
        *(f"  {remark}" for remark in listing.remarks),
        *_survey_lines(survey, settings),
        f"  would write about {shards:,} shards{'' if mib is None else f', about {mib:,.0f} MiB'} to {settings.out}",
        *skipped_lines(survey.skipped, survey.examples),
    ]
    return summary, "\n".join(lines)


def _survey_lines(survey: _Survey, settings: ImportSettings) -> Iterator[str]:
    if survey.text_only:
        kept = (
            f"would go to {settings.text_out}"
            if settings.text_out
            else "would be skipped: give --text-out FOLDER to keep them"
        )
        yield f"  {survey.text_only:,} conversations without an image {kept}"
    if survey.images_read:
        yield f"  {survey.images_read:,} images read, {survey.images_bad:,} of them missing or rejected"
        yield from (f"             e.g. {printable(example)}" for example in survey.examples.get("images", []))
