from __future__ import annotations

import http.server
import io
import os
import tarfile
import threading

import numpy as np
import pytest
from data_samples import generation_samples, write_shard

from jp_train.data.shards import Shard, ShardReader, expand_shards, scan_members
from jp_train.errors import ConfigError, DataError


def _touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")


def test_braces_globs_and_folders_name_the_same_shards(tmp_path):
    _touch(tmp_path, "s-000.tar", "s-001.tar", "s-002.tar", "other.txt")
    expected = [str(tmp_path / f"s-00{n}.tar") for n in range(3)]
    assert expand_shards("s-{000..002}.tar", tmp_path) == expected
    assert expand_shards("s-*.tar", tmp_path) == expected
    assert expand_shards(".", tmp_path) == expected
    assert expand_shards(str(tmp_path), "/elsewhere") == expected
    assert expand_shards("s-00{2,0}.tar", tmp_path) == [expected[2], expected[0]]
    assert expand_shards("http://host/s-{0..1}.tar", tmp_path) == ["http://host/s-0.tar", "http://host/s-1.tar"]


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("none.tar", DataError, "does not exist"),
        ("none-*.tar", DataError, "no file matches"),
        ("empty", DataError, "holds no"),
        ("s-{000,000}.tar", DataError, "twice"),
        ("s-{000..", ConfigError, "s-{000.."),
        ("pipe:cat s-000.tar", ConfigError, "pipe"),
        ("s3://bucket/s.tar", ConfigError, "s3"),
    ],
)
def test_a_spec_that_names_no_readable_shards_is_one_clear_error(tmp_path, spec, error, says):
    _touch(tmp_path, "s-000.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error) as caught:
        expand_shards(spec, tmp_path)
    assert says in str(caught.value)


def test_members_found_by_headers_are_those_that_tarfile_extracts(tmp_path):
    samples = generation_samples(5)
    samples.append(("dir/" + "x" * 150, {"txt": b"long name", "vq.npy": b"1234"}))  # needs an extended header
    path = write_shard(tmp_path / "a.tar", samples)
    reader = ShardReader()
    shard = reader.stat(str(path))
    members = scan_members(shard, reader)
    assert members.keys == tuple(key for key, _ in samples)
    for number, (_, fields) in enumerate(samples):
        span = range(members.member_start[number], members.member_start[number + 1])
        read = {members.extensions[members.extension[m]]: reader.read(shard, int(members.offset[m]), int(members.size[m])) for m in span}
        assert read == fields
    reader.close()


def _scan(path):
    reader = ShardReader()
    try:
        return scan_members(reader.stat(str(path)), reader)
    finally:
        reader.close()


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_a_truncated_tar_is_an_error_that_names_shard_and_offset(tmp_path, kept):
    path = write_shard(tmp_path / "a.tar", generation_samples(6))
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    path.write_bytes(data[: int(end * kept)])
    with pytest.raises(DataError) as caught:
        _scan(path)
    assert str(path) in str(caught.value) and "byte" in str(caught.value)


def test_a_tar_cut_exactly_between_members_is_not_taken_for_whole(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("a", {"txt": b"x" * 512}), ("b", {"txt": b"y" * 512})])
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(DataError, match="end-of-archive"):
        _scan(path)


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = write_shard(tmp_path / "a.tar", [(name, {"txt": b"x" * 512}) for name in "abc"])
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="1024"):
        _scan(path)


def _raw_tar(path, names, content=b"data"):
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("names", "says"),
    [(["a.txt", "b.txt", "a.json"], "appears again"), (["a.txt", "a.txt"], "two .txt"), (["a.txt", "a.TXT"], "two .txt")],
)
def test_duplicated_or_interleaved_keys_are_errors(tmp_path, names, says):
    with pytest.raises(DataError, match=says):
        _scan(_raw_tar(tmp_path / "a.tar", names))


