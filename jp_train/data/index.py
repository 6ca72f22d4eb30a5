"""The index of the sources: where every field of every sample lies, and how many tokens the sample has.

It is kept in sidecars beside the shards (sidecar.py) and built, in parallel processes, where they are missing or stale. Pictures
are not decoded here: an undecodable one is found when it is used, or beforehand by `data verify`, whose exclusions are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jp_train.config.schema import Crop, RunConfig, SourceConfig, TokenIds
from jp_train.data.encode import Encoder
from jp_train.data.exclusions import excluded_samples, with_exclusions
from jp_train.data.processes import end_with_trainer, kill_workers, signals_deferred, worker_context
from jp_train.data.samples import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, VQ_EXTENSION, check_field_size, parse_sample, wanted_fields
from jp_train.data.shards import Shard, ShardMembers, ShardReader, ShardWindow, expand_shards, read_spans, scan_members
from jp_train.data.sidecar import FORMAT, ShardTokens, has_members, load_members, load_tokens, store_members, store_tokens
from jp_train.data.token_ids import RecordSpool
from jp_train.data.tokenizer import Tokenizer
from jp_train.data.vq_ids import StoredIds
from jp_train.errors import DataError, SkipSample
from jp_train.types import Kind, RawSample, SourceInfo, TextSample

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
    """What a progress callback gets, after each shard: counts of shards, samples and bytes done, of all that were stale."""

    shards_done: int
    shards: int
    samples: int
    bytes_done: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLocator:
    """What a loader worker needs to find the samples of a source: no per-sample array, so it is cheap to send to a process."""

    name: str
    kind: Kind
    config: SourceConfig
    fingerprint: str
    shards: tuple[Shard, ...]
    samples_before: np.ndarray
    """int64 [shards + 1]: usable samples before each shard."""
    ids_fingerprint: str = ""
    """Of the VQ ids stored beside the shards (vq_ids.py); empty when pictures are read."""
    shards_with_ids: frozenset[int] = frozenset()
    """Numbers of the shards whose stored ids are used; pictures of the others are read."""
    embedded_ids: bool = True
    """Whether `.vq.npy` members of the shards are used."""
    token_ids: bool = False
    """Whether the token ids in the shards' sidecars stand for the texts."""

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard number, and number among the shard's usable samples. Raises DataError when the source has no such sample."""
        if not 0 <= sample < self.samples_before[-1]:
            raise DataError(
                f"source {self.name!r} has {int(self.samples_before[-1])} samples, the plan asks for number {sample}: another index"
            )
        shard = int(np.searchsorted(self.samples_before, sample, side="right")) - 1
        return shard, sample - int(self.samples_before[shard])


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIndex:
    """The index of one source, over its shards in order: token counts int32 [N] of its N usable samples, and the bad ones; `ids_bytes` is the
    size of the stored token ids, 0 where they are not used."""

    locator: SourceLocator
    tokens: np.ndarray
    short_tokens: np.ndarray
    dropped_tokens: np.ndarray
    dialogues: int
    bad: tuple[BadSample, ...]
    ids_bytes: int = 0

    @property
    def name(self) -> str:
        return self.locator.name

    @property
    def kind(self) -> Kind:
        return self.locator.kind

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.locator.shards

    def __len__(self) -> int:
        return len(self.tokens)


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
    reader = ShardReader(cfg.data.io_retries)
    shards = {
        name: [with_exclusions(reader.stat(path)) for path in expand_shards(source.shards, cfg.data.root)]
        for name, source in sources.items()
    }
    prints = {name: source_fingerprint(encoder, source) for name, source in sources.items()}
    loaded: dict[tuple[str, str], ShardTokens] = {}
    stale: list[_Task] = []
    with_ids = cfg.data.token_ids is not TokenIds.off
    for name, source in sources.items():
        for shard in shards[name]:
            tokens = load_tokens(shard, prints[name], with_ids=with_ids)
            if tokens is not None and has_members(shard):
                loaded[name, shard.path] = tokens
            else:
                stale.append(_Task(name=name, source=source, shard=shard, fingerprint=prints[name]))
    _build(stale, cfg, tokenizer, encoder, reader, processes, progress)
    reader.close()
    return [_assemble(name, source, shards[name], prints[name], loaded, with_ids) for name, source in sources.items()]


def index_shard(
    shard: Shard,
    *,
    name: str,
    source: SourceConfig,
    fingerprint: str,
    encoder: Encoder,
    reader: ShardReader,
    crop: Crop,
    with_ids: bool = True,
) -> ShardTokens:
    """Build and write both sidecars of one shard; returns the tokens one. Raises DataError for a corrupt tar or failed reads."""
    members = shard_members(shard, reader)
    with RecordSpool() if with_ids else nullcontext() as records:
        tokens = _tokens_of(shard, members, name, source, encoder, reader, crop, None if records is None else records.add)
        store_tokens(shard, fingerprint, tokens, records)
    return tokens


