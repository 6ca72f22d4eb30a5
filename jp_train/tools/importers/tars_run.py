"""Import of an existing WebDataset: its tars in parallel processes, recorded in order.

After a kill only unfinished copies are made again. Tars that stay in place are checked by every run; their members
sidecars make that quick.
"""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import TextIO

from jp_train.data.processes import ordered_results
from jp_train.data.writer import WrittenShard
from jp_train.errors import ConfigError, DataError
from jp_train.terminal import ProgressLine
from jp_train.tools.importers.manifest import (
    NAME,
    SKIPPED,
    Manifest,
    OutputState,
    SkipLog,
    load_manifest,
    locked,
    resume_or_start,
)
from jp_train.tools.importers.samples import MAIN
from jp_train.tools.importers.tars import CheckedTar, TarSource, check_tar, copy_tar
from jp_train.types import Kind


def import_tars(
    source: str, tars: TarSource, out: Path, kind: Kind, processes: int, stream: TextIO | None = None
) -> Manifest:
    """Validate (and where `tars.copies` says so, copy into `out`) every tar; returns the complete manifest.

    Its shards are the copies, or the tars where they lie (names absolute, SHA-256 empty). Bad samples are named in
    `skipped.jsonl`; they stay in their tars, and the index leaves them out. Progress goes to `stream`.

    Raises:
        ConfigError: when `out` holds another import.
        DataError: for a corrupt tar, a failing command, or tars without a usable sample.
    """
    new = Manifest(
        format="webdataset",
        source=source,
        identity=tars.identity,
        # what init names as shards where the tars stay; copies are compared with all options when they resume
        options={"kind": kind.value, "copies": tars.copies, **({} if tars.copies else {"spec": tars.spec})},
        outputs={MAIN: OutputState(folder=str(out.absolute()) if tars.copies else "/")},
    )
    with locked(out):
        manifest = _resumed(new, tars, out)
        if manifest.complete:
            return manifest
        start = manifest.outputs[MAIN].end
        numbers = range(start, len(tars.names))
        work = ordered_results(
            numbers,
            partial(_run, tars=tars, out=out, kind=kind),
            min(processes, len(numbers)),
            describe=lambda number: tars.names[number],
        )
        line = ProgressLine("import", stream, done=start)
        with contextlib.closing(SkipLog(out, manifest)) as log, work as results:
            for number, checked in results:
                _record(manifest, log, number, tars.names[number], checked)
                if tars.copies:
                    manifest.store(out)
                line.show(
                    number + 1,
                    len(tars.names),
                    f"tar {number + 1:,}/{len(tars.names):,}",
                    f"{manifest.counts['entries']:,} entries",
                    f"{sum(manifest.skipped.values()):,} skipped",
                )
        if usable_samples(manifest) <= 0:
            raise DataError(
                f"{source} has no usable {kind.value} sample: {out / SKIPPED} says why for each; is --kind right?"
            )
        manifest.complete = True
        manifest.store(out)
    return manifest


def _record(manifest: Manifest, log: SkipLog, number: int, name: str, checked: CheckedTar) -> None:
    for key, reason, message in checked.bad:
        log.write(shard=name, name=f"{name}: {key}", reason=reason, message=message)
        manifest.count_skip(reason)
    for (role, place), count in checked.taken.items():
        manifest.count_taken(role, place, count)
    log.sync(number + 1)
    manifest.counts["entries"] += checked.entries
    output = manifest.outputs[MAIN]
    output.shards.append(
        checked.written or WrittenShard(name=name, size=checked.size, samples=checked.entries, sha256="")
    )
    output.end = number + 1


def _resumed(new: Manifest, tars: TarSource, out: Path) -> Manifest:
    """The manifest to continue from. Tars that are not copied yet may have changed since (a damaged one is repaired).

    Tars that stay in place are checked again; their reports are overwritten, those of another import never.
    """
    before = load_manifest(out)
    if not tars.copies:
        ours = (new.format, new.source, False)
        if before is not None and (before.format, before.source, before.options.get("copies")) != ours:
            if before.wrote_nothing:
                return new
            raise ConfigError(
                f"{out} holds an import of something else ({before.format} {before.source}): "
                f"its {NAME} and {SKIPPED} would be lost; choose "
                "another folder, or delete this one"
            )
        return new
    if before is not None and MAIN in before.outputs:
        pending = tars.names[before.outputs[MAIN].end :]
        now, new.identity = (
            new.identity,
            new.identity | {name: before.identity[name] for name in pending if name in before.identity},
        )
        manifest = resume_or_start(out, new)
        manifest.identity = now
        return manifest
    return resume_or_start(out, new)


def usable_samples(manifest: Manifest) -> int:
    """Samples of the tars less those that the loader would reject."""
    return manifest.counts["entries"] - sum(manifest.skipped.values())


def _run(number: int, tars: TarSource, out: Path, kind: Kind) -> CheckedTar:
    name = tars.names[number]
    return copy_tar(name, out, number, kind) if tars.copies else check_tar(name, kind)
