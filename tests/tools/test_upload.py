"""What a command wrote, copied into a real S3 store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.cli.main import main
from jp_train.data.shards import ShardReader, expand_shards
from jp_train.errors import ConfigError, DataError
from jp_train.model.weight_files import open_weights
from jp_train.tools.upload import Upload
from tests.data.store_server import BUCKET, SECRET, StoreServer
from tests.tools.importers.import_layouts import text_jsonl
from tests.tools.test_inference import exported, small_model


def whole(url: str) -> bytes:
    reader = ShardReader()
    shard = reader.stat(url)
    return reader.read(shard, 0, shard.size)


def test_an_import_is_copied_and_its_recipe_names_the_copy(tmp_path: Path, store: StoreServer, capsys) -> None:
    source, out, url = text_jsonl(tmp_path / "in").source, tmp_path / "texts", f"s3://{BUCKET}/imports"
    words = ["data", "import", "text", str(source), str(out), "--shard-samples", "4", "--upload", f"{url}/", "--json"]
    assert main(words) == 0
    summary = json.loads(capsys.readouterr().out)
    (given,) = summary["sources"]
    shards = sorted(out.glob("*.tar"))
    assert len(shards) == 3 and expand_shards(given["spec"]) == [f"{url}/texts/{path.name}" for path in shards]
    assert given["spec"] in summary["recipe"] and str(tmp_path) not in summary["recipe"]
    for path in (*shards, out / "manifest.json", out / "skipped.jsonl"):
        assert whole(f"{url}/texts/{path.name}") == path.read_bytes()
    before = len(store.requests)
    assert main([*words[:-1], "--dry-run", "--json"]) == 0 and len(store.requests) == before


def test_an_export_is_copied_with_its_configuration_last(tmp_path: Path, store: StoreServer) -> None:
    source, out = exported(small_model(tmp_path), tmp_path / "run" / "export"), tmp_path / "exported"
    assert main(["export", str(source), str(out), "--upload", f"s3://{BUCKET}"]) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert open_weights(out).keys()
    for path in files:
        assert whole(f"s3://{BUCKET}/exported/{path.relative_to(out)}") == path.read_bytes()
    puts = [request for request in store.requests if request.startswith("PUT")]
    assert len(puts) == len(files) and puts[-1].endswith("/exported/config.json")


def test_a_store_that_is_not_there_is_an_error_before_the_work_and_a_passing_fault_is_none(
    tmp_path: Path, store: StoreServer
) -> None:
    with pytest.raises(ConfigError, match=r"--upload 'runs/x': expected s3://"):
        Upload("runs/x")
    with pytest.raises(DataError, match="--upload s3://no-such-bucket: the store cannot be listed: .*NoSuchBucket"):
        Upload("s3://no-such-bucket")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.bin").write_bytes(b"1" * 100_000)
    for name in (".hidden", "000000.tar.jp-members.npz"):
        (tmp_path / "folder" / name).touch()
    upload = Upload(f"s3://{BUCKET}/faults")
    store.faults[:] = ["503", "reset"]
    assert upload.copy(tmp_path / "folder") == f"s3://{BUCKET}/faults/folder"
    assert whole(f"s3://{BUCKET}/faults/folder/a.bin") == b"1" * 100_000
    assert [request for request in store.requests if request.startswith("PUT") and "a.bin" not in request] == []
    store.faults[:] = ["403"]
    with pytest.raises(DataError, match="cannot copy .*a.bin to .*403 Forbidden ExpiredToken.*stays in") as caught:
        upload.copy(tmp_path / "folder")
    assert SECRET not in str(caught.value)
