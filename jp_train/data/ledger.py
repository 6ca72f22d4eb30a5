"""The ledger of bad samples: every skipped document is named in `ledger.jsonl`, and their number is limited by a
budget; that of the samples which an index leaves out by `data.max_bad_share`.

Past the budget, or after too many consecutive bad samples of one source, the run stops with the cause instead of
training on the remaining samples.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jp_train.config.schema import RunConfig
from jp_train.data.index import SourceIndex
from jp_train.data.tar_samples import STRAY
from jp_train.errors import DataError
from jp_train.files import append_lines, read_json_lines
from jp_train.types import SkippedDocument

LEDGER_FILE = "ledger.jsonl"

_DETAILS = re.compile(r"'[^']*'|\d+")
"""What tells apart the reasons of samples that are bad in the same way."""


def bad_share(index: SourceIndex, limit: float, place: str = "data.sources") -> str:
    """How many samples of a source its index leaves out as bad, with the most common reason; empty for none. `place`:
    where the configuration names the source. Stray files are no samples.

    Raises DataError for a share above `limit` (data.max_bad_share).
    """
    bad = [sample for sample in index.bad if sample.reason != STRAY]
    if not bad:
        return ""
    share = len(bad) / (len(bad) + len(index))
    counts = Counter(_DETAILS.sub("", sample.reason) for sample in bad)
    reason, count = counts.most_common(1)[0]
    example = next(sample for sample in bad if _DETAILS.sub("", sample.reason) == reason)
    text = (
        f"{place}.{index.name}: {len(bad):,} of {len(bad) + len(index):,} samples ({100 * share:.3g} %) are bad and "
        f"left out; {count:,} of them like key {example.info.key!r} of {example.info.shard}: {example.reason}"
    )
    if share > limit:
        raise DataError(
            f"{text}. data.max_bad_share is {limit:g}: import or write the shards again (`jp-train data verify` names "
            f"each bad sample), take the source out, or set data.max_bad_share={math.ceil(1000 * share) / 1000:g} to "
            "train on the rest, drawn more often"
        )
    return text


class Ledger:
    """Counts used and skipped documents per source, and writes one JSON line per skipped one.

    Give every rank the same gathered lists, so that all stop together; only the one with `write` touches the file.
    """

    def __init__(self, run_dir: str | Path, cfg: RunConfig, *, write: bool = True) -> None:
        self._path = Path(run_dir) / LEDGER_FILE
        self._data = cfg.data
        self._write = write
        self._used: dict[str, int] = {}
        self._skipped: dict[str, int] = {}
        self._consecutive: dict[str, int] = {}

    def record(self, skipped: Sequence[SkippedDocument], used_per_source: Mapping[str, int], step: int) -> None:
        """Record one step: append its skipped documents, add the used ones, then check the limits.

        The consecutive limit counts in whole steps: a step in which a source gave any good document starts its count
        anew.

        Raises:
            DataError: when a source is past `data.skip_budget` (and `data.skip_minimum`) or `data.skip_consecutive`.
        """
        self._append(
            {
                "step": step,
                "source": bad.info.source,
                "shard": bad.info.shard,
                "key": bad.info.key,
                "reason": bad.reason,
                "document": asdict(bad.ref),
            }
            for bad in skipped
        )
        for name, count in used_per_source.items():
            self._used[name] = self._used.get(name, 0) + count
        last: dict[str, SkippedDocument] = {}
        in_step: dict[str, int] = {}
        for bad in skipped:
            name = bad.info.source
            last[name] = bad
            in_step[name] = in_step.get(name, 0) + 1
        for name, count in used_per_source.items():
            if count:
                self._consecutive[name] = 0
        for name, count in in_step.items():
            self._skipped[name] = self._skipped.get(name, 0) + count
            if not used_per_source.get(name):
                self._consecutive[name] = self._consecutive.get(name, 0) + count
        for name, bad in last.items():
            self._check(name, bad, step)

    def record_index(self, indexes: Sequence[SourceIndex]) -> None:
        """Write the samples that the indexes leave out, each once even if the run starts several times.

        They are not part of the plan, so they do not count against the budget.
        """
        bad = [sample for index in indexes for sample in index.bad]
        if bad and self._write:
            known = self._named_at_index()
            self._append(
                {
                    "step": None,
                    "source": sample.info.source,
                    "shard": sample.info.shard,
                    "key": sample.info.key,
                    "reason": sample.reason,
                }
                for sample in bad
                if (sample.info.source, sample.info.shard, sample.info.key) not in known
            )

    def record_held_out(self, indexes: Sequence[SourceIndex], skipped: Sequence[SkippedDocument]) -> int:
        """Write what held-out sources lack, each once even if the run starts several times: what their indexes leave
        out, and documents that could not be used, as source `validation/NAME`. Returns how many documents `skipped`
        holds.

        They take nothing from training, so they count against no budget.
        """
        bad_samples = [(sample.info, sample.reason) for index in indexes for sample in index.bad]
        bad_samples += [(bad.info, bad.reason) for bad in skipped]
        if bad_samples and self._write:
            known = self._named_at_index()
            entries = [
                {"step": None, "source": f"validation/{i.source}", "shard": i.shard, "key": i.key, "reason": r}
                for i, r in bad_samples
            ]
            self._append(entry for entry in entries if (entry["source"], entry["shard"], entry["key"]) not in known)
        return len(skipped)

    @property
    def skipped(self) -> int:
        """Documents skipped so far, over all sources."""
        return sum(self._skipped.values())

    def state(self) -> dict[str, Any]:
        """The counts, JSON-able, for a checkpoint."""
        return {"used": dict(self._used), "skipped": dict(self._skipped), "consecutive": dict(self._consecutive)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the counts of `state`."""
        self._used, self._skipped = dict(state["used"]), dict(state["skipped"])
        self._consecutive = dict(state["consecutive"])

    def _check(self, name: str, bad: SkippedDocument, step: int) -> None:
        skipped, used = self._skipped[name], self._used.get(name, 0)
        allowed = max(self._data.skip_minimum, self._data.skip_budget * (used + skipped))
        example = (
            f"the last one: shard {bad.info.shard}, key {bad.info.key!r}: {bad.reason}. All are named in {self._path}"
        )
        if skipped > allowed:
            raise DataError(
                f"source {name!r}: {skipped} bad samples of {used + skipped} by step {step} exceed the budget of "
                f"{allowed:g} (data.skip_budget {self._data.skip_budget:g}, data.skip_minimum "
                f"{self._data.skip_minimum}); {example}; repair or take out the shards, or raise the budget"
            )
        if self._consecutive.get(name, 0) >= self._data.skip_consecutive:
            raise DataError(
                f"source {name!r}: {self._consecutive[name]} bad samples on end by step {step} (data.skip_consecutive "
                f"{self._data.skip_consecutive}): its shards or a decoder are broken; {example}"
            )

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        if not self._write:
            return
        if lines := [json.dumps(entry, ensure_ascii=False) for entry in entries]:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self._path, lines)

    def _named_at_index(self) -> set[tuple[str | None, str | None, str | None]]:
        if not self._path.exists():
            return set()
        with self._path.open(encoding="utf-8", errors="replace") as lines:
            entries = [entry for entry in read_json_lines(lines) if entry and entry.get("step") is None]
        return {(entry.get("source"), entry.get("shard"), entry.get("key")) for entry in entries}
