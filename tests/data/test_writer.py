"""Shards that appear whole or not at all, with equal bytes for equal samples."""

from __future__ import annotations

import hashlib
import os
import tarfile

import numpy as np
import pytest
import webdataset

from jp_train.data.shards import ShardReader, scan_members
from jp_train.data.writer import ShardWriter, pack_sample
from jp_train.errors import ConfigError, DataError
from tests.data.data_samples import generation_samples, text_samples


def write(folder, samples, **bounds):
    shards = []
    with ShardWriter(folder, **{"max_bytes": 1 << 30, "max_samples": 1000, **bounds}) as writer:
        for key, fields in samples:
            shards.append(writer.write(key, fields))
        shards.append(writer.finish())
    return [shard for shard in shards if shard is not None]


def test_webdataset_and_the_member_scan_read_back_what_was_written(tmp_path):
    samples = [
        *generation_samples(7),
        ("k" * 90, {"json": b"{}"}),
        ("l" * 200, {"json": b"{}"}),
        ("ключ", {"json": b"{}"}),
    ]
    (shard,) = write(tmp_path, samples)
    path = tmp_path / shard.name
    read = [(sample.pop("__key__"), sample) for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [
        (key, {name: sample[name] for name in fields}) for (key, sample), (_, fields) in zip(read, samples, strict=True)
    ] == samples
    reader = ShardReader()
    assert scan_members(reader.stat(str(path)), reader).keys == tuple(key for key, _ in samples)
    assert (shard.samples, shard.size) == (10, path.stat().st_size)
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a", "x" * 95, "x" * 96, "x" * 300, "é" * 47])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 70_000])
def test_a_members_bytes_are_those_that_tarfile_writes(name, size):
    data = np.random.default_rng(size).bytes(size)
    member = tarfile.TarInfo(f"{name}.json")
    member.size = size
    expected = member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-size % 512)
    assert pack_sample(name, {"json": data}) == expected


def test_no_shard_passes_its_bounds_and_no_sample_is_lost(tmp_path):
    samples = text_samples(60)
    limit = 8 << 10
    shards = write(tmp_path, samples, max_bytes=limit, max_samples=5)
    assert [shard.name for shard in shards] == [f"{number:06d}.tar" for number in range(len(shards))]
    assert all(shard.samples <= 5 and shard.size <= limit for shard in shards)
    assert {shard.samples for shard in shards} > {5}, "both bounds are at work"
    keys = []
    for shard in shards:
        with tarfile.open(tmp_path / shard.name) as tar:
            keys += [name.removesuffix(".txt") for name in tar.getnames()]
    assert keys == [key for key, _ in samples]


def test_a_sample_larger_than_the_bound_has_a_shard_of_its_own(tmp_path):
    samples = [("a", {"txt": b"x"}), ("b", {"txt": b"x" * 50_000}), ("c", {"txt": b"x"})]
    shards = write(tmp_path, samples, max_bytes=4096)
    assert [shard.samples for shard in shards] == [1, 1, 1]


def test_an_exception_leaves_finished_shards_and_no_unfinished_file(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, max_bytes=1 << 30, max_samples=2) as writer:
        for key, fields in text_samples(3):
            writer.write(key, fields)
        raise RuntimeError
    assert os.listdir(tmp_path) == ["000000.tar"]


def test_the_shards_name_appears_only_when_it_is_complete(tmp_path):
    with ShardWriter(tmp_path, max_bytes=1 << 30, max_samples=100) as writer:
        for key, fields in text_samples(3):
            writer.write(key, fields)
            assert os.listdir(tmp_path) == [".000000.tar.tmp"]
    assert os.listdir(tmp_path) == ["000000.tar"]


def test_a_disk_that_refuses_is_one_error_with_the_way_on(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot write shard .*file/000000.tar.*run the same command again"):
        write(tmp_path / "file", text_samples(1))
    with pytest.raises(ConfigError, match="at least one byte"):
        ShardWriter(tmp_path, max_bytes=0, max_samples=1)
