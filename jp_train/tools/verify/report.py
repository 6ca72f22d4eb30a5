"""What `jp-train data verify` found: as a table, as JSON, and as a histogram of the lengths."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jp_train.config.schema import RunConfig
from jp_train.files import write_atomically
from jp_train.terminal import aligned, printable
from jp_train.tools.verify.faults import REMEDIES, WHOLE_SHARD
from jp_train.tools.verify.plot import plot_lengths
from jp_train.tools.verify.shard import EDGES, Fault, ShardReport

EXAMPLES = 3
"""Faults of one class and source that the text names; the JSON names all."""

Sample = tuple[str, str, str]
"""Source, shard, key."""


@dataclass(kw_only=True, slots=True)
class Report:
    """`sources`: name -> kind; `unreachable`: faults of shards that could not be reached; `of_sources`: findings
    about a source as a whole; `excluded`: samples that the
    index leaves out because of an exclusion, `newly_excluded` those of this pass, written to `exclusion_files`;
    `decode`: images decoded per source (None: all); `exclude`: whether it was to leave samples out."""

    sources: dict[str, str]
    shards: list[ShardReport]
    unreachable: list[Fault]
    decode: int | None
    seconds: float
    of_sources: list[Fault] = field(default_factory=list)
    excluded: set[Sample] = field(default_factory=set)
    newly_excluded: set[Sample] = field(default_factory=set)
    exclusion_files: list[Path] = field(default_factory=list)
    exclude: bool = False

    @property
    def findings(self) -> Iterator[Fault]:
        """Every fault and warning, source by source, those of all of it first, in tar order."""
        for name in self.sources:
            yield from (fault for fault in [*self.of_sources, *self.unreachable] if fault.source == name)
            for shard in self.shards:
                if shard.source == name:
                    yield from shard.faults

    def unusable_sources(self) -> list[str]:
        """Sources that have no usable sample, although none of their shards has a fault that counts."""
        usable = {shard.source for shard in self.shards if shard.good}
        faulty = {fault.source for fault in self.findings if not self._is_harmless(fault)}
        return [name for name in self.sources if name not in usable | faulty]

    def is_excluded(self, fault: Fault) -> bool:
        """Whether the index leaves the sample out because of an exclusion."""
        return fault.image and (fault.source, fault.shard, fault.key) in self.excluded

    @property
    def clean(self) -> bool:
        """No fault, except those of samples that were excluded before this pass."""
        return all(map(self._is_harmless, self.findings))

    def _is_harmless(self, fault: Fault) -> bool:
        return fault.warning or (self.is_excluded(fault) and not self._is_new(fault))

    def _is_new(self, fault: Fault) -> bool:
        return (fault.source, fault.shard, fault.key) in self.newly_excluded


def write_report(report: Report, cfg: RunConfig, folder: Path) -> dict[str, Any]:
    """Write verify.json and lengths.png to `folder`, which exists; returns what the JSON holds."""
    histogram = folder / "lengths.png"
    by_source = lengths_by_source(report)
    document = _document(report, cfg) | {"files": {"report": str(folder / "verify.json"), "histogram": str(histogram)}}
    plot_lengths(by_source, report.sources, EDGES, cfg.data.seq_len, histogram)
    write_atomically(folder / "verify.json", json.dumps(document, indent=1), writer=str(os.getpid()))
    return document


def lengths_by_source(report: Report) -> dict[str, np.ndarray]:
    """Histogram of tokens per document over EDGES, by source."""
    histograms = {name: np.zeros(len(EDGES), np.int64) for name in report.sources}
    for shard in report.shards:
        histograms[shard.source] += shard.lengths
    return histograms


def format_report(report: Report, document: dict[str, Any]) -> str:
    """The table of sources, the faults by class with examples and remedies, and what follows for training."""
    head = (
        "source",
        "kind",
        "shards",
        "samples",
        "usable",
        "filtered",
        "faults",
        "warnings",
        "excluded",
        "tokens/doc",
        "longest",
        "> seq_len",
    )
    lines = aligned(
        [head]
        + [
            (
                source["name"],
                source["kind"],
                f"{source['shards']:,}" + (f" ({source['broken_shards']} broken)" if source["broken_shards"] else ""),
                f"{source['samples']:,}",
                f"{source['usable']:,}",
                f"{source['filtered']:,}",
                f"{sum(source['faults'].values()):,}",
                f"{sum(source['warnings'].values()):,}",
                f"{source['excluded']:,}",
                f"{source['tokens'] / max(source['usable'], 1):,.1f}",
                f"{source['longest']:,}",
                f"{source['over_seq_len']:,}",
            )
            for source in document["sources"]
        ]
    )
    groups: dict[tuple[str, str], list[Fault]] = {}
    for finding in report.findings:
        groups.setdefault((finding.source, finding.fault), []).append(finding)
    if groups:
        counts = [(source, fault, f"{len(all_of):,}") for (source, fault), all_of in groups.items()]
        lines += ["", *aligned([("source", "fault", "count"), *counts])]
    for (source, fault), all_of in groups.items():
        lines += ["", f"{'warning' if all_of[0].warning else 'fault'} {fault} in {source}:"]
        lines += [f"  {_where(finding)}: {finding.reason}" for finding in all_of[:EXAMPLES]]
        if len(all_of) > EXAMPLES:
            lines.append(f"  … and {len(all_of) - EXAMPLES:,} more, all in {document['files']['report']}")
        lines.append(f"  remedy: {REMEDIES[fault]}")
    return "\n".join(printable(line) for line in [*lines, "", *_conclusion(report, document)])


def _conclusion(report: Report, document: dict[str, Any]) -> list[str]:
    lines = []
    if report.decode is not None:
        decoded = sum(shard.decoded for shard in report.shards)
        lines.append(
            f"only {decoded:,} images were decoded: of the others only the header was read, so damage may have been "
            "missed"
        )
    if report.exclusion_files:
        lines += [
            f"excluded {len(report.newly_excluded):,} samples that only decoding shows to be bad "
            f"({len(report.exclusion_files)} files, e.g. {report.exclusion_files[0]}); the next index leaves them out "
            "and ledger.jsonl names them",
            "this changes the plan: a run that was started before goes on as it is, but will be refused when it "
            "resumes; delete the .jp-excluded.json files to resume it",
        ]
    broken = {shard.shard.path for shard in report.shards if not shard.whole}
    broken |= {fault.shard for fault in report.unreachable}
    if broken:
        lines.append(f"{len(broken)} shards cannot be used: training refuses to start with them")
    if broken and report.exclude:
        lines.append(
            f"--exclude leaves out samples, never a whole shard, and did nothing about {_listed(sorted(broken))}: "
            f"{WHOLE_SHARD}"
        )
    state = "clean" if report.clean else "faults found"
    lines.append(
        f"{state}: {document['samples']:,} samples in {len(report.shards):,} shards, {document['bytes'] / 2**20:,.1f} "
        f"MiB in {report.seconds:.1f} s; {document['files']['report']}, {document['files']['histogram']}"
    )
    return lines


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - EXAMPLES:,} more" if len(paths) > EXAMPLES else ""
    return f"{', '.join(paths[:EXAMPLES])}{more}"


def _document(report: Report, cfg: RunConfig) -> dict[str, Any]:
    findings = list(report.findings)
    lengths = lengths_by_source(report)
    used = np.flatnonzero(sum(lengths.values()))
    bins = int(used[-1]) + 1 if len(used) else 1
    return {
        "clean": report.clean,
        "seconds": report.seconds,
        "seq_len": cfg.data.seq_len,
        "samples": sum(shard.samples for shard in report.shards),
        "bytes": sum(shard.shard.size for shard in report.shards),
        "pictures_decoded": sum(shard.decoded for shard in report.shards),
        "all_pictures_decoded": report.decode is None,
        "sources": [_source(report, name, kind, findings) for name, kind in report.sources.items()],
        "shards": [
            {
                "source": shard.source,
                "shard": shard.shard.path,
                "size": shard.shard.size,
                "stamp": shard.shard.stamp,
                "samples": shard.samples,
                "usable": shard.good,
                "whole": shard.whole,
                "last_readable_key": shard.last_key,
            }
            for shard in report.shards
        ],
        "findings": [
            {
                "fault": fault.fault,
                "source": fault.source,
                "shard": fault.shard,
                "key": fault.key,
                "offset": fault.offset,
                "reason": fault.reason,
                "remedy": REMEDIES[fault.fault],
                "warning": fault.warning,
                "excluded": report.is_excluded(fault),
            }
            for fault in findings
        ],
        "exclusions": [str(path) for path in report.exclusion_files],
        "lengths": {
            "edges": EDGES[:bins].tolist(),
            "documents": {name: counts[:bins].tolist() for name, counts in lengths.items()},
        },
    }


def _source(report: Report, name: str, kind: str, findings: list[Fault]) -> dict[str, Any]:
    shards = [shard for shard in report.shards if shard.source == name]
    mine = [fault for fault in findings if fault.source == name]
    unreachable = sum(fault.source == name for fault in report.unreachable)
    return {
        "name": name,
        "kind": kind,
        "shards": len(shards) + unreachable,
        "broken_shards": sum(not shard.whole for shard in shards) + unreachable,
        "samples": sum(shard.samples for shard in shards),
        "usable": sum(shard.good for shard in shards),
        "filtered": sum(shard.filtered for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "longest": max((shard.longest for shard in shards), default=0),
        "over_seq_len": sum(shard.over_seq_len for shard in shards),
        "excluded": sum(report.is_excluded(fault) for fault in mine),
        "faults": dict(Counter(fault.fault for fault in mine if not fault.warning)),
        "warnings": dict(Counter(fault.fault for fault in mine if fault.warning)),
    }


def _where(fault: Fault) -> str:
    shard = fault.shard.rsplit("/", 1)[-1]
    at = "" if fault.offset is None else f" at byte {fault.offset:,}"
    return f"{shard}{at}" if fault.key is None else f"{fault.key} in {shard}{at}"
