"""One shard, read once from front to back: every fault that training would meet in it, found with training's own
parsing and decoding.

Members that training does not use are not checked: members that no layout names, and images that `.vq.npy` members
replace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from jp_train.config.choices import BatchUnit, OverLong, Template, VqIds
from jp_train.config.schema import RunConfig, SourceConfig
from jp_train.data.encode import Encoder, TokenCounts, too_many_images
from jp_train.data.field_map import Fields, field_map
from jp_train.data.image import check_header
from jp_train.data.sample_fields import read_located
from jp_train.data.samples import Sample, parse_variants
from jp_train.data.shards import Shard, ShardReader, ShardWindow
from jp_train.data.tar_headers import TarFault, tar_members
from jp_train.data.tar_samples import TarSample, group_members
from jp_train.errors import DataError, SkipSample
from jp_train.types import GenerationSample, SourceInfo, TextSample, UnderstandingSample

WINDOW_BYTES = 4 << 20
"""Bytes read at a time; two such blocks are held."""
EDGES = np.concatenate([[0], np.unique(np.round(2.0 ** np.arange(0, 22.01, 1 / 8)).astype(np.int64))])
"""Token counts at which the bins of the length histogram begin; the last bin has no end."""
UNREADABLE, OVER_LONG, STRAY, INTERNAL = "unreadable", "over_long", "stray_file", "internal_error"
EMPTY = "empty_shard"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyTask:
    """A shard of a source. `decode`: how many of its images are decoded, evenly spread (None: all); of the others
    only the header is read."""

    source: str
    config: SourceConfig
    shard: Shard
    decode: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One finding. `fault`: its class; `key`: the sample (or file) it belongs to, None when it is the shard's;
    `offset`: the byte in the shard where it begins, where known; `warning`: training goes on with the sample;
    `image`: only decoding shows it."""

    fault: str
    source: str
    shard: str
    key: str | None
    offset: int | None
    reason: str
    warning: bool = False
    image: bool = False


@dataclass(kw_only=True, slots=True)
class ShardReport:
    """The result of one pass. `samples`: whole samples; `good`: those that training can use; `filtered`: those that a
    filter of the source leaves out; `decoded`: images decoded;
    `whole`: training can read the shard; `last_key`: the last whole sample; `lengths`: histogram of the good samples'
    tokens over `EDGES`."""

    source: str
    kind: str
    shard: Shard
    samples: int = 0
    good: int = 0
    filtered: int = 0
    decoded: int = 0
    tokens: int = 0
    longest: int = 0
    over_seq_len: int = 0
    whole: bool = True
    last_key: str | None = None
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGES), np.int64))
    faults: list[Fault] = field(default_factory=list)


def verify_shard(
    task: VerifyTask,
    cfg: RunConfig,
    encoder: Encoder,
    reader: ShardReader,
    progress: Callable[[int, int], None] = lambda samples, at: None,
) -> ShardReport:
    """Read the shard once; `progress(samples, offset)` is called after each sample with the number of samples and bytes
    so far.

    A fault of the tar ends its pass, not the program: the report says up to where it is readable. Raises nothing for
    bad data.
    """
    return _Pass(task, cfg, encoder, reader).run(progress)


