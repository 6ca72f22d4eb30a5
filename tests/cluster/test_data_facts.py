"""What a host sees of the data: equal for equal files, different for every difference that training would notice."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jp_train.cluster.data_facts import data_facts, source_facts, tree_facts
from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.shards import ShardReader
from jp_train.data.sidecar import ShardTokens, store_tokens
from jp_train.errors import ConfigError, DataError


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "data/text"
    for number in range(3):
        write_shard(folder / f"{number:06}.tar", {"a.txt": b"x" * (100 + number), "a.json": b"{}", "b.txt": b"other"})
    return folder


def facts_of(folder: Path, number: int = 0) -> dict:
    reader = ShardReader(1)
    try:
        return source_facts(SourceConfig(kind=SourceKind.text, shards=folder.name), str(folder.parent), number, reader)
    finally:
        reader.close()


def test_a_copy_of_the_data_is_equal_whatever_its_times(shards: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy/text"
    shutil.copytree(shards, copied)
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    assert facts_of(copied) == facts_of(shards)
    assert facts_of(shards)["shards"] == 3


@pytest.mark.parametrize("change", ["one missing", "one renamed", "one of another size"])
def test_other_shards_have_another_digest(shards: Path, change: str) -> None:
    before = facts_of(shards)["digest"]
    if change == "one missing":
        (shards / "000002.tar").unlink()
    elif change == "one renamed":
        (shards / "000002.tar").rename(shards / "000003.tar")
    else:
        write_shard(shards / "000002.tar", {"a.txt": b"x" * 30_000})
    assert facts_of(shards)["digest"] != before


def test_each_host_reads_the_first_sample_of_another_shard_and_all_of_its_files(shards: Path) -> None:
    assert [facts_of(shards, number)["read"] for number in range(4)] == [102, 103, 104, 102]


@pytest.mark.parametrize("damage", ["truncated", "compressed", "empty", "gone"])
def test_a_shard_that_cannot_be_read_is_named(shards: Path, damage: str) -> None:
    path = shards / "000001.tar"
    if damage == "truncated":
        os.truncate(path, 600)
    elif damage == "compressed":
        path.write_bytes(b"\x1f\x8b" + bytes(100))
    elif damage == "empty":
        write_shard(path, {})
    else:
        shutil.rmtree(shards)
    with pytest.raises(DataError, match="text"):
        facts_of(shards, 1)


def tokens(first: int) -> ShardTokens:
    ones = np.array([first, 1], np.int32)
    return ShardTokens(
        sample=np.array([0, 1], np.int32), tokens=ones, short_tokens=ones, dropped_tokens=ones * 0,
        short_dropped_tokens=ones * 0, conversations=0, bad=(),
    )  # fmt: skip


def store(shards: Path, print_of: str, first: int, names: tuple[str, ...] = ("000000", "000001", "000002")) -> None:
    reader = ShardReader(1)
    for name in names:
        store_tokens(reader.stat(str(shards / f"{name}.tar")), print_of * 64, tokens(first))
    reader.close()


def test_the_index_counts_by_what_it_says_and_per_tokenizer(shards: Path, tmp_path: Path) -> None:
    assert facts_of(shards)["index"] == {}
    store(shards, "a", 5)
    indexed = facts_of(shards)["index"]
    assert list(indexed) == ["a" * 12]
    copied = tmp_path / "copy/text"
    shutil.copytree(shards, copied)
    assert facts_of(copied)["index"] == indexed
    store(shards, "b", 5)
    both = facts_of(shards)["index"]
    assert both["a" * 12] == indexed["a" * 12] and set(both) == {"a" * 12, "b" * 12}
    store(shards, "a", 6)
    assert facts_of(shards)["index"]["a" * 12] != indexed["a" * 12]


def test_an_index_of_some_shards_only_does_not_count(shards: Path) -> None:
    store(shards, "a", 5, ("000000", "000002"))
    assert facts_of(shards)["index"] == {}


def test_a_small_tokenizer_counts_by_its_contents_and_weights_by_their_size(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/tokenizer.json").write_text("abc")
    before = [tree_facts(str(tmp_path / "t"), limit)["digest"] for limit in (0, 1000)]
    (tmp_path / "t/tokenizer.json").write_text("abd")
    after = [tree_facts(str(tmp_path / "t"), limit)["digest"] for limit in (0, 1000)]
    assert before[0] == after[0] and before[1] != after[1]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        tree_facts(str(tmp_path / "nothing"), 0)


def test_a_configuration_gives_facts_of_every_source_and_input_each_failing_alone(shards: Path, tmp_path: Path) -> None:
    overrides = [
        f"data.root={shards.parent}",
        f"tokenizer.path={tmp_path / 'none'}",
        f"model.init_from={shards}",
        f"run_dir={tmp_path / 'run'}",
    ]
    facts = data_facts("examples/smoke/stage2.yaml", overrides, 0)
    assert facts["sources"]["text"]["shards"] == 3 and "digits-und" in facts["sources"]["digits-und"]["error"]
    assert (
        "does not exist" in facts["files"]["tokenizer.path"]["error"]
        and facts["files"]["model.init_from"]["files"] == 3
    )
    assert "text-val (held out)" in facts["sources"]
    with pytest.raises(ConfigError):
        data_facts("examples/smoke/stage2.yaml", ["no.such=key"], 0)
