"""The index of the sources: where every field of every sample lies, and how many tokens the sample has.

It is kept in sidecars beside the shards (sidecar.py) and built, in parallel processes, where they are missing or stale.
Images are not decoded here: an undecodable one is detected when it is used, or in advance by `data verify`, whose
exclusions are left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from jp_train.config.choices import Crop, TokenIds
from jp_train.config.schema import RunConfig, SourceConfig
from jp_train.data.encode import Encoder, too_many_images
from jp_train.data.exclusions import excluded_samples, with_exclusions
from jp_train.data.field_map import FieldMap, Fields, field_map
from jp_train.data.processes import ordered_results
from jp_train.data.sample_fields import read_fields
from jp_train.data.samples import parse_variants
from jp_train.data.shards import (
    Shard,
    ShardMembers,
    ShardReader,
    expand_shards,
    passed_over,
    passed_over_text,
    scan_members,
)
from jp_train.data.sidecar import (
    FORMAT,
    ShardTokens,
    has_members,
    load_members,
    load_tokens,
    store_members,
    store_tokens,
)
from jp_train.data.token_ids import RecordSpool
from jp_train.data.tokenizer import Tokenizer
from jp_train.errors import DataError, SkipSample, named
from jp_train.types import Kind, SourceInfo, TextSample

SMALL_BYTES = 64 << 20
"""Less stale data than this is indexed without starting processes."""

_NAMED_BAD = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class BadSample:
    """A sample (or file) that the index leaves out, and why."""

    info: SourceInfo
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexProgress:
    """What a progress callback gets, before the first shard and after each: counts of shards, samples and bytes
    done, of all that were stale. `without_ids` of these shards lack nothing but token ids."""

    shards_done: int
    shards: int
    samples: int
    bytes_done: int
    bytes: int
    without_ids: int = 0

    def details(self) -> tuple[str, ...]:
        """What a progress line shows besides share and time."""
        return f"shard {self.shards_done}/{self.shards}", f"{self.samples:,} samples"

    def announcement(self) -> str:
        """What is to be indexed, and how to avoid it."""
        text = f"{self.shards:,} shards ({self.bytes / 2**20:,.1f} MiB) are to be indexed"
        if self.without_ids:
            text += (
                f"; {self.without_ids:,} of them lack only token ids: data.token_ids=off uses them as they are, with "
                "the same rows"
            )
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLocator:
    """What a loader worker needs to find the samples of a source: no per-sample array, so it is cheap to send to a
    process."""

    name: str
    kind: Kind
    config: SourceConfig
    fields: FieldMap
    fingerprint: str
    shards: tuple[Shard, ...]
    samples_before: np.ndarray
    """int64 [shards + 1]: usable samples before each shard."""
    ids_fingerprint: str = ""
    """Of the VQ ids stored beside the shards (vq_ids.py); empty when images are read."""
    shards_with_ids: frozenset[int] = frozenset()
    """Numbers of the shards whose stored ids are used; images of the others are read."""
    embedded_ids: bool = True
    """Whether `.vq.npy` members of the shards are used."""
    token_ids: bool = False
    """Whether the token ids in the shards' sidecars are used instead of the texts."""

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard number, and number among the shard's usable samples. Raises DataError when the source has no such
        sample."""
        if not 0 <= sample < self.samples_before[-1]:
            raise DataError(
                f"source {self.name!r} has {int(self.samples_before[-1])} samples, the plan asks for number {sample}: "
                "another index"
            )
        shard = int(np.searchsorted(self.samples_before, sample, side="right")) - 1
        return shard, sample - int(self.samples_before[shard])


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIndex:
    """The index of one source, over its shards in order: token counts int32 [G] of its usable samples, and the bad
    ones, among them those whose images no row can hold (they keep their numbers, and the plan passes them over);
    `ids_bytes` is the size of the stored token ids, 0 where they are not used.

    `first_entry` int64 [N + 1] says which counts are a sample's, where samples have several captions; None where each
    of the N samples has one. `taken`, `filtered` and `notes` as in ShardTokens, of all shards.
    """

    locator: SourceLocator
    tokens: np.ndarray
    short_tokens: np.ndarray
    dropped_tokens: np.ndarray
    conversations: int
    bad: tuple[BadSample, ...]
    passed_over: str = ""
    """Which tars of the source's folders are no shards (`passed_over_text`)."""
    ids_bytes: int = 0
    first_entry: np.ndarray | None = None
    taken: Mapping[str, int] = field(default_factory=dict)
    filtered: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    images: np.ndarray | None = None
    min_tokens: np.ndarray | None = None
    """int32 [G], as in ShardTokens."""

    @property
    def name(self) -> str:
        return self.locator.name

    @property
    def kind(self) -> Kind:
        return self.locator.kind

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.locator.shards

    @property
    def mean_tokens(self) -> float:
        """The mean length of a sample, over its captions where it has several."""
        if self.first_entry is None:
            return float(self.tokens.mean())
        sums = np.add.reduceat(self.tokens, self.first_entry[:-1], dtype=np.int64)
        return float((sums / np.diff(self.first_entry)).mean())

    @property
    def image_count(self) -> int:
        """Images to understand of all samples."""
        if self.images is None:
            return len(self) if self.kind is Kind.UNDERSTANDING else 0
        first = slice(None) if self.first_entry is None else self.first_entry[:-1]
        return int(self.images[first].sum())

    def entry(self, sample: int) -> int:
        """The number of a sample's first count."""
        return sample if self.first_entry is None else int(self.first_entry[sample])

    def __len__(self) -> int:
        return len(self.tokens) if self.first_entry is None else len(self.first_entry) - 1


