"""`jp-train data import`: run an import, or describe it with --dry-run, and summarise the result."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jp_train.data.shards import passed_over, passed_over_text
from jp_train.errors import ConfigError
from jp_train.tools.importers.entries import Reader
from jp_train.tools.importers.manifest import SKIPPED
from jp_train.tools.importers.run import ImportSettings, import_source
from jp_train.tools.importers.summary import format_summary, loss_text, recipe_lines, skipped_examples, summarise
from jp_train.tools.importers.survey import survey, survey_tars
from jp_train.tools.importers.tars import find_tars, taken_fields
from jp_train.tools.importers.tars_run import import_tars, usable_samples
from jp_train.tools.upload import Upload
from jp_train.types import Kind


def import_command(
    reader: Reader,
    settings: ImportSettings,
    *,
    dry_run: bool = False,
    upload: str | None = None,
    stream: TextIO | None = None,
) -> tuple[dict[str, Any], str]:
    """Import (or with `dry_run` only look, see survey.py); returns the JSON object and the text for people. Progress
    goes to `stream` (default: stderr). `upload`: URL of a folder in an object store that gets a copy.

    Raises:
        ConfigError, DataError: see `import_source`.
    """
    stream = stream or sys.stderr
    started = time.monotonic()
    if dry_run:
        return survey(reader, settings, stream)

    there = None if upload is None else Upload(upload)
    with _interruptible(stream):
        manifest = import_source(reader, settings, stream)
        copies = (
            {} if there is None else {s.folder: there.copy(Path(s.folder), stream) for s in manifest.outputs.values()}
        )
    summary = summarise(manifest, reader.kind.value, reader.source_keys(), settings.out, time.monotonic() - started)
    for source in summary["sources"]:
        if copy := copies.get(source["folder"]):
            source |= {"folder": copy, "spec": f"{copy}/{source['spec'].rpartition('/')[2]}"}
    summary["recipe"] = "\n".join(recipe_lines(summary["sources"]))
    return _with_text(summary, settings.out)


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
        return survey_tars(tars, kind, where)
    print(f"import: {len(tars.names):,} tars, {where}", file=stream, flush=True)
    if not tars.copies and (others := passed_over_text(passed_over(source))):
        print(f"import: {others}", file=stream, flush=True)
    with _interruptible(stream):
        manifest = import_tars(source, tars, out, kind, processes, stream)
    keys = {"fields": taken_fields(kind, manifest.taken)}
    summary = summarise(manifest, kind.value, keys, out, time.monotonic() - started)
    summary["samples"] = usable_samples(manifest)
    summary["taken"] = {f"{role} from {place}": count for (role, place), count in manifest.taken.items()}
    if not tars.copies:
        summary["sources"][0] |= {"name": out.name, "folder": os.path.dirname(tars.names[0]), "spec": tars.spec}
        summary["recipe"] = "\n".join(recipe_lines(summary["sources"]))
    return _with_text(summary, out)


def _with_text(summary: dict[str, Any], out: Path) -> tuple[dict[str, Any], str]:
    """The summary, with a warning where much was skipped, and its text."""
    examples = skipped_examples(out / SKIPPED)
    summary["warning"] = loss_text(summary, examples)
    return summary, format_summary(summary, examples)


@contextlib.contextmanager
def _interruptible(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(
            "import: stopped; finished shards are kept, and the same command goes on from them", file=stream, flush=True
        )
        raise
