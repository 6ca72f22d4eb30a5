"""The work of encode-images without the VQ: which shards there are, who takes which, what is done, and images
ready to encode."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from enum import Enum

import numpy as np

from jp_train.config.choices import Crop, SourceKind
from jp_train.config.schema import RunConfig
from jp_train.data.field_map import IMAGE_EXTENSIONS
from jp_train.data.image import load_generation_image
from jp_train.data.samples import check_field_size
from jp_train.data.shards import Shard, ShardMembers, ShardReader, expand_shards
from jp_train.data.vq_ids import ids_problem, load_manifest
from jp_train.errors import ConfigError, SkipSample
from jp_train.terminal import aligned

READ_AHEAD = 4
"""Batches of decoded images that wait for the VQ, at most."""


class IdsState(Enum):
    """Whether a shard's ids are there. `stale`: they are of a file of another size or stamp, perhaps with the same
    images."""

    done = "done"
    stale = "stale"
    missing = "missing"


def generation_shards(cfg: RunConfig, reader: ShardReader) -> list[Shard]:
    """The shards of all generation sources, training and held-out, each once, in the order of the configuration.

    Raises:
        ConfigError: when there is no generation source.
        DataError: for shards that are missing or cannot be reached.
    """
    sources = [*cfg.data.sources.values(), *cfg.validation.sources.values()]
    mine = [source for source in sources if source.kind is SourceKind.generation and "image" not in source.fields]
    if not mine:
        raise ConfigError(
            "the configuration has no generation source whose image has the usual name (`fields.image` not set), so "
            "there is no image to encode: name a recipe that has one"
        )
    paths = dict.fromkeys(path for source in mine for path in expand_shards(source.shards, cfg.data.root))
    return [reader.stat(path) for path in paths]


def shares(shards: Sequence[Shard], world_size: int) -> list[list[Shard]]:
    """Each rank's shards: the largest first, always to the rank with the fewest bytes. The same on every rank,
    whatever is done already."""
    share: list[list[Shard]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for shard in sorted(shards, key=lambda shard: (-shard.size, shard.path)):
        rank = min(range(world_size), key=lambda rank: (load[rank], rank))
        share[rank].append(shard)
        load[rank] += shard.size
    return share


def ids_state(shard: Shard, fingerprint: str, reader: ShardReader) -> IdsState:
    """What is there of a shard's ids; ids whose file is missing or damaged count as missing."""
    manifest = load_manifest(shard, fingerprint)
    if manifest is None or ids_problem(manifest, reader):
        return IdsState.missing
    return IdsState.done if manifest.belongs_to(shard) else IdsState.stale


def image_member(members: ShardMembers, number: int) -> int | None:
    """The member that is the image of sample `number`; None when it has none, or several (training leaves such a
    sample out)."""
    range_of_sample = range(int(members.member_start[number]), int(members.member_start[number + 1]))
    images = [member for member in range_of_sample if members.extensions[members.extension[member]] in IMAGE_EXTENSIONS]
    return images[0] if len(images) == 1 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedImage:
    """The image of one sample, decoded: `pixels` uint8 [3, side, side], or None with `fault`, the reason that
    training would give."""

    number: int
    key: str
    sha256: bytes
    size: int
    pixels: np.ndarray | None
    fault: str


class ImageReader:
    """Reads images of a shard and makes them what the VQ sees, on the threads of `pool`."""

    def __init__(self, cfg: RunConfig, reader: ShardReader, pool: Executor) -> None:
        self._side, self._max_pixels, self._decode = (
            cfg.model.vision.image_size,
            cfg.data.max_image_pixels,
            cfg.data.image_decode,
        )
        self._reader, self._pool = reader, pool

    def images(
        self, shard: Shard, members: ShardMembers, numbers: Iterable[int], *, ahead: int, decode: bool = True
    ) -> Iterator[DecodedImage]:
        """The images of these samples in order, at most `ahead` of them decoded before they are asked for; samples
        without an image are left out. `decode=False` only reads and digests them. Raises DataError when the shard
        cannot be read."""
        waiting: deque[Future[DecodedImage]] = deque()
        try:
            for number in numbers:
                member = image_member(members, number)
                if member is None:
                    continue
                waiting.append(self._pool.submit(self._load, shard, members, number, member, decode))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _load(self, shard: Shard, members: ShardMembers, number: int, member: int, decode: bool) -> DecodedImage:
        size = int(members.size[member])
        pixels, data, fault = None, b"", ""
        try:
            check_field_size(members.extensions[members.extension[member]], size)
            data = self._reader.read(shard, int(members.offset[member]), size)
            if decode:
                pixels = load_generation_image(
                    data, self._side, Crop.centre, max_pixels=self._max_pixels, decode=self._decode
                )
        except SkipSample as reason:
            fault = str(reason)
        digest = hashlib.sha256(data).digest()
        return DecodedImage(
            number=number, key=members.keys[number], sha256=digest, size=size, pixels=pixels, fault=fault
        )


class ImagesDigest:
    """SHA-256 over the keys and bytes of all images of a shard, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, image: DecodedImage) -> None:
        """Count an image in."""
        self._digest.update(image.key.encode("utf-8", "surrogateescape") + b"\0%d\0" % image.size + image.sha256)

    def hex(self) -> str:
        """The digest so far."""
        return self._digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """One line of the table of ranks: shards of the rank, how many of them have their ids, and MiB in all and still
    to do."""

    rank: int
    shards: int
    done: int
    mib: float
    mib_left: float


def rank_shares(share: Sequence[Sequence[Shard]], state: Callable[[Shard], IdsState]) -> list[RankShare]:
    """What each rank has and has left, from the files that are there."""
    lines = []
    for rank, shards in enumerate(share):
        left = [shard.size for shard in shards if state(shard) is not IdsState.done]
        total = sum(shard.size for shard in shards) / 2**20
        lines.append(
            RankShare(
                rank=rank, shards=len(shards), done=len(shards) - len(left), mib=total, mib_left=sum(left) / 2**20
            )
        )
    return lines


def format_ranks(lines: Sequence[RankShare]) -> str:
    """The ranks as an aligned text table."""
    rows = [("rank", "shards", "done", "MiB", "MiB left")]
    rows += [
        (f"{line.rank}", f"{line.shards:,}", f"{line.done:,}", f"{line.mib:,.1f}", f"{line.mib_left:,.1f}")
        for line in lines
    ]
    return "\n".join(aligned(rows, left=()))