def index_sources(
    cfg: RunConfig,
    tokenizer: Tokenizer,
    *,
    processes: int = 1,
    progress: Callable[[IndexProgress], None] | None = None,
    sources: Mapping[str, SourceConfig] | None = None,
) -> list[SourceIndex]:
    """The index of every source (default: `cfg.data.sources`), in order; missing or stale sidecars are built first, by
    `processes`. With `data.token_ids: auto`, one without token ids is stale.

    Raises:
        DataError: for missing, corrupt or empty shards, or a source without a usable sample.
        ConfigError: for shards that cannot be named so.
    """
    sources = cfg.data.sources if sources is None else sources
    encoder = Encoder(cfg, tokenizer)
    reader = ShardReader(cfg.data.io_retries, index_dir=cfg.data.index_dir)
    shards = {}
    for name, source in sources.items():
        with named(f"source {name}"):
            paths = expand_shards(source.shards, cfg.data.root)
            shards[name] = [with_exclusions(reader.stat(path)) for path in paths]
    maps = {name: field_map(source) for name, source in sources.items()}
    prints = {name: source_fingerprint(encoder, fields) for name, fields in maps.items()}
    loaded: dict[tuple[str, str], ShardTokens] = {}
    stale: list[_Task] = []
    with_ids = cfg.data.token_ids is not TokenIds.off
    without_ids = 0
    for name in sources:
        for shard in shards[name]:
            tokens = load_tokens(shard, prints[name], with_ids=with_ids)
            if tokens is not None and has_members(shard):
                loaded[name, shard.path] = tokens
            else:
                stale.append(_Task(name=name, fields=maps[name], shard=shard, fingerprint=prints[name]))
                without_ids += with_ids and load_tokens(shard, prints[name]) is not None and has_members(shard)
    _build(stale, cfg, encoder, reader, processes, progress, without_ids)
    reader.close()
    return [
        _assemble(name, source, cfg, encoder, maps[name], shards[name], prints[name], loaded)
        for name, source in sources.items()
    ]


def index_shard(
    shard: Shard,
    *,
    name: str,
    fields: FieldMap,
    fingerprint: str,
    encoder: Encoder,
    reader: ShardReader,
    crop: Crop,
    with_ids: bool = True,
) -> ShardTokens:
    """Build and write both sidecars of one shard; returns the tokens one. Raises DataError for a corrupt tar or
    failed reads."""
    members = shard_members(shard, reader)
    with RecordSpool() if with_ids else nullcontext() as records:
        tokens = _tokens_of(
            shard, members, name, fields, encoder, reader, crop, None if records is None else records.add
        )
        tokens = tokens if records is None else replace(tokens, ids_bytes=records.size)
        store_tokens(shard, fingerprint, tokens, records)
    return tokens


