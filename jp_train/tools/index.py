"""`jp-train data index`: build every missing or stale sidecar in parallel, and say what the sources hold."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from jp_train.config.schema import RunConfig
from jp_train.data.index import IndexProgress, SourceIndex, index_sources
from jp_train.data.tokenizer import load_tokenizer
from jp_train.errors import ConfigError
from jp_train.terminal import ProgressLine, aligned, printable

_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSummary:
    """One line of the table: counts of a source, its size in MiB, the size of its stored token ids, where its texts
    lie, what its filter leaves out, what was changed to read its samples, how many images those to understand have, and
    some of its bad samples."""

    name: str
    kind: str
    samples: int
    tokens: int
    bad: int
    shards: int
    mib: float
    id_bytes_per_sample: float
    bad_examples: tuple[str, ...]
    taken: dict[str, int]
    filtered: dict[str, int]
    notes: dict[str, int]
    images: int
    passed_over: str


def index_command(
    cfg: RunConfig, processes: int, *, table: TextIO | None = None, progress: TextIO | None = None
) -> dict[str, Any]:
    """Index the training and held-out sources of a run with `processes` processes.

    Progress with an ETA goes to `progress` (default: stderr), the table to `table` (default: stdout). Returns
    `{"sources": [SourceSummary fields...], "seconds": float}`, which is JSON-able.

    Raises:
        ConfigError: when the config names no source.
        DataError: for missing, corrupt or empty shards.
    """
    tokenizer = load_tokenizer(cfg.tokenizer)
    sources = dict(cfg.data.sources) | {f"validation/{name}": source for name, source in cfg.validation.sources.items()}
    if not sources:
        raise ConfigError("the config has no data.sources: name a recipe, or list sources under data.sources")
    started = time.monotonic()
    indexes = index_sources(
        cfg, tokenizer, processes=processes, progress=IndexProgressLine(progress or sys.stderr), sources=sources
    )
    summaries = [_summary(index) for index in indexes]
    print(format_table(summaries), file=table or sys.stdout)
    return {"sources": [asdict(summary) for summary in summaries], "seconds": time.monotonic() - started}


def format_table(summaries: list[SourceSummary]) -> str:
    """The sources as an aligned text table; bad samples are named below it."""
    head = ("source", "kind", "samples", "tokens", "tokens/sample", "bad", "shards", "MiB", "id bytes/sample")
    lines = [head] + [
        (
            summary.name,
            summary.kind,
            f"{summary.samples:,}",
            f"{summary.tokens:,}",
            f"{summary.tokens / max(summary.samples, 1):,.1f}",
            f"{summary.bad:,}",
            f"{summary.shards:,}",
            f"{summary.mib:,.1f}",
            f"{summary.id_bytes_per_sample:,.0f}",
        )
        for summary in summaries
    ]
    text = aligned(lines)
    for summary in summaries:
        if summary.taken:
            places = ", ".join(f"{place} ({count:,})" for place, count in summary.taken.items())
            text.append(f"texts of {summary.name}: {places}")
        if summary.images > summary.samples:
            text.append(
                f"images of {summary.name}: {summary.images:,}, {summary.images / summary.samples:.2f} a sample"
            )
        text += [f"read in {summary.name}: {count:,} samples: {note}" for note, count in summary.notes.items()]
        text += left_out(summary.name, summary.filtered)
        text += [f"{summary.name}: {summary.passed_over}"] if summary.passed_over else []
        text += [f"bad in {summary.name}: {example}" for example in summary.bad_examples]
        if summary.bad > len(summary.bad_examples):
            text.append(
                f"bad in {summary.name}: … and {summary.bad - len(summary.bad_examples)} more "
                "(the ledger of a run names all)"
            )
    return "\n".join(map(printable, text))


def left_out(name: str, filtered: Mapping[str, int]) -> list[str]:
    """What the filter of a source leaves out, a line a reason."""
    return [f"left out of {name}: {count:,} {reason}" for reason, count in filtered.items()]


def _summary(index: SourceIndex) -> SourceSummary:
    return SourceSummary(
        name=index.name,
        kind=index.kind.value,
        samples=len(index),
        tokens=round(index.mean_tokens * len(index)),
        bad=len(index.bad),
        shards=len(index.shards),
        mib=sum(shard.size for shard in index.shards) / 2**20,
        id_bytes_per_sample=index.ids_bytes / max(len(index), 1),
        passed_over=index.passed_over,
        bad_examples=tuple(
            f"{sample.info.key} in {sample.info.shard}: {sample.reason}" for sample in index.bad[:_EXAMPLES]
        ),
        taken=dict(index.taken),
        filtered=dict(index.filtered),
        notes=dict(index.notes),
        images=index.image_count,
    )


class IndexProgressLine:
    """For `index_sources`: announces the work, then shows how much of its bytes is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line = stream, ProgressLine("index", stream)
        self.announces = True

    def __call__(self, at: IndexProgress) -> None:
        if at.shards_done:
            self._line.show(at.bytes_done, at.bytes, *at.details())
            return
        self._line = ProgressLine("index", self._stream)
        if self.announces:
            print(f"index: {at.announcement()}", file=self._stream, flush=True)
