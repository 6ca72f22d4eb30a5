from __future__ import annotations

import pickle
import threading
import time

import numpy as np
import pytest

from jp_train.config.schema import Crop, SourceConfig, SourceKind
from jp_train.data import http_ranges
from jp_train.data.field_map import field_map
from jp_train.data.sample_fields import read_fields
from jp_train.data.shards import ShardReader, expand_shards, scan_members
from jp_train.errors import ConfigError, DataError
from tests.data.data_samples import generation_samples, write_shard
from tests.data.range_server import range_server


@pytest.fixture
def server(noise):
    with range_server() as running:
        running.content["/a.tar"] = noise
        yield running


def test_http_shards_scan_and_read_like_local_ones(tmp_path, server, reader):
    path = write_shard(tmp_path / "a.tar", generation_samples(4))
    server.content["/a%20b.tar"] = path.read_bytes()
    shard, local = reader.stat(f"{server.url}/a b.tar"), reader.stat(str(path))
    assert shard.name == "a b.tar" and shard.size == local.size and shard.stamp == '"v1"'
    remote, here = scan_members(shard, reader), scan_members(local, reader)
    assert remote.keys == here.keys
    np.testing.assert_array_equal(remote.offset, here.offset)
    before = server.requests
    crop, fields = Crop.centre, field_map(SourceConfig(kind=SourceKind.generation))
    theirs = read_fields(shard, remote, 2, fields, crop, reader, "s")
    assert theirs.fields == read_fields(local, here, 2, fields, crop, reader, "s").fields
    assert server.requests == before + 1  # the files of a sample lie together: one request


PASSING = ("503", "429", "cut", "short", "reset", "early reset", "wrong range", "no range header", "too much")


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_of_the_server_is_retried_and_the_bytes_are_right(server, reader, waits, fault):
    shard = reader.stat(f"{server.url}/a.tar")
    server.faults = [fault, fault]
    assert reader.read(shard, 1000, 200_000) == server.content["/a.tar"][1000:201_000]
    if fault == "early reset":  # on a kept connection the first one is taken for an idle connection that was closed
        assert waits == [0.1]
    else:
        assert waits == [0.1, 0.2]
    assert server.requests == 3
    assert reader.read(shard, 5, 7) == server.content["/a.tar"][5:12]  # the connection is sound afterwards


@pytest.mark.parametrize("fault", PASSING)
def test_a_lasting_fault_stops_after_the_tries_and_names_shard_range_and_cause(server, reader, waits, fault):
    shard = reader.stat(f"{server.url}/a.tar")
    server.faults = [fault] * 9
    with pytest.raises(DataError, match=r"a\.tar: cannot read bytes 10 to 5010 after 4 tries: \S+.*never skipped"):
        reader.read(shard, 10, 5000)
    assert len(waits) == 3 and server.requests == (5 if fault == "early reset" else 4)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no ranges", "status 200 instead of 206"),
        ("404", "404"),
        ("416", "416"),
        ("other size", "changed since"),
        ("gzip", "Content-Encoding"),
    ],
)
def test_an_answer_that_will_not_change_stops_at_once(server, reader, waits, fault, says):
    shard = reader.stat(f"{server.url}/a.tar")
    server.faults = [fault] * 9
    with pytest.raises(DataError, match=says):
        reader.read(shard, 10, 5000)
    assert waits == [] and server.requests == 1


def test_a_shard_that_changes_under_way_stops_the_read(server, reader, waits):
    shard = reader.stat(f"{server.url}/a.tar")
    reader.read(shard, 0, 10)
    server.etag = '"v2"'
    with pytest.raises(DataError, match=r"changed since it was indexed \('\"v1\"' became '\"v2\"'\)"):
        reader.read(shard, 0, 10)
    assert waits == []