def _tokens_of(
    shard: Shard,
    members: ShardMembers,
    name: str,
    fields: FieldMap,
    encoder: Encoder,
    reader: ShardReader,
    crop: Crop,
    store: Callable[[bytes], None] | None,
) -> ShardTokens:
    """The counts of a shard; the record of each usable sample's texts goes to `store`."""
    good: list[int] = []
    counts: list[tuple[int, int, int, int, int, int]] = []
    bad = list(members.ignored)
    conversations = 0
    taken: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    excluded = excluded_samples(shard, fields.kind)
    for number, key in enumerate(members.keys):
        if key in excluded:
            bad.append((key, excluded[key].described))
            continue
        try:
            found = Fields(read_fields(shard, members, number, fields, crop, reader, name, images=False), fields)
            if failed := found.rejected():
                filtered[failed] += 1
                continue
            samples = parse_variants(found, image_slots=encoder.image_slots, codebook_size=encoder.codebook_size)
            texts = [encoder.texts(sample) for sample in samples]
            lengths = [encoder.token_counts(*variant) for variant in zip(samples, texts, strict=True)]
        except SkipSample as reason:
            bad.append((key, str(reason)))
            continue
        taken[" and ".join(map(str, found.taken.values()))] += 1
        notes.update(found.notes)
        conversations += isinstance(samples[0], TextSample) and bool(samples[0].turns)
        for variant, count in zip(texts, lengths, strict=True):
            good.append(number)
            lengths_of = (count.tokens, count.short_tokens, count.dropped_tokens, count.short_dropped_tokens)
            counts.append((*lengths_of, count.images, count.min_tokens))
            if store is not None:
                store(encoder.record(variant))
    table = np.array(counts, np.int32).reshape(-1, 6)
    usual = fields.kind is not Kind.UNDERSTANDING or (table[:, 4:] == (1, encoder.min_tokens(fields.kind))).all()
    return ShardTokens(
        sample=np.array(good, np.int32),
        tokens=table[:, 0],
        short_tokens=table[:, 1],
        dropped_tokens=table[:, 2],
        short_dropped_tokens=table[:, 3],
        conversations=conversations,
        bad=tuple(bad),
        taken=tuple(taken.items()),
        filtered=tuple(filtered.items()),
        notes=tuple(notes.items()),
        images=None if usual else table[:, 4],
        min_tokens=None if usual else table[:, 5],
    )


def shard_members(shard: Shard, reader: ShardReader) -> ShardMembers:
    """The members of a shard from its sidecar, which is written where it is missing. Raises DataError for a corrupt
    tar."""
    members = load_members(shard)
    if members is None:
        members = scan_members(shard, reader)
        store_members(shard, members)
    return members


def source_fingerprint(encoder: Encoder, fields: FieldMap) -> str:
    """Hex digest of everything that determines the token counts and ids of a source's shards, except their bytes."""
    parts = [str(FORMAT), encoder.fingerprint, fields.kind.value, fields.class_prompt.value, fields.class_template]
    parts += [fields.fingerprint] if fields.fingerprint else []
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    name: str
    fields: FieldMap
    shard: Shard
    fingerprint: str


def _build(
    tasks: Sequence[_Task],
    cfg: RunConfig,
    encoder: Encoder,
    reader: ShardReader,
    processes: int,
    progress: Callable[[IndexProgress], None] | None,
    without_ids: int,
) -> None:
    """Write the sidecars of every task, the largest shards first."""
    if not tasks:
        return
    total = sum(task.shard.size for task in tasks)
    samples = bytes_done = 0

    def report(shards_done: int) -> None:
        if progress is not None:
            progress(
                IndexProgress(
                    shards_done=shards_done,
                    shards=len(tasks),
                    samples=samples,
                    bytes_done=bytes_done,
                    bytes=total,
                    without_ids=without_ids,
                )
            )

    report(0)
    with ordered_results(
        sorted(tasks, key=lambda task: -task.shard.size),
        partial(_run, cfg=cfg, encoder=encoder, reader=reader),
        1 if total < SMALL_BYTES else min(processes, len(tasks)),
        describe=lambda task: f"shard {task.shard.path}",
    ) as results:
        for number, (task, count) in enumerate(results, start=1):
            samples, bytes_done = samples + count, bytes_done + task.shard.size
            report(number)


def _run(task: _Task, cfg: RunConfig, encoder: Encoder, reader: ShardReader) -> int:
    tokens = index_shard(
        task.shard,
        name=task.name,
        fields=task.fields,
        fingerprint=task.fingerprint,
        encoder=encoder,
        reader=reader,
        crop=cfg.data.crop,
        with_ids=cfg.data.token_ids is not TokenIds.off,
    )
    return len(tokens)