def _tokens_of(
    shard: Shard,
    members: ShardMembers,
    name: str,
    source: SourceConfig,
    encoder: Encoder,
    reader: ShardReader,
    crop: Crop,
    store: Callable[[bytes], None] | None,
) -> ShardTokens:
    """The counts of a shard; the record of each usable sample's texts goes to `store`."""
    kind = Kind(source.kind.value)
    good: list[int] = []
    counts: list[tuple[int, int, int, int]] = []
    bad = list(members.ignored)
    dialogues = 0
    excluded = excluded_samples(shard, kind)
    for number, key in enumerate(members.keys):
        if key in excluded:
            bad.append((key, excluded[key].described))
            continue
        try:
            raw = read_fields(shard, members, number, kind, crop, reader, name, pictures=False)
            sample = parse_sample(raw, kind, source, image_slots=encoder.image_slots, codebook_size=encoder.codebook_size)
            texts = encoder.texts(sample)
            count = encoder.token_counts(sample, texts)
        except SkipSample as reason:
            bad.append((key, str(reason)))
            continue
        good.append(number)
        counts.append((count.tokens, count.short_tokens, count.dropped_tokens, count.short_dropped_tokens))
        if store is not None:
            store(encoder.record(texts))
        dialogues += isinstance(sample, TextSample) and bool(sample.turns)
    table = np.array(counts, np.int32).reshape(-1, 4)
    return ShardTokens(
        sample=np.array(good, np.int32),
        tokens=table[:, 0],
        short_tokens=table[:, 1],
        dropped_tokens=table[:, 2],
        short_dropped_tokens=table[:, 3],
        dialogues=dialogues,
        bad=tuple(bad),
    )


def shard_members(shard: Shard, reader: ShardReader) -> ShardMembers:
    """The members of a shard from its sidecar, which is written where it is missing. Raises DataError for a corrupt tar."""
    members = load_members(shard)
    if members is None:
        members = scan_members(shard, reader)
        store_members(shard, members)
    return members


def source_fingerprint(encoder: Encoder, source: SourceConfig) -> str:
    """Hex digest of all that decides the token counts of a source's shards besides their bytes."""
    parts = [str(FORMAT), encoder.fingerprint, source.kind.value, source.class_prompt.value, source.class_template]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_fields(
    shard: Shard,
    members: ShardMembers,
    number: int,
    kind: Kind,
    crop: Crop,
    reader: ShardReader,
    source: str,
    *,
    pictures: bool = True,
    stored: StoredIds | None = None,
    embedded_ids: bool = True,
    token_ids: bytes | None = None,
) -> RawSample:
    """The bytes of sample `number` of a shard, only the fields its kind needs (`pictures=False`: pictures as empty bytes).

    With `stored` ids of the shard a picture is not read, whether it has ids or is known to be unusable. `embedded_ids=False` leaves
    `.vq.npy` members alone where there is a picture to encode. With `token_ids`, the sample's stored record, its texts are not read.
    """
    first, last = members.member_start[number : number + 2].tolist()
    spans = zip(members.offset[first:last].tolist(), members.size[first:last].tolist(), strict=True)
    where = dict(zip([members.extensions[code] for code in members.extension[first:last].tolist()], spans, strict=True))
    info = SourceInfo(source=source, shard=shard.path, key=members.keys[number])
    return read_located(
        info,
        shard,
        number,
        where,
        kind,
        crop,
        reader,
        pictures=pictures,
        stored=stored,
        embedded_ids=embedded_ids,
        token_ids=token_ids,
    )


def read_located(
    info: SourceInfo,
    shard: Shard,
    number: int,
    located: Mapping[str, tuple[int, int]],
    kind: Kind,
    crop: Crop,
    reader: ShardReader | ShardWindow,
    *,
    pictures: bool = True,
    stored: StoredIds | None = None,
    embedded_ids: bool = True,
    token_ids: bytes | None = None,
) -> RawSample:
    """As `read_fields`, for a sample whose files are `located`: extension -> (offset, size) in the shard.

    Raises SkipSample for a file that is too large to be read.
    """
    ids = None if stored is None else stored.row(number)
    fault = "" if stored is None or ids is not None else stored.unusable.get(info.key, "")
    known, texts = ids is not None or bool(fault), token_ids is None
    wanted, needed, read = _fields_to_read(tuple(located), kind, crop, known, embedded_ids, pictures, texts)
    for extension in needed:
        check_field_size(extension, located[extension][1])
    found = read_spans(reader, shard, [located[extension] for extension in read])
    fields = dict.fromkeys(wanted, b"")
    fields |= zip(read, found, strict=True)
    return RawSample(info=info, fields=fields, vq_ids=ids, picture_fault=fault, token_ids=token_ids)