@pytest.mark.parametrize("fault", ["dribble", "dribbled head"])
def test_a_slow_dribble_is_bounded_by_the_time_of_the_whole_read(server, waits, monkeypatch, fault):
    reader = ShardReader(retries=2, sleep=waits.append)
    shard = reader.stat(f"{server.url}/a.tar")
    monkeypatch.setattr(http_ranges, "HTTP_TIMEOUT_S", 0.4)
    server.faults = [fault, fault]
    started = time.monotonic()
    with pytest.raises(DataError, match="too slow|timed out"):
        reader.read(shard, 0, 5000)  # 100 s at this rate, each byte well within the socket's time-out
    assert time.monotonic() - started < 20
    monkeypatch.undo()
    assert reader.read(shard, 0, 5000) == server.content["/a.tar"][:5000]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.tar", "data:text/plain,hello"])
def test_a_redirect_to_another_scheme_is_refused(server, reader, waits, target):
    shard = reader.stat(f"{server.url}/a.tar")
    server.faults, server.location = ["redirect"] * 9, target
    with pytest.raises(DataError, match="only http and https are followed"):
        reader.read(shard, 0, 10)
    assert waits == []


@pytest.mark.parametrize(
    "target",
    ["http://[::1/a.tar", "http://127.0.0.1:99999999/a.tar", "http://127.0.0.1:x/a.tar", "http://" + "é" * 80 + "/"],
)
def test_a_redirect_to_what_is_no_url_is_an_error_of_the_data(server, reader, target):
    shard = reader.stat(f"{server.url}/a.tar")
    server.faults, server.location = ["redirect"] * 9, target
    with pytest.raises(DataError, match=r"a\.tar|é"):
        reader.read(shard, 0, 10)


@pytest.mark.parametrize("length", ["\u00b2", "9" * 5000, "-1", "0x10", ""])
def test_a_length_that_is_no_number_is_an_error_of_the_data(server, reader, length):
    server.length = length
    with pytest.raises(DataError, match="no usable Content-Length"):
        reader.stat(f"{server.url}/a.tar")


def test_redirects_are_followed_to_http_and_bounded(server, reader):
    shard = reader.stat(f"{server.url}/a.tar")
    server.content["/b.tar"] = server.content["/a.tar"]
    server.faults, server.location = ["redirect"] * 3, "/b.tar"
    assert reader.read(shard, 3, 10) == server.content["/a.tar"][3:13]
    server.faults = ["redirect"] * 99
    with pytest.raises(DataError, match="more than 5 redirects"):
        reader.read(shard, 3, 10)
    with pytest.raises(DataError, match="never from https to http"):
        http_ranges._redirected("https://a/x.tar", "https://a/x.tar", "http://a/x.tar")


def test_connections_are_kept_and_one_that_the_server_closed_is_no_fault(server, reader, waits):
    shard = reader.stat(f"{server.url}/a.tar")
    for offset in range(20):
        reader.read(shard, offset * 1000, 500)
    assert server.connections == 1
    server.faults = ["idle close", "", "idle close"]
    for offset in range(4):
        assert reader.read(shard, offset, 500) == server.content["/a.tar"][offset : offset + 500]
    assert server.connections <= 3 and waits == []


def test_threads_read_beside_each_other_on_connections_of_their_own(server, reader):
    shard = reader.stat(f"{server.url}/a.tar")
    pickle.loads(pickle.dumps(reader)).close()
    wrong = []

    def read(seed: int) -> None:
        for offset in np.random.default_rng(seed).integers(0, 290_000, 20).tolist():
            if reader.read(shard, offset, 5000) != server.content["/a.tar"][offset : offset + 5000]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and server.connections == 5


def test_a_proxy_of_the_environment_is_asked_for_the_whole_url(server, reader, monkeypatch):
    server.content["http://shards.example:81/a.tar?x=1"] = b"0123456789"
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    shard = reader.stat("http://shards.example:81/a.tar?x=1")
    assert (shard.size, reader.read(shard, 2, 3)) == (10, b"234")


def test_a_missing_shard_is_named_and_a_pipe_is_never_run(server, reader, tmp_path):
    with pytest.raises(DataError, match=r"none\.tar.*404"):
        reader.stat(f"{server.url}/none.tar")
    for spec in (f"pipe:touch {tmp_path}/owned", "file:///etc/passwd", "ftp://host/a.tar"):
        with pytest.raises(ConfigError, match=r"not supported.*pipe: would run a command.*local path or an http"):
            expand_shards(spec)
    assert not (tmp_path / "owned").exists()
