"""`data import --dry-run`: what an import would write, from its whole listing and a few of its entries, which are made
into samples as the import would make them. Nothing is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TextIO

from jp_train.terminal import ProgressLine, printable
from jp_train.tools.importers.entries import REASONS, REJECTED, SAMPLED, Chunk, Entry, Reader, Skip
from jp_train.tools.importers.images import refuse_outside
from jp_train.tools.importers.run import FIRST_FAILURES, ImportSettings, checked_listing
from jp_train.tools.importers.samples import MAIN, EntryResult, SampleRules, make_sample
from jp_train.tools.importers.summary import skipped_lines
from jp_train.tools.importers.tars import TarSource, look_into
from jp_train.types import Kind

TARS = 8
"""Of a WebDataset at most this many tars are looked into, and of each its first samples."""
_EXAMPLES = 2
_Z = 1.96


@dataclass(kw_only=True)
class Looked:
    """What became of the entries that were read: `sizes` are bytes in the shard of those that become samples of the
    source's kind, `texts` counts conversations without an image that go to --text-out, `rejected` the others by
    reason."""

    sizes: list[int] = field(default_factory=list)
    texts: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        return len(self.sizes) + self.texts + self.rejected.total()

    def add(self, result: EntryResult) -> None:
        if result.packed is None:
            self.reject(result.reason, f"{result.name}: {result.message}")
        elif result.output == MAIN:
            self.sizes.append(len(result.packed))
        else:
            self.texts += 1

    def reject(self, reason: str, example: str) -> None:
        self.rejected[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)


@dataclass(kw_only=True)
class _Survey:
    """What a listing holds. `skipped`: entries that it alone shows to become no sample. `kept`: of the `chunks` that
    have other entries a random selection, each with the numbers of those entries."""

    random: Random = field(default_factory=lambda: Random(0))  # the same entries every time
    entries: int = 0
    text_only: int = 0
    stops: bool = False
    skipped: Looked = field(default_factory=Looked)
    chunks: int = 0
    kept: list[tuple[Chunk, list[int]]] = field(default_factory=list)

    def count(self, entry: Entry, settings: ImportSettings, images: Path | None) -> bool:
        """Count an entry, and return whether it may become a sample."""
        self.entries += 1
        skip = entry.skip or _outside(entry, images)
        if skip is not None:
            self.skipped.reject(skip.fault, f"{entry.name}: {skip}")
        elif entry.text_only:
            self.text_only += 1
        lost = self.skipped.entries + (self.text_only if settings.text_out is None else 0)
        self.stops |= self.entries == FIRST_FAILURES == lost
        return skip is None and not entry.text_only

    def keep(self, chunk: Chunk, numbers: list[int], most: int) -> None:
        """Select `most` chunks of the stream so far, each with the same chance."""
        if not numbers:
            return
        self.chunks += 1
        if len(self.kept) < most:
            self.kept.append((chunk, numbers))
        elif (place := self.random.randrange(self.chunks)) < most:
            self.kept[place] = chunk, numbers

    def look(self, rules: SampleRules) -> Looked:
        """Make samples of up to SAMPLED entries of the selected chunks."""
        looked = Looked()
        pool = [(place, number) for place, (_, numbers) in enumerate(self.kept) for number in numbers]
        wanted: dict[int, set[int]] = {}
        for place, number in self.random.sample(pool, min(SAMPLED, len(pool))):
            wanted.setdefault(place, set()).add(number)
        for place, numbers in sorted(wanted.items(), key=lambda item: self.kept[item[0]][0].first):
            for entry in rules.reader.entries(self.kept[place][0]):
                if entry.number in numbers:
                    looked.add(make_sample(entry, rules))
                    numbers.discard(entry.number)
                if not numbers:
                    break
        return looked


def _outside(entry: Entry, images: Path | None) -> Skip | None:
    try:
        for path in entry.images:
            if images is not None and isinstance(path, str):
                refuse_outside(images, path)
    except Skip as skip:
        return skip
    return None


def survey(reader: Reader, settings: ImportSettings, stream: TextIO) -> tuple[dict[str, Any], str]:
    """What an import would write: the JSON object, whose `stops` says that the import would end with an error, and the
    text for people. Raises ConfigError, DataError as the import."""
    listing = checked_listing(reader, settings)
    seen, line = _Survey(), ProgressLine("import", stream)
    for chunk in listing.chunks():
        entries = reader.entries(chunk, image_bytes=False)
        numbers = [entry.number for entry in entries if seen.count(entry, settings, reader.images)]
        seen.keep(chunk, numbers, reader.surveyed)
        skipped = f"{seen.skipped.entries:,} skipped by the listing"
        line.show(chunk.done, listing.total, f"{seen.entries:,} entries", skipped)
    rules = SampleRules(
        reader=reader,
        decode=settings.decode,
        max_image_pixels=settings.max_image_pixels,
        keep_text_only=settings.text_out is not None,
    )
    looked = seen.look(rules)
    candidates = seen.entries - seen.skipped.entries - seen.text_only
    samples, low, high = _extrapolated(len(looked.sizes), looked.entries, candidates)
    mib = samples * sum(looked.sizes) / len(looked.sizes) / 2**20 if looked.sizes else None
    by_size = 0 if mib is None else math.ceil(mib / settings.shard_mib)
    kept_texts = settings.text_out is not None and seen.text_only + looked.texts > 0
    summary = {
        "format": reader.format,
        "dry_run": True,
        "entries": seen.entries,
        "samples": candidates,
        "text_only": seen.text_only,
        "skipped": dict(seen.skipped.rejected),
        "left_out": dict(listing.left_out),
        "read": looked.entries,
        "rejected": dict(looked.rejected),
        "estimated_samples": samples,
        "estimated_range": [low, high],
        "estimated_mib": None if mib is None else round(mib, 1),
        "estimated_shards": max(math.ceil(samples / settings.shard_samples), by_size),
        "stops": seen.stops or not (looked.sizes or kept_texts),
    }
    few = len(seen.kept) < min(seen.chunks, SAMPLED)
    parts = f" in {len(seen.kept)} of {seen.chunks:,} row groups, so roughly" if few else ""
    return summary, "\n".join(
        [
            f"import {reader.format}, dry run: {seen.entries:,} entries, {seen.skipped.entries:,} skipped by the "
            "listing alone; nothing was written",
            *(f"  {remark}" for remark in listing.told),
            *_text_only_lines(seen.text_only, settings),
            *looked_lines(looked, candidates, reader.kind, parts),
            *_outcome(summary, reader.kind, settings, first_lost=seen.stops),
            *skipped_lines(seen.skipped.rejected, seen.skipped.examples),
        ]
    )


def _extrapolated(good: int, read: int, total: int) -> tuple[int, int, int]:
    """How many of `total` entries become samples when `good` of `read` random ones do, and the bounds of that at 95 %
    (Wilson 1927); exact where all were read."""
    if not read or read == total:
        return good, good, good
    share, z2 = good / read, _Z**2 / read
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(share * (1 - share) / read + z2 / read / 4) / (1 + z2)
    low, high = round(total * (centre - half)), round(total * (centre + half))
    return round(total * share), max(low, good), min(high, total - (read - good))


def looked_lines(looked: Looked, candidates: int, kind: Kind, parts: str = "") -> Iterator[str]:
    """How many entries were read of how many, how many of them are no sample, and why most of them."""
    what = "documents" if kind is Kind.TEXT else "images"
    bad = looked.rejected.total()
    if not candidates:
        return
    line = f"  read the {what} of {looked.entries:,} of {candidates:,} entries, spread over the listing{parts}: "
    if not bad:
        yield f"{line}none missing or rejected"
        return
    reason, count = looked.rejected.most_common(1)[0]
    most = "all" if count == bad else f"{count:,}"
    yield (
        f"{line}{bad:,} missing or rejected ({100 * bad / looked.entries:.3g} %), {most} of them for {reason} "
        f"({REASONS.get(reason, REJECTED)})"
    )
    yield f"             e.g. {printable(looked.examples[reason][0])}"


def _text_only_lines(count: int, settings: ImportSettings) -> Iterator[str]:
    to = settings.text_out
    if count:
        kept = f"would go to {to}" if to else "would be skipped: give --text-out FOLDER to keep them"
        yield f"  {count:,} conversations without an image {kept}"


def _outcome(summary: dict[str, Any], kind: Kind, settings: ImportSettings, *, first_lost: bool) -> Iterator[str]:
    read, candidates = summary["read"], summary["samples"]
    samples, (low, high) = summary["estimated_samples"], summary["estimated_range"]
    if summary["stops"]:
        which = "no entry" if read == candidates else f"none of the {read:,} entries that were read"
        which = f"none of the first {FIRST_FAILURES:,} entries" if first_lost else which
        sure = "" if first_lost or read == candidates else "probably "
        yield (
            f"  {which} would become a sample: the import would {sure}stop with exit status 3. Check the options "
            "(image folder, columns, kind)"
        )
        return
    about, bounds = ("", "") if read == candidates else ("about ", f" ({low:,} to {high:,} at 95 %)")
    mib = summary["estimated_mib"]
    size = "" if mib is None else f", about {mib:,.0f} MiB"
    yield (
        f"  would write {about}{samples:,} {kind.value} samples{bounds} in about {summary['estimated_shards']:,} "
        f"shards{size} to {settings.out}"
    )


def survey_tars(tars: TarSource, kind: Kind, where: str) -> tuple[dict[str, Any], str]:
    """The same for a WebDataset: the first samples of tars spread over the source are judged as the import does; those
    that have to be written again are only counted. Raises DataError for a tar that is corrupt up to there."""
    total = len(tars.names)
    count = 0 if tars.copies else min(TARS, total)
    looked, images = Looked(), Looked()
    for name in (tars.names[place * total // count] for place in range(count)):
        checked, undecodable = look_into(name, kind, SAMPLED // count)
        looked.sizes += [0] * (checked.entries - len(checked.bad))
        for key, reason, message in checked.bad:
            looked.reject(reason, f"{name}: {key}: {message}")
        for key, reason, message in undecodable:
            images.reject(reason, f"{name}: {key}: {message}")
    lines = [f"import webdataset: {total:,} tars would be {where}; nothing was written"]
    lines += [f"  {name}" for name in tars.names[:5]]
    stops = bool(count) and not looked.sizes
    if count:
        lines.append(
            f"  read the first samples of {count:,} of {total:,} tars, {looked.entries:,} in all: "
            f"{looked.rejected.total():,} not usable, {images.rejected.total():,} with an image that cannot be used"
        )
    else:
        lines.append("  compressed tars and commands are not read by a dry run")
    lines += skipped_lines(looked.rejected, looked.examples) + skipped_lines(images.rejected, images.examples)
    if stops:
        lines.append(
            f"  no {kind.value} sample among them is usable: the import would probably stop with exit status 3; is "
            "--kind right?"
        )
    summary = {"format": "webdataset", "dry_run": True, "tars": total, "copies": tars.copies, "read": looked.entries}
    rejected = {"rejected": dict(looked.rejected), "images_rejected": dict(images.rejected), "stops": stops}
    return summary | rejected, "\n".join(lines)
