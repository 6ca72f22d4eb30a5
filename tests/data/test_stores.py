"""Shards in object stores: a real S3 server (store_server.py), its faults, and the Hugging Face Hub's addresses."""

from __future__ import annotations

import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import numpy as np
import obstore
import pytest

from jp_train.config.schema import Crop, SourceConfig, SourceKind
from jp_train.data import stores
from jp_train.data.field_map import field_map
from jp_train.data.sample_fields import read_fields
from jp_train.data.shards import ShardReader, expand_shards, scan_members
from jp_train.errors import ConfigError, DataError
from tests.data.data_samples import generation_samples, write_shard
from tests.data.local_server import Handler, serving
from tests.data.store_server import BUCKET, KEY, SECRET
from tests.data.test_loader import take, tensors_hash


def put(name: str, data: bytes) -> str:
    """An object of the bucket; returns its URL."""
    obstore.put(stores._open_store(f"s3://{BUCKET}"), name, data)
    return f"s3://{BUCKET}/{name}"


def test_shards_of_a_store_scan_and_read_like_local_ones(tmp_path, store, reader):
    path = write_shard(tmp_path / "a.tar", generation_samples(4))
    url = put("like/a b#1.tar", path.read_bytes())
    shard, local = reader.stat(url), reader.stat(str(path))
    assert shard.name == "a b#1.tar" and shard.size == local.size and shard.stamp.startswith('"')
    remote, here = scan_members(shard, reader), scan_members(local, reader)
    assert remote.keys == here.keys
    np.testing.assert_array_equal(remote.offset, here.offset)
    before = len(store.requests)
    crop, fields = Crop.centre, field_map(SourceConfig(kind=SourceKind.generation))
    theirs = read_fields(shard, remote, 2, fields, crop, reader, "s")
    assert theirs.fields == read_fields(local, here, 2, fields, crop, reader, "s").fields
    assert len(store.requests) == before + 1  # the files of a sample lie together: one request
    assert pickle.loads(pickle.dumps(reader)).read(shard, 0, 512) == path.read_bytes()[:512]


def test_braces_globs_and_folders_of_a_store_name_what_local_ones_do(tmp_path, store):
    for name in ("x/a-0.tar", "x/a-1.tar", "x/b.tar", "x/notes.txt", "x/deep/c.tar", "xy/a-0.tar"):
        put(f"named/{name}", b"12345")
        (tmp_path / "named" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "named" / name).touch()
    root = f"s3://{BUCKET}/"
    for spec in ("x/a-{0..1}.tar", "x/*.tar", "x", "x/", "*/a-[0-9].tar", "x/{b,a-0}.tar"):
        spec = f"named/{spec}"
        expected = [os.path.relpath(path, tmp_path) for path in expand_shards(spec, tmp_path)]
        assert expand_shards(root + spec) == [root + path for path in expected], spec
    before = len(store.requests)
    assert len(expand_shards(f"{root}far/{{00000..09999}}.tar")) == 10_000
    assert len(store.requests) == before  # names that are given are not listed
    for spec in ("named/none/", "named/x/*.tgz"):
        with pytest.raises(DataError, match="no object matches"):
            expand_shards(root + spec)


PASSING = ("503", "429", "500", "cut", "short", "reset", "early reset")


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_of_the_store_is_retried_and_the_bytes_are_right(store, reader, waits, noise, fault):
    shard = reader.stat(put("a.tar", noise))
    store.faults[:], before = [fault, fault], len(store.requests)
    assert reader.read(shard, 1000, 200_000) == noise[1000:201_000]
    assert waits == [0.1, 0.2] and len(store.requests) == before + 3
    assert reader.read(shard, 5, 7) == noise[5:12]


@pytest.mark.parametrize("fault", PASSING)
def test_a_lasting_fault_stops_after_the_tries_and_names_shard_range_and_cause(store, reader, waits, noise, fault):
    shard = reader.stat(put("a.tar", noise))
    store.faults[:] = [fault] * 4
    says = r"a\.tar: cannot read bytes 10 to 5010 after 4 tries: \S+.*never skipped"
    with pytest.raises(DataError, match=says) as caught:
        reader.read(shard, 10, 5000)
    assert len(waits) == 3 and not store.faults and SECRET not in str(caught.value)


@pytest.mark.parametrize("fault", ["slow", "silent"])
def test_a_store_that_is_too_slow_is_given_up_after_its_time_and_asked_again(store, waits, noise, monkeypatch, fault):
    url = put("a.tar", noise)
    monkeypatch.setattr(stores, "HTTP_TIMEOUT_S", 0.5)
    monkeypatch.setattr(stores, "PIECE", 64 << 10)
    reader = ShardReader(retries=2, sleep=waits.append)
    shard = reader.stat(url)
    store.faults[:], started = [fault], time.monotonic()
    assert reader.read(shard, 1, 60_000) == noise[1:60_001]
    assert waits == [0.1] and time.monotonic() - started < 20
    store.faults[:] = [fault, fault]
    with pytest.raises(DataError, match="a.tar: cannot read bytes .* too slow"):
        reader.read(shard, 0, 60_000)


def test_a_long_read_is_several_requests_with_the_same_bytes(store, reader, noise, monkeypatch):
    shard = reader.stat(put("a.tar", noise))
    monkeypatch.setattr(stores, "PIECE", 64 << 10)
    before = len(store.requests)
    assert reader.read(shard, 3, 200_000) == noise[3:200_003] and len(store.requests) == before + 4