class _Pass:
    def __init__(self, task: VerifyTask, cfg: RunConfig, encoder: Encoder, reader: ShardReader) -> None:
        self._task, self._cfg, self._encoder = task, cfg, encoder
        self._fields = field_map(task.config)
        self._kind = self._fields.kind
        self._window = ShardWindow(reader, task.shard, WINDOW_BYTES)
        self._report = ShardReport(source=task.source, kind=str(self._kind), shard=task.shard)

    def run(self, progress: Callable[[int, int], None]) -> ShardReport:
        report = self._report
        try:
            for number, sample in enumerate(self._samples()):
                first = next(iter(sample.members.values()))
                last = max(member.offset + member.size for member in sample.members.values())
                self._sample(number, sample, first.header)
                report.samples += 1
                report.last_key = sample.key
                progress(report.samples, last)
        except TarFault as fault:
            readable = (
                f"readable up to sample {report.samples} (key {report.last_key!r})"
                if report.samples
                else "no sample before it is readable"
            )
            self._tar_fault(fault, None, f"; {readable}")
        except DataError as error:
            report.whole = False
            self._add(UNREADABLE, None, None, str(error))
        if report.whole and not report.samples:
            self._add(EMPTY, None, None, f"no sample in its {self._task.shard.size:,} bytes", warning=True)
        return report

    def _samples(self) -> Iterator[TarSample]:
        members = tar_members(self._window.up_to, self._task.shard.size)
        return group_members(
            members, on_fault=self._tar_fault, on_stray=lambda name, at, reason: self._add(STRAY, name, at, reason)
        )

    def _tar_fault(self, fault: TarFault, key: str | None, readable: str = "") -> None:
        self._report.whole = False
        self._add(fault.fault, key, fault.offset, fault.reason + readable)

    def _add(
        self,
        fault: str,
        key: str | None,
        offset: int | None,
        reason: str,
        *,
        warning: bool = False,
        image: bool = False,
    ) -> None:
        self._report.faults.append(
            Fault(
                fault=fault,
                source=self._task.source,
                shard=self._task.shard.path,
                key=key,
                offset=offset,
                reason=reason,
                warning=warning,
                image=image,
            )
        )

    def _sample(self, number: int, files: TarSample, offset: int) -> None:
        task, cfg, report = self._task, self._cfg, self._report
        info = SourceInfo(source=task.source, shard=task.shard.path, key=files.key)
        located = {extension: (member.offset, member.size) for extension, member in files.members.items()}
        image = False
        try:
            raw = read_located(
                info,
                task.shard,
                number,
                located,
                self._fields,
                cfg.data.crop,
                self._window,
                embedded_ids=cfg.data.vq_ids is not VqIds.off,
            )
            encoder = self._encoder
            found = Fields(raw, self._fields)
            if found.rejected():
                report.filtered += 1
                return
            samples = parse_variants(found, image_slots=encoder.image_slots, codebook_size=encoder.codebook_size)
            sample, counts = max(
                ((sample, encoder.token_counts(sample)) for sample in samples), key=lambda pair: pair[1].tokens
            )
            tokens = counts.tokens
            if reason := too_many_images(counts.images, counts.min_tokens, cfg.data.seq_len):
                raise SkipSample(reason, "too_many_images")
            image = True  # the index goes as far as this
            self._decode(sample, counts, offset)
        except DataError:
            raise
        except SkipSample as reason:
            blame = next((located[e][0] for e in located if self._fields.is_image(e)), offset) if image else offset
            self._add(reason.fault, files.key, blame, str(reason), image=image and reason.fault.startswith("picture"))
            return
        except Exception as error:
            # training would stop here: a fault of jp_train, and no reason to look at the rest no more
            self._add(INTERNAL, files.key, offset, f"{type(error).__name__}: {str(error)[:300]}")
            return
        report.good += 1
        report.tokens += tokens
        report.longest = max(report.longest, tokens)
        report.lengths[np.searchsorted(EDGES, tokens, side="right") - 1] += 1
        if tokens > cfg.data.seq_len:
            report.over_seq_len += 1
            if not self._cuttable(sample):
                self._add(OVER_LONG, files.key, offset, self._policy(counts), warning=True)

    def _decode(self, sample: Sample, counts: TokenCounts, offset: int) -> None:
        """What a loader worker does with the sample. Raises SkipSample as it would."""
        cfg, encoder = self._cfg, self._encoder
        cut = counts.tokens > cfg.data.seq_len and not self._cuttable(sample)
        if cut and (cfg.data.over_long is OverLong.drop or counts.min_tokens > cfg.data.seq_len):
            return  # the plan passes it over, it is never read
        images = sample.images if isinstance(sample, UnderstandingSample) else ()
        if isinstance(sample, GenerationSample) and sample.image is not None:
            images = (sample.image,)
        if images and not self._is_drawn(offset):
            for image in images:
                check_header(image, cfg.data.max_image_pixels)
            return
        if not images and not cut:
            return
        self._report.decoded += len(images)
        encoder.encode(sample, source=self._task.source, held_out=True, max_tokens=cfg.data.seq_len if cut else None)

    def _cuttable(self, sample: Sample) -> bool:
        """Whether the plan may cut the document into spans: then no token of it is lost."""
        stage = self._cfg.stage
        if not isinstance(sample, TextSample) or stage.batch_unit is BatchUnit.samples:
            return False
        return stage.template is not Template.stage3 or not sample.turns

    def _is_drawn(self, offset: int) -> bool:
        """Whether this image is one of the `decode` evenly spread ones: the first at or after each of as many byte
        positions."""
        decode = self._task.decode
        if decode is None:
            return True
        done = self._report.decoded
        return done < decode and offset >= done * self._task.shard.size // decode

    def _policy(self, counts: TokenCounts) -> str:
        cfg, tokens = self._cfg, counts.tokens
        lengths = f"{tokens} tokens, data.seq_len is {cfg.data.seq_len}: "
        if cfg.data.over_long is OverLong.drop:
            return lengths + "dropped (data.over_long=drop)"
        if counts.min_tokens > cfg.data.seq_len:
            return lengths + "never used, because its image cannot be cut"
        return lengths + f"{tokens - cfg.data.seq_len} tokens are cut off (data.over_long=truncate)"
