"""hf:// shards: their addresses, who reads, and links that expire."""

from __future__ import annotations

import pytest

from jp_train.data.hub import split_hub
from jp_train.data.shards import ShardReader, expand_shards
from jp_train.errors import ConfigError, DataError
from tests.data.hub_server import REPOSITORY, TOKEN, Hub, hub_server


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants

    with hub_server() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        running.files = {"train/a b-0.tar": bytes(range(256)) * 50, "train/c.tar": b"1", "train/deep/d.tar": b"2"}
        yield running


def test_globs_folders_and_revisions_of_the_hub_name_its_files(hub: Hub):
    root = f"hf://{REPOSITORY}/"
    assert expand_shards(root + "train/*.tar") == [root + "train/a b-0.tar", root + "train/c.tar"]
    assert expand_shards(root + "train/") == expand_shards(root + "train/*.tar") == expand_shards(root + "train")
    assert expand_shards(root + "train/*/*.tar") == [root + "train/deep/d.tar"]
    assert split_hub("hf://datasets/lab/set@v1.0/a.tar") == ("datasets/lab/set@v1.0", "a.tar")
    for url in ("hf://lab/set/a.tar", "hf://datasets/lab", "hf://datasets/lab/set@/a.tar"):
        with pytest.raises(ConfigError, match="hf://datasets/OWNER/NAME"):
            split_hub(url)


def test_reads_go_where_the_hub_sends_them_until_its_link_expires_and_the_token_stays_with_it(hub: Hub):
    waits: list[float] = []
    reader = ShardReader(4, sleep=waits.append)
    url, data = f"hf://{REPOSITORY}/train/a b-0.tar", hub.files["train/a b-0.tar"]
    shard = reader.stat(url)
    assert (shard.size, shard.stamp, shard.name) == (len(data), '"v1"', "a b-0.tar")
    for offset in range(20):
        assert reader.read(shard, offset, 100) == data[offset : offset + 100]
    assert hub.links == 1 and TOKEN not in str(hub.cdn.headers)
    hub.cdn.faults = ["403"]
    assert reader.read(shard, 7, 100) == data[7:107] and hub.links == 2 and waits == []
    hub.cdn.faults = ["503", "cut"]
    assert reader.read(shard, 8, 100) == data[8:108] and waits == [0.1, 0.2]
    hub.cdn.etag = '"v2"'
    with pytest.raises(DataError, match="changed since it was indexed"):
        reader.read(shard, 0, 10)
    reader.close()


@pytest.mark.parametrize(("path", "token", "status"), [("none.tar", TOKEN, 404), ("c.tar", "hf_another", 401)])
def test_a_file_that_is_not_there_or_not_for_this_reader_is_one_error_without_the_token(
    hub: Hub, monkeypatch, path, token, status
):
    monkeypatch.setenv("HF_TOKEN", token)
    says = rf"{path}: .* after 1 tries: HTTP status {status} .*HF_TOKEN or `hf auth"
    with pytest.raises(DataError, match=says) as caught:
        ShardReader().stat(f"hf://{REPOSITORY}/train/{path}")
    assert token not in str(caught.value)
    if status == 401:
        with pytest.raises(DataError, match="cannot read its listing after 1 tries: HTTP status 401") as caught:
            expand_shards(f"hf://{REPOSITORY}/train/*.tar")
        assert token not in str(caught.value)
