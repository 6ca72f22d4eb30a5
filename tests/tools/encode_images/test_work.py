"""Who encodes which shard, what is an image, and the digest and table of the work."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jp_train.config import RunConfig
from jp_train.data.shards import Shard, ShardMembers, ShardReader
from jp_train.errors import ConfigError
from jp_train.tools.encode_images.work import (
    DecodedImage,
    IdsState,
    ImagesDigest,
    format_ranks,
    generation_shards,
    image_member,
    rank_shares,
    shares,
)

MIB = 1 << 20


def shard(number: int, size: int) -> Shard:
    return Shard(path=f"/data/{number:03d}.tar", size=size, stamp="0")


@pytest.mark.parametrize("world", [1, 3, 8, 40])
def test_every_shard_has_one_rank_and_no_rank_has_much_more_than_another(world: int) -> None:
    sizes = [random.Random(5).randrange(1, 100) * MIB for _ in range(30)]
    shards = [shard(number, size) for number, size in enumerate(sizes)]
    split = shares(shards, world)
    assert sorted(item.path for part in split for item in part) == [item.path for item in shards]
    loads = [sum(item.size for item in part) for part in split]
    assert max(loads) - min(loads) <= max(sizes)
    assert shares(list(reversed(shards)), world) == split, "the order in which shards are listed does not matter"


def test_an_image_is_the_only_member_with_an_image_extension() -> None:
    extensions = ("txt", "jpg", "png")
    #  sample 0: txt jpg, 1: txt, 2: jpg png, 3: png
    members = ShardMembers(
        keys=("a", "b", "c", "d"),
        member_start=np.array([0, 2, 3, 5, 6]),
        extensions=extensions,
        extension=np.array([0, 1, 0, 1, 2, 2], np.int32),
        offset=np.arange(6),
        size=np.ones(6, np.int64),
        ignored=(),
    )
    assert [image_member(members, number) for number in range(4)] == [1, None, None, 5]


def image(key: str, sha256: bytes, size: int = 3) -> DecodedImage:
    return DecodedImage(number=0, key=key, sha256=sha256, size=size, pixels=None, fault="")


def test_the_digest_changes_with_keys_bytes_and_order() -> None:
    first, second = image("a", b"1" * 32), image("b", b"2" * 32)
    digests = set()
    for group in ([first, second], [second, first], [first], [image("c", b"1" * 32), second], []):
        digest = ImagesDigest()
        for item in group:
            digest.add(item)
        digests.add(digest.hex())
    assert len(digests) == 5


def test_the_table_counts_what_is_left_of_each_rank() -> None:
    done, left = shard(0, 3 * MIB), shard(1, 2 * MIB)
    states = {done.path: IdsState.done, left.path: IdsState.stale}
    lines = rank_shares([[done, left], []], lambda item: states[item.path])
    assert [(line.shards, line.done, line.mib, line.mib_left) for line in lines] == [(2, 1, 5.0, 2.0), (0, 0, 0.0, 0.0)]
    assert format_ranks(lines).splitlines()[1].split() == ["0", "2", "1", "5.0", "2.0"]


def test_a_configuration_without_generation_sources_is_refused() -> None:
    with pytest.raises(ConfigError, match="no generation source"):
        generation_shards(RunConfig(), ShardReader(1))
