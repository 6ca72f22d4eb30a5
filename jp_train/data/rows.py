"""RowSpec -> Row: what a loader worker does. Stateless: the same RowSpec gives the same Row in any process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from jp_train.config.schema import PadDropoutForm, RunConfig
from jp_train.data.encode import Encoder, cut_text
from jp_train.data.index import SourceLocator, read_fields
from jp_train.data.samples import parse_sample
from jp_train.data.shards import Shard, ShardMembers, ShardReader
from jp_train.data.sidecar import ShardTokens, load_members, load_tokens
from jp_train.data.tokenizer import Tokenizer
from jp_train.errors import DataError, SkipSample
from jp_train.types import DocumentRef, EncodedDocument, Kind, Provenance, RawSample, Row, RowSpec, SkippedDocument

CACHED_SAMPLES = 1_000_000
"""Samples whose sidecar entries one worker keeps in memory, at about 150 bytes each; past it the oldest shards' are dropped."""


class RowBuilder:
    """Reads, decodes, encodes and cuts the documents of a row.

    `held_out` turns every random choice off, for validation. One per process; what is sent to a worker is small (no per-sample
    array).
    """

    def __init__(self, cfg: RunConfig, locators: Sequence[SourceLocator], tokenizer: Tokenizer, *, held_out: bool = False) -> None:
        self._cfg = cfg
        self._locators = tuple(locators)
        self._tokenizer = tokenizer
        self._held_out = held_out
        self._encoder = Encoder(cfg, tokenizer)
        self._reader = ShardReader(cfg.data.io_retries)
        self._tables: OrderedDict[tuple[int, int], tuple[ShardMembers, ShardTokens]] = OrderedDict()
        self._cached = 0

    def __reduce__(self) -> tuple:
        return (_rebuild, (self._cfg, self._locators, self._tokenizer, self._held_out))

    def build(self, spec: RowSpec) -> Row:
        """The row that `spec` names; an unusable document leaves its place empty and is listed in `skipped`.

        Raises:
            DataError: when a shard cannot be read, or the index does not describe it.
        """
        documents: list[EncodedDocument] = []
        provenance: list[Provenance] = []
        sources: list[int] = []
        skipped: list[SkippedDocument] = []
        truncated = 0
        for ref in spec.documents:
            raw, table, entry = self._read(ref)
            try:
                document = self._document(ref, raw, table, entry)
            except SkipSample as reason:
                skipped.append(SkippedDocument(info=raw.info, ref=ref, reason=str(reason)))
                continue
            truncated += ref.truncated
            documents.append(document)
            sources.append(ref.source)
            info = raw.info
            provenance.append(
                Provenance(
                    source=info.source,
                    shard=self._shard(ref).name,
                    key=info.key,
                    kind=document.kind,
                    start=ref.start,
                    length=ref.length,
                )
            )
        return Row(
            step=spec.step,
            row=spec.row,
            documents=tuple(documents),
            provenance=tuple(provenance),
            source_indices=tuple(sources),
            skipped=tuple(skipped),
            truncated_tokens=truncated,
        )

    def describe(self, ref: DocumentRef) -> str:
        """Source, shard and key of a reference, for messages; never raises."""
        try:
            locator = self._locators[ref.source]
            shard, number = locator.locate(ref.sample)
            members, tokens = self._table(ref.source, shard)
            return f"source {locator.name!r}, shard {locator.shards[shard].path}, key {members.keys[int(tokens.sample[number])]!r}"
        except Exception:  # it only decorates another error
            return f"source number {ref.source}, sample {ref.sample}"

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()

    def _shard(self, ref: DocumentRef) -> Shard:
        locator = self._locators[ref.source]
        return locator.shards[locator.locate(ref.sample)[0]]

    def _read(self, ref: DocumentRef) -> tuple[RawSample, ShardTokens, int]:
        locator = self._locators[ref.source]
        shard, entry = locator.locate(ref.sample)
        members, tokens = self._table(ref.source, shard)
        raw = read_fields(
            locator.shards[shard],
            members,
            int(tokens.sample[entry]),
            locator.kind,
            self._cfg.data.crop,
            self._reader,
            locator.name,
        )
        return raw, tokens, entry

    def _document(self, ref: DocumentRef, raw: RawSample, table: ShardTokens, entry: int) -> EncodedDocument:
        encoder, locator = self._encoder, self._locators[ref.source]
        sample = parse_sample(raw, locator.kind, locator.config, image_slots=encoder.image_slots, codebook_size=encoder.codebook_size)
        dropped = (
            locator.kind is Kind.GENERATION
            and not self._held_out
            and self._cfg.data.pad_dropout_form is not PadDropoutForm.every_token
            and encoder.drops_condition(locator.name, ref.epoch, ref.sample)
        )
        if dropped:
            counts = table.short_dropped_tokens if ref.short_caption else table.dropped_tokens
        else:
            counts = table.short_tokens if ref.short_caption else table.tokens
        expected = int(counts[entry])
        whole = ref.start == 0 and ref.length + ref.truncated == expected
        document = encoder.encode(
            sample,
            source=locator.name,
            epoch=ref.epoch,
            sample_index=ref.sample,
            short_caption=ref.short_caption,
            held_out=self._held_out,
            expected_tokens=expected,
            max_tokens=ref.length if whole and ref.truncated else None,
        )
        if whole:
            return document
        if locator.kind is not Kind.TEXT or ref.truncated or ref.start + ref.length > expected:
            raise DataError(
                f"the plan uses tokens {ref.start} to {ref.start + ref.length} ({ref.truncated} truncated) of {raw.info}, which "
                f"has {expected}: plan and index do not belong together; start again"
            )
        return cut_text(document, ref.start, ref.length)

    def _table(self, source: int, shard: int) -> tuple[ShardMembers, ShardTokens]:
        found = self._tables.get((source, shard))
        if found is not None:
            self._tables.move_to_end((source, shard))
            return found
        locator = self._locators[source]
        members = load_members(locator.shards[shard])
        tokens = load_tokens(locator.shards[shard], locator.fingerprint)
        if members is None or tokens is None:
            raise DataError(
                f"the index of shard {locator.shards[shard].path} (source {locator.name!r}) is gone or stale; "
                "start again so that it is rebuilt"
            )
        self._tables[source, shard] = members, tokens
        self._cached += len(members.keys)
        while self._cached > CACHED_SAMPLES and len(self._tables) > 1:
            _, (old, _) = self._tables.popitem(last=False)
            self._cached -= len(old.keys)
        return members, tokens


def _rebuild(cfg: RunConfig, locators: Sequence[SourceLocator], tokenizer: Tokenizer, held_out: bool) -> RowBuilder:
    return RowBuilder(cfg, locators, tokenizer, held_out=held_out)
