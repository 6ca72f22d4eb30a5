"""Which tars a SOURCE names, and which of them have to be copied."""

from __future__ import annotations

import gzip
import hashlib
import sys

import pytest
import zstandard

from jp_train.data.shards import ShardReader
from jp_train.data.sidecar import load_members
from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.tars import check_tar, command_words, copy_tar, find_tars
from jp_train.types import Kind
from tests.data.data_samples import text_samples, write_shard


def test_plain_tars_stay_and_compressed_ones_are_copied(tmp_path):
    plain = write_shard(tmp_path / "plain" / "a.tar", text_samples(2))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    tars = find_tars(str(tmp_path / "plain"), allow_pipe=False)
    assert (tars.names, tars.copies, tars.spec) == ((str(plain),), False, str(tmp_path / "plain"))
    packed = find_tars(str(tmp_path / "packed"), allow_pipe=False)
    assert packed.names == (str(tmp_path / "packed" / "a.tar.gz"),) and packed.copies
    digest = hashlib.sha256((tmp_path / "packed" / "a.tar.gz").read_bytes()).hexdigest()
    assert digest in packed.identity[packed.names[0]], "a changed file is noticed on resume"


def test_a_command_for_every_brace_and_never_a_shell():
    tars = find_tars("pipe:cat a-{0..2}.tar", allow_pipe=True)
    assert tars.names == ("pipe:cat a-0.tar", "pipe:cat a-1.tar", "pipe:cat a-2.tar") and tars.copies
    assert command_words("pipe:aws s3 cp 's3://b/a b.tar' -") == ["aws", "s3", "cp", "s3://b/a b.tar", "-"]
    for command, problem in (("cat a | gzip", "needs a shell"), ("", "names no command"), ("cat 'a", "No closing")):
        with pytest.raises(ConfigError, match=problem):
            command_words(f"pipe:{command}")
    with pytest.raises(ConfigError, match="give --allow-pipe"):
        find_tars("pipe:cat a.tar", allow_pipe=False)
    with pytest.raises(ConfigError, match="mixes commands and paths"):
        find_tars("{pipe:cat a.tar,b.tar}", allow_pipe=True)


def test_sources_that_cannot_be_imported_are_named_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="holds no"):
        find_tars(str(tmp_path), allow_pipe=False)
    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"pip install 'jp_train\[zstd\]'"):
        find_tars(str(tmp_path), allow_pipe=False)
    write_shard(tmp_path / "b.tar", text_samples(1))
    with pytest.raises(ConfigError, match=r"plain tars \(b.tar\) and compressed ones \(a.tar.zst\)"):
        find_tars(str(tmp_path), allow_pipe=False)
    with pytest.raises(ConfigError, match="write ranges as"):
        find_tars("a-{0..2.tar", allow_pipe=False)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_copy_is_the_decompressed_tar_with_its_digest_and_its_members(tmp_path, compress):
    plain = write_shard(tmp_path / "plain.tar", text_samples(3)).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(compress(plain))
    (tmp_path / "out").mkdir()
    checked = copy_tar(str(tmp_path / "a.tar.gz"), tmp_path / "out", 7, Kind.TEXT)
    assert checked.written is not None and checked.written.sha256 == hashlib.sha256(plain).hexdigest()
    assert (checked.written.name, checked.written.samples, checked.entries, checked.bad) == ("000007.tar", 3, 3, ())
    copy = tmp_path / "out" / "000007.tar"
    members = load_members(ShardReader().stat(str(copy)))
    assert copy.read_bytes() == plain and members is not None and len(members.keys) == 3
    assert check_tar(str(copy), Kind.TEXT).entries == 3


def test_a_corrupt_copy_leaves_nothing_and_names_its_source(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"no tar" * 1000))
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"a\.tar\.gz: .*its content"):
        copy_tar(str(tmp_path / "a.tar.gz"), tmp_path / "out", 0, Kind.TEXT)
    assert list((tmp_path / "out").iterdir()) == []