def test_links_concatenated_and_compressed_tars_are_refused(tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="link"):
        _scan(tmp_path / "link.tar")
    one = _raw_tar(tmp_path / "one.tar", ["a.txt"]).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + _raw_tar(tmp_path / "b.tar", ["b.txt"]).read_bytes())
    with pytest.raises(DataError, match="after its end-of-archive"):
        _scan(tmp_path / "two.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="compressed"):
        _scan(tmp_path / "z.tar")
    (tmp_path / "garbage.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(DataError, match="corrupt"):
        _scan(tmp_path / "garbage.tar")


def test_names_that_climb_out_of_a_folder_are_keys_and_touch_no_file(tmp_path):
    members = _scan(_raw_tar(tmp_path / "a.tar", ["../../etc/x.txt", ".hidden", "noextension"]))
    assert members.keys == ("../../etc/x",)
    assert [name for name, _ in members.ignored] == [".hidden", "noextension"]
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]


def test_a_passing_io_error_is_retried_with_back_off_and_a_lasting_one_stops(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(range(100)))
    waits: list[float] = []
    reader = ShardReader(retries=4, sleep=waits.append)
    shard = reader.stat(str(path))
    real, failures = os.pread, [3]

    def flaky(descriptor, size, offset):
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    assert reader.read(shard, 10, 5) == bytes(range(10, 15))
    assert waits == [0.1, 0.2, 0.4]
    failures[0] = 99
    with pytest.raises(DataError, match="after 4 tries.*never skipped"):
        reader.read(shard, 10, 5)


def test_reading_past_the_end_or_from_a_changed_file_is_an_error(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 50)
    reader = ShardReader()
    shard = reader.stat(str(path))
    with pytest.raises(DataError, match="truncated"):
        reader.read(shard, 40, 20)
    with pytest.raises(DataError, match="changed since"):
        ShardReader().read(Shard(path=str(path), size=51, stamp=shard.stamp), 0, 1)


def test_open_descriptors_are_bounded_and_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("jp_train.data.shards.MAX_OPEN_SHARDS", 3)
    reader = ShardReader()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(8):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes([number]) * 4)
        assert reader.read(reader.stat(str(path)), 1, 2) == bytes([number]) * 2
    assert len(os.listdir("/proc/self/fd")) == before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


class _RangeHandler(http.server.BaseHTTPRequestHandler):
    content = b""
    ranges = True
    busy = 0

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(200, self.content, body=False)

    def do_GET(self):
        if type(self).busy:
            type(self).busy -= 1
            self.send_error(503)
            return
        asked = self.headers.get("Range")
        if asked and self.ranges:
            first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            self._answer(206, self.content[first : last + 1])
        else:
            self._answer(200, self.content)

    def _answer(self, status, data, body=True):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", '"v1"')
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def server():
    handler = type("Handler", (_RangeHandler,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield handler, f"http://127.0.0.1:{running.server_port}/a.tar"
        running.shutdown()


def test_http_shards_scan_and_read_like_local_ones(tmp_path, server):
    handler, url = server
    path = write_shard(tmp_path / "a.tar", generation_samples(4))
    handler.content = path.read_bytes()
    handler.busy = 2
    reader = ShardReader(sleep=lambda seconds: None)
    shard = reader.stat(url)
    assert shard.name == "a.tar" and shard.size == len(handler.content)
    remote, local = scan_members(shard, reader), _scan(path)
    assert remote.keys == local.keys
    np.testing.assert_array_equal(remote.offset, local.offset)
    assert reader.read(shard, 5, 100) == handler.content[5:105]


def test_a_server_without_ranges_is_refused_at_once(server):
    handler, url = server
    handler.content = b"x" * 100
    reader = ShardReader(sleep=lambda seconds: pytest.fail("no retry expected"))
    shard = reader.stat(url)
    handler.ranges = False
    with pytest.raises(DataError, match="status 200 instead of 206"):
        reader.read(shard, 1, 2)
