"""DocumentRef -> RawSample: finds a sample by number and reads its fields. One per process; keeps sidecars of the
shards in use."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from jp_train.config.choices import Crop
from jp_train.data.index import SourceLocator
from jp_train.data.sample_fields import read_fields
from jp_train.data.shards import Shard, ShardMembers, ShardReader
from jp_train.data.sidecar import ShardTokens, load_members, load_tokens, open_tokens
from jp_train.data.token_ids import StoredTokenIds
from jp_train.data.vq_ids import StoredIds, open_ids
from jp_train.errors import DataError
from jp_train.types import DocumentRef, RawSample, SourceInfo

CACHED_SAMPLES = 1_000_000
"""Samples whose sidecar entries one worker keeps in memory, at about 160 bytes each; past it the oldest shards' are
dropped."""


@dataclass(slots=True)
class ShardTable:
    """What is known of one shard of one source; `name` is its file name."""

    shard: Shard
    name: str
    members: ShardMembers
    tokens: ShardTokens
    ids: StoredIds | None
    token_ids: StoredTokenIds | None


class SampleReader:
    """Reads the samples of some sources, through one ShardReader."""

    def __init__(self, locators: Sequence[SourceLocator], crop: Crop, retries: int) -> None:
        self._locators = tuple(locators)
        self._crop = crop
        self._reader = ShardReader(retries)
        self._before = [locator.samples_before.tolist() for locator in self._locators]
        self._tables: OrderedDict[tuple[int, int], ShardTable] = OrderedDict()
        self._cached = 0

    def read(self, ref: DocumentRef, table: ShardTable, entry: int) -> RawSample:
        """The bytes of a document's sample; `entry` is one of those that `find` names.

        Raises:
            DataError: when the shard cannot be read.
            SkipSample: for a file that is too large to be read.
        """
        locator = self._locators[ref.source]
        return read_fields(
            table.shard,
            table.members,
            int(table.tokens.sample[entry]),
            locator.fields,
            self._crop,
            self._reader,
            locator.name,
            stored=table.ids,
            embedded_ids=locator.embedded_ids,
            token_ids=self._record(ref, table, entry),
        )

    def find(self, ref: DocumentRef) -> tuple[ShardTable, range]:
        """A document's shard, and the entries of its sample in the shard's tokens.

        Raises DataError when the shard's index is unreadable, or the source has no such sample.
        """
        before = self._before[ref.source]
        if not 0 <= ref.sample < before[-1]:
            self._locators[ref.source].locate(ref.sample)
        shard = bisect_right(before, ref.sample) - 1
        table = self._tables.get((ref.source, shard))
        if table is None:
            table = self._load(ref.source, shard)
        else:
            self._tables.move_to_end((ref.source, shard))
        number = ref.sample - before[shard]
        first_entry = table.tokens.first_entry
        if first_entry is None:
            return table, range(number, number + 1)
        return table, range(*first_entry[number : number + 2].tolist())

    def info(self, ref: DocumentRef, table: ShardTable, entry: int) -> SourceInfo:
        """Where a document comes from."""
        key = table.members.keys[int(table.tokens.sample[entry])]
        return SourceInfo(source=self._locators[ref.source].name, shard=table.shard.path, key=key)

    def describe(self, ref: DocumentRef) -> str:
        """Source, shard and key of a reference, for messages; never raises."""
        try:
            table, entries = self.find(ref)
            return str(self.info(ref, table, entries[0]))
        except Exception:  # it only decorates another error
            return f"source number {ref.source}, sample {ref.sample}"

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()

    def _record(self, ref: DocumentRef, table: ShardTable, entry: int) -> bytes | None:
        if table.token_ids is None:
            return None
        try:
            return table.token_ids.record(entry)
        except DataError:  # another run may have written the same sidecar anew: it says the same, in another file
            source, number = ref.source, bisect_right(self._before[ref.source], ref.sample) - 1
            old = self._tables.pop((source, number), None)
            self._cached -= 0 if old is None else len(old.members.keys)
            table = self._load(source, number)
            assert table.token_ids is not None
            return table.token_ids.record(entry)

    def _load(self, source: int, number: int) -> ShardTable:
        locator = self._locators[source]
        shard = locator.shards[number]
        members = load_members(shard)
        if locator.token_ids:
            tokens, token_ids = open_tokens(shard, locator.fingerprint, self._reader) or (None, None)
        else:
            tokens, token_ids = load_tokens(shard, locator.fingerprint), None
        if members is None or tokens is None or (len(tokens) and int(tokens.sample.max()) >= len(members.keys)):
            raise DataError(
                f"the index of shard {shard.path} (source {locator.name!r}) is gone, stale or damaged; start again so "
                f"that it is rebuilt (if that does not help, delete {shard.name}.jp-members.npz and "
                f"{shard.name}.jp-tokens-*.npz; several hosts need the index in a folder that they share, "
                "data.index_dir)"
            )
        ids = None
        if number in locator.shards_with_ids:
            ids = open_ids(shard, locator.ids_fingerprint, self._reader)
            if ids is None:
                raise DataError(
                    f"the VQ ids of shard {shard.path} (source {locator.name!r}) are gone or stale since the run "
                    "began; start again"
                )
        table = ShardTable(shard, shard.name, members, tokens, ids, token_ids)
        self._tables[source, number] = table
        self._cached += len(members.keys)
        while self._cached > CACHED_SAMPLES and len(self._tables) > 1:
            _, old = self._tables.popitem(last=False)
            self._cached -= len(old.members.keys)
        return table