def _assemble(
    name: str,
    source: SourceConfig,
    cfg: RunConfig,
    encoder: Encoder,
    fields: FieldMap,
    shards: Sequence[Shard],
    fingerprint: str,
    loaded: Mapping[tuple[str, str], ShardTokens],
) -> SourceIndex:
    with_ids = cfg.data.token_ids is not TokenIds.off
    parts: list[ShardTokens] = []
    bad: list[BadSample] = []
    for shard in shards:
        part = loaded.get((name, shard.path)) or load_tokens(shard, fingerprint, with_ids=with_ids)
        if part is None:
            raise DataError(
                f"source {name!r}: the index of {shard.path} vanished while it was read, or the shard is being "
                "rewritten; start again"
            )
        parts.append(part)
        bad += [
            BadSample(info=SourceInfo(source=name, shard=shard.path, key=key), reason=reason)
            for key, reason in (*part.bad, *_without_room(shard, part, cfg.data.seq_len))
        ]
    lengths = [len(part) for part in parts]
    if not sum(lengths):
        examples = "; ".join(f"{sample.info.key}: {sample.reason}" for sample in bad[:_NAMED_BAD])
        problem = f"all {len(bad)} are bad, e.g. {examples}" if bad else "the shards are empty"
        filtered = _summed(part.filtered for part in parts)
        if filtered:
            counts = ", ".join(f"{count:,} {reason}" for reason, count in filtered.items())
            problem = f"its filter leaves out {counts}{f'; {len(bad)} are bad, e.g. {examples}' if bad else ''}"
        raise DataError(f"source {name!r} ({source.shards}) has no usable {source.kind.value} sample: {problem}")

    def joined(field: str) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part in parts]).astype(np.int32)

    def joined_or(field: str, usual: int) -> np.ndarray | None:
        arrays = [getattr(part, field) for part in parts]
        if all(array is None for array in arrays):
            return None
        rest = [np.full(len(part.sample), usual, np.int32) for part in parts]
        return np.concatenate([r if array is None else array for array, r in zip(arrays, rest, strict=True)])

    locator = SourceLocator(
        name=name,
        kind=fields.kind,
        config=source,
        fields=fields,
        fingerprint=fingerprint,
        shards=tuple(shards),
        samples_before=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_ids=with_ids,
    )
    return SourceIndex(
        locator=locator,
        tokens=joined("tokens"),
        short_tokens=joined("short_tokens"),
        dropped_tokens=joined("dropped_tokens"),
        conversations=sum(part.conversations for part in parts),
        bad=tuple(bad),
        passed_over=passed_over_text(passed_over(source.shards, cfg.data.root)),
        ids_bytes=sum(part.ids_bytes or 0 for part in parts) if with_ids else 0,
        first_entry=_first_entries(parts),
        taken=_summed(part.taken for part in parts),
        filtered=_summed(part.filtered for part in parts),
        notes=_summed(part.notes for part in parts),
        images=joined_or("images", 1),
        min_tokens=joined_or("min_tokens", encoder.min_tokens(fields.kind)),
    )


def _without_room(shard: Shard, tokens: ShardTokens, seq_len: int) -> list[tuple[str, str]]:
    """(key, reason) of the samples of a shard whose images no row can hold."""
    if tokens.images is None or tokens.min_tokens is None or tokens.min_tokens.max(initial=0) <= seq_len:
        return []
    reasons = {}
    for sample, images, least in zip(tokens.sample.tolist(), tokens.images, tokens.min_tokens, strict=True):
        if reason := too_many_images(int(images), int(least), seq_len):
            reasons[sample] = reason
    members = load_members(shard) if reasons else None
    return [] if members is None else [(members.keys[sample], reason) for sample, reason in reasons.items()]


def _first_entries(parts: Sequence[ShardTokens]) -> np.ndarray | None:
    """The joined `first_entry` of shards; None where every sample has one entry."""
    if all(part.first_entry is None for part in parts):
        return None
    counts = [np.ones(len(part), np.int64) if part.first_entry is None else np.diff(part.first_entry) for part in parts]
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)


def _summed(counts: Iterable[Iterable[tuple[str, int]]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for pairs in counts:
        total.update(dict(pairs))
    return dict(total.most_common())