@lru_cache(maxsize=1024)
def _fields_to_read(
    present: tuple[str, ...], kind: Kind, crop: Crop, known: bool, embedded_ids: bool, pictures: bool, texts: bool
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Of a sample with these extensions: the fields it is made of, those of them that must not be too large, and those that are read.

    `known`: ids, or the fault of its picture, are stored, so the picture is not needed; `texts`: its texts are to be read.
    """
    where = list(present)
    if known or (not embedded_ids and any(extension in where for extension in IMAGE_EXTENSIONS)):
        where = [extension for extension in where if extension != VQ_EXTENSION]
    wanted = tuple(wanted_fields(kind, where, crop))
    needed = tuple(extension for extension in wanted if not (known and extension in IMAGE_EXTENSIONS))
    unread = (*(() if pictures else IMAGE_EXTENSIONS), *(() if texts else TEXT_EXTENSIONS))
    return wanted, needed, tuple(extension for extension in needed if extension not in unread)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    name: str
    source: SourceConfig
    shard: Shard
    fingerprint: str


def _build(
    tasks: Sequence[_Task],
    cfg: RunConfig,
    tokenizer: Tokenizer,
    encoder: Encoder,
    reader: ShardReader,
    processes: int,
    progress: Callable[[IndexProgress], None] | None,
) -> None:
    total = sum(task.shard.size for task in tasks)
    done = samples = bytes_done = 0

    def report(task: _Task, count: int) -> None:
        nonlocal done, samples, bytes_done
        done, samples, bytes_done = done + 1, samples + count, bytes_done + task.shard.size
        if progress is not None:
            progress(IndexProgress(shards_done=done, shards=len(tasks), samples=samples, bytes_done=bytes_done, bytes=total))

    if processes <= 1 or len(tasks) < 2 or total < SMALL_BYTES:
        for task in tasks:
            report(task, _run(task, cfg, encoder, reader))
        return
    with signals_deferred():
        pool = ProcessPoolExecutor(
            min(processes, len(tasks)), mp_context=worker_context(), initializer=_start_worker, initargs=(cfg, tokenizer)
        )
        pending = {pool.submit(_run_in_worker, task): task for task in sorted(tasks, key=lambda task: -task.shard.size)}
    try:
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                task = pending.pop(future)
                try:
                    report(task, future.result())
                except BrokenProcessPool as error:
                    raise DataError(
                        f"an indexing process died near shard {task.shard.path} (out of memory?); try fewer processes, or 1 to "
                        f"see the cause"
                    ) from error
    except BaseException:
        kill_workers(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(task: _Task, cfg: RunConfig, encoder: Encoder, reader: ShardReader) -> int:
    tokens = index_shard(
        task.shard,
        name=task.name,
        source=task.source,
        fingerprint=task.fingerprint,
        encoder=encoder,
        reader=reader,
        crop=cfg.data.crop,
        with_ids=cfg.data.token_ids is not TokenIds.off,
    )
    return len(tokens)


_worker: tuple[RunConfig, Encoder, ShardReader] | None = None


def _start_worker(cfg: RunConfig, tokenizer: Tokenizer) -> None:
    global _worker
    end_with_trainer()
    _worker = (cfg, Encoder(cfg, tokenizer), ShardReader(cfg.data.io_retries))


def _run_in_worker(task: _Task) -> int:
    assert _worker is not None
    return _run(task, *_worker)


def _assemble(
    name: str,
    source: SourceConfig,
    shards: Sequence[Shard],
    fingerprint: str,
    loaded: Mapping[tuple[str, str], ShardTokens],
    with_ids: bool,
) -> SourceIndex:
    parts: list[ShardTokens] = []
    bad: list[BadSample] = []
    for shard in shards:
        part = loaded.get((name, shard.path)) or load_tokens(shard, fingerprint, with_ids=with_ids)
        if part is None:
            raise DataError(
                f"source {name!r}: the index of {shard.path} vanished while it was read, or the shard is being rewritten; start again"
            )
        parts.append(part)
        bad += [BadSample(info=SourceInfo(source=name, shard=shard.path, key=key), reason=reason) for key, reason in part.bad]
    lengths = [len(part) for part in parts]
    if not sum(lengths):
        examples = "; ".join(f"{sample.info.key}: {sample.reason}" for sample in bad[:_NAMED_BAD])
        found = f"all {len(bad)} are bad, e.g. {examples}" if bad else "the shards are empty"
        raise DataError(f"source {name!r} ({source.shards}) has no usable {source.kind.value} sample: {found}")

    def joined(field: str) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part in parts]).astype(np.int32)

    locator = SourceLocator(
        name=name,
        kind=Kind(source.kind.value),
        config=source,
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
        dialogues=sum(part.dialogues for part in parts),
        bad=tuple(bad),
        ids_bytes=sum(part.ids_bytes or 0 for part in parts) if with_ids else 0,
    )