def test_an_object_that_changes_under_way_stops_the_read(store, reader, waits, noise):
    shard = reader.stat(put("changes.tar", noise))
    reader.read(shard, 0, 10)
    put("changes.tar", noise[::-1])
    with pytest.raises(DataError, match=r"changes\.tar changed since it was indexed .*start again"):
        reader.read(shard, 0, 10)
    assert waits == []


@pytest.mark.parametrize(
    ("url", "variables", "says"),
    [
        (f"s3://{BUCKET}/none.tar", {}, "404 Not Found NoSuchKey"),
        ("s3://no-such-bucket/a.tar", {}, "404 Not Found NoSuchBucket"),
        (f"s3://{BUCKET}/a.tar", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "403 Forbidden SignatureDoesNotMatch .*AWS_"),
        (f"s3://{BUCKET}/a.tar", {"AWS_ACCESS_KEY_ID": "AKIANOBODY"}, "403 Forbidden InvalidAccessKeyId .*AWS_"),
    ],
)
def test_what_will_not_change_is_one_error_at_once_that_names_it_and_no_secret(
    store, reader, waits, monkeypatch, noise, url, variables, says
):
    put("a.tar", noise)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=f"{url}: cannot read its size after 1 tries: HTTP status {says}") as caught:
        reader.stat(url)
    told = str(caught.value)
    if "NoSuchKey" not in says:
        with pytest.raises(DataError, match=f"cannot read its listing after 1 tries: HTTP status {says}") as caught:
            reader.expand(url.replace("a.tar", "*.tar"))
        told += str(caught.value)
    assert waits == [] and not any(secret in told for secret in (KEY, SECRET, "AKIANOBODY", "Signature="))


def test_keys_come_from_the_profile_files_where_the_environment_has_none(store, reader, monkeypatch, noise, tmp_path):
    url = put("a.tar", noise)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        f"[other]\naws_access_key_id = x\naws_secret_access_key = y\n[default]\naws_access_key_id = {KEY}\n"
        f"aws_secret_access_key = {SECRET}\n"
    )
    assert reader.stat(url).size == len(noise)
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(DataError, match="403 Forbidden InvalidAccessKeyId"):
        ShardReader(1).stat(url)
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(DataError, match="profile .*absent"):
        ShardReader(1).stat(url)


class _Role(Handler):
    """The service of a host that gives the keys of its role, to be renewed at every request."""

    state: threading.Event
    """Set: it does not answer."""

    def _give(self) -> None:
        if self.state.is_set():
            self.close_connection = True
            return
        keys = {"Code": "Success", "Type": "AWS-HMAC", "Token": "", "AccessKeyId": KEY, "SecretAccessKey": SECRET}
        times = {"LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2026-01-01T00:00:01Z"}
        names = {"token": "a token", "security-credentials": "role"}
        answer = names.get(self.path.rstrip("/").rpartition("/")[2], json.dumps(keys | times)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = _give  # noqa: N815 - names of the standard library


def test_missing_credentials_are_an_error_at_once_and_those_that_cannot_be_renewed_are_awaited(
    store, reader, waits, monkeypatch, noise
):
    url = put("a.tar", noise)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    silent = threading.Event()
    with serving(_Role, silent) as address:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", address)
        shard = reader.stat(url)
        assert reader.read(shard, 3, 7) == noise[3:10]
        silent.set()
        time.sleep(0.2)  # obstore asks again only 0.1 s after it asked
        with pytest.raises(DataError, match="cannot read bytes 3 to 10 after 4 tries: no credentials that work"):
            reader.read(shard, 3, 7)
        assert waits == [0.1, 0.2, 0.4]
        with pytest.raises(DataError, match="cannot read bytes 3 to 10 after 1 tries: no credentials that work"):
            ShardReader(sleep=waits.append).read(shard, 3, 7)
        assert len(waits) == 3


def test_a_url_with_credentials_and_a_missing_package_are_errors_that_say_what_to_do(store, monkeypatch):
    for url in (f"s3://{KEY}:{SECRET}@{BUCKET}/a/", "az://account:key@container/*.tar"):
        with pytest.raises(ConfigError, match="never from a URL") as caught:
            expand_shards(url)
        assert SECRET not in str(caught.value)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'jp_train\[cloud\]'"):
        expand_shards(f"s3://{BUCKET}/a/")


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_from_a_store_are_bit_identical_to_rows_from_disk(mixed, tokenizer, store, tmp_path, monkeypatch, workers):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cfg = mixed()
    expected = [tensors_hash(step.micro_batches) for step in take(cfg, tokenizer)]
    for source in cfg.data.sources.values():
        for path in expand_shards(source.shards, cfg.data.root):
            put(f"rows/{Path(path).name}", Path(path).read_bytes())
        source.shards = f"s3://{BUCKET}/rows/{source.shards}"
    if workers:
        cfg.data.index_dir = str(tmp_path / "index")
    assert [tensors_hash(step.micro_batches) for step in take(cfg, tokenizer, workers=workers)] == expected
    where = tmp_path / ("index" if workers else "cache/jp_train/index")
    assert len(list(where.rglob("*.jp-tokens-*.npz"))) >= len(cfg.data.sources)


@pytest.mark.parametrize(
    ("url", "variables", "says"),
    [
        ("az://container/a.tar", {}, r"Account must be specified \(settings come from AZURE_\.\.\. variables"),
        (
            "gs://bucket/a.tar",
            {"GOOGLE_APPLICATION_CREDENTIALS": "/none.json"},
            r"/none\.json.*GOOGLE_\.\.\. variables",
        ),
        ("s3://bucket/a//b.tar", {}, "a//b.tar: .*empty path segment"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_error_that_names_its_settings(
    reader, waits, monkeypatch, url, variables, says
):
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=says):
        reader.stat(url)
    assert waits == []
