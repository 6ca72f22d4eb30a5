"""What `data verify --exclude` writes beside a shard, and what the index makes of it."""

from __future__ import annotations

import os

import pytest

from jp_train.data.exclusions import Excluded, excluded_samples, known_exclusions, store_exclusions, with_exclusions
from jp_train.data.shards import ShardReader
from jp_train.errors import DataError
from jp_train.types import Kind
from tests.data.data_samples import text_samples, write_shard


def test_a_damaged_file_of_exclusions_is_an_error_and_another_kind_is_not_touched(tmp_path):
    path = write_shard(tmp_path / "a.tar", text_samples(2))
    shard = ShardReader().stat(str(path))
    file = store_exclusions(shard, Kind.GENERATION, {"k\udcff": Excluded("picture_truncated", "why")})
    store_exclusions(shard, Kind.UNDERSTANDING, {"u": Excluded("picture_truncated", "why")})
    marked = with_exclusions(shard)
    assert list(excluded_samples(marked, Kind.GENERATION)) == ["k\udcff"] and excluded_samples(marked, Kind.TEXT) == {}
    assert excluded_samples(shard, Kind.TEXT) == {} or shard.excluded
    store_exclusions(shard, Kind.UNDERSTANDING, {})
    with pytest.raises(DataError, match="changed while"):
        excluded_samples(marked, Kind.GENERATION)
    file.write_text("{")
    with pytest.raises(DataError, match="not ignored"):
        with_exclusions(shard)


def test_exclusions_lie_beside_the_shard_and_end_when_it_is_written_again(tmp_path):
    path = write_shard(tmp_path / "a.tar", text_samples(2))
    shard = ShardReader().stat(str(path))
    file = store_exclusions(shard, Kind.TEXT, {"t0001": Excluded("bad_type", "why")})
    assert file == tmp_path / "a.tar.jp-excluded.json" and known_exclusions(shard, Kind.TEXT).keys() == {"t0001"}
    assert (
        excluded_samples(with_exclusions(shard), Kind.TEXT)["t0001"].described
        == "excluded by data verify (bad_type): why"
    )
    os.utime(path, ns=(1, 1))
    again = ShardReader().stat(str(path))
    assert known_exclusions(again, Kind.TEXT) == {} and with_exclusions(again) == again


def test_the_digest_of_a_shard_is_of_the_keys_and_kinds_and_not_of_the_reasons(tmp_path):
    shard = ShardReader().stat(str(write_shard(tmp_path / "a.tar", text_samples(3))))

    def digest(kind, *keys, reason="why"):
        for other in Kind:
            store_exclusions(shard, other, {})
        store_exclusions(shard, kind, {key: Excluded("bad_type", reason) for key in keys})
        return with_exclusions(shard).excluded

    both = digest(Kind.TEXT, "a", "b")
    assert both == digest(Kind.TEXT, "b", "a", reason="another")
    assert len({both, digest(Kind.TEXT, "a"), digest(Kind.GENERATION, "a", "b"), shard.excluded}) == 4
    store_exclusions(shard, Kind.GENERATION, {})
    assert with_exclusions(shard) == shard, "a file that excludes nothing is as good as none"
