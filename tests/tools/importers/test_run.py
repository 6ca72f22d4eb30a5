"""An import that is killed anywhere goes on without a duplicate or a hole; one whose source changed does not go on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jp_train.data.writer import ShardWriter
from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.documents import text_reader
from jp_train.tools.importers.manifest import load_manifest, locked
from jp_train.tools.importers.records import Columns, RecordReader, record_reader
from tests.tools.importers.import_layouts import (
    contents,
    conversations,
    dump,
    image_folder,
    image_name,
    imagenet,
    pairs_csv,
    parquet,
    run,
    samples_in,
    skipped_in,
    text_jsonl,
)


def run_and_kill(reader, out: Path, at: int, **settings) -> bool:
    """Import in a forked process that gets SIGKILL just before its `at`-th sync or rename, or in the middle of its
    `at`-th write; returns whether it came to that."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            left = at

            def count() -> bool:
                nonlocal left
                left -= 1
                return left == 0

            def deadly(original):
                def call(*args):
                    if count():
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args)

                return call

            put = ShardWriter._put

            def deadly_put(self, data):
                if count():
                    put(self, data[: len(data) // 2])
                    self._file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                put(self, data)

            os.fsync, os.replace, ShardWriter._put = deadly(os.fsync), deadly(os.replace), deadly_put
            run(reader, out, **settings)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def folders(tmp: Path, name: str) -> dict:
    return {"out": tmp / name, "text_out": tmp / f"{name}-text"}


def spoiled(tmp: Path):
    """Conversations with and without images, in turns, two of them bad."""
    reader = conversations(tmp / "in", count=8, texts=3)
    (tmp / "in" / "images" / image_name(4)).unlink()
    (tmp / "in" / "images" / image_name(7)).write_bytes(b"no image")
    return reader


def test_killed_at_any_moment_it_resumes_to_the_bytes_of_an_undisturbed_import(tmp_path):
    reader = spoiled(tmp_path)
    bounds = {"shard_samples": 3}
    run(reader, **folders(tmp_path, "whole"), **bounds)
    whole = contents(*folders(tmp_path, "whole").values())
    assert len(whole) == 2 + 1 + 1, "two shards of images, one of texts, and what was skipped"
    at = 1
    while run_and_kill(reader, at=at, **folders(tmp_path, f"k{at}"), **bounds):
        run(reader, **folders(tmp_path, f"k{at}"), **bounds)
        assert contents(*folders(tmp_path, f"k{at}").values()) == whole, f"killed at event {at}"
        at += 1
    assert at > 25, "every sync, rename and write was a moment to be killed at"


@pytest.mark.parametrize("patience", [17, 23])
def test_killed_again_and_again_it_still_finishes_with_the_same_bytes(tmp_path, patience):
    reader = spoiled(tmp_path)
    run(reader, **folders(tmp_path, "whole"), shard_samples=2)
    kills = 0
    while run_and_kill(reader, at=patience, **folders(tmp_path, "again"), shard_samples=2):
        kills += 1
        assert kills < 50, "it makes no progress"
    assert kills >= 2
    assert contents(*folders(tmp_path, "again").values()) == contents(*folders(tmp_path, "whole").values())


@pytest.mark.parametrize("make", [imagenet, pairs_csv, text_jsonl, parquet], ids=lambda make: make.__name__)
def test_every_layout_resumes_in_the_middle(make, tmp_path):
    reader = make(tmp_path / "in")
    run(reader, tmp_path / "whole", shard_samples=2)
    assert run_and_kill(reader, tmp_path / "killed", at=20, shard_samples=2)
    assert 0 < len(load_manifest(tmp_path / "killed").outputs["shards"].shards) < 5
    run(reader, tmp_path / "killed", shard_samples=2)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("killed", "whole")]
    for manifest in manifests:
        manifest["outputs"]["shards"]["folder"] = ""
    assert manifests[0] == manifests[1]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[RecordReader, Path, Path]:
    """A listing long enough to need processes: 3,000 records of 12 images, some bad; and its import by one
    process."""
    tmp = tmp_path_factory.mktemp("large")
    images = image_folder(tmp / "images", 12)
    (images / image_name(5)).write_bytes(b"")
    records = [{"image": image_name(n % 12), "caption": f"caption {n}"} for n in range(3000)]
    path = tmp / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    reader = record_reader("pairs", path, images, "generation", Columns())
    run(reader, tmp / "one", shard_samples=100)
    return reader, tmp / "one", tmp


def test_killed_from_outside_with_processes_at_work_it_resumes_and_leaves_no_process(large):
    reader, whole, tmp = large
    out = tmp / "killed"
    words = [
        "data",
        "import",
        "pairs",
        str(reader.source),
        str(out),
        "--images",
        str(reader.images),
        "--kind",
        "generation",
    ]
    command = [sys.executable, "-m", "jp_train", *words, "--shard-samples", "100", "--processes", "2", "--decode"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not (out / "000002.tar").exists():
        time.sleep(0.001)
    children = _session(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was still at work"
    assert len(children) >= 3, "processes were at work"
    end = time.monotonic() + 30
    while _session(process.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _session(process.pid), "no worker outlives the import"
    run(reader, out, shard_samples=100, decode=True)
    assert contents(out) == contents(whole)


def _session(leader: int) -> list[int]:
    """Processes of a session that are alive."""
    numbers = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and int(fields[3]) == leader and fields[0] != "Z":
            numbers.append(int(entry.name))
    return numbers


def test_two_processes_write_the_bytes_of_a_single_process(large):
    reader, whole, tmp = large
    run(reader, tmp / "two", shard_samples=100, processes=2)
    assert contents(tmp / "two") == contents(whole)
    assert len(samples_in(whole)) == 2750


def test_a_changed_source_is_refused_and_the_change_is_named(tmp_path):
    reader = text_jsonl(tmp_path / "in")
    run(reader, tmp_path / "text", shard_samples=2)
    with open(reader.source, "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(
        ConfigError,
        match=r"import that is complete, but of something else: source: text.jsonl was .*sha256.*, is .*sha256",
    ):
        run(reader, tmp_path / "text", shard_samples=2)
    folder = imagenet(tmp_path / "i")
    assert run_and_kill(folder, tmp_path / "net", at=20, shard_samples=2)
    victim = next((tmp_path / "i" / "train" / "n00000001").iterdir())
    victim.rename(victim.with_name("other.JPEG"))
    with pytest.raises(
        ConfigError,
        match="interrupted, but of something else: source: class folder n00000001 was 3 files.*delete what it wrote: ",
    ):
        run(folder, tmp_path / "net", shard_samples=2)
    table = parquet(tmp_path / "p")
    run(table, tmp_path / "rows")
    (tmp_path / "p" / "part-0.parquet").rename(tmp_path / "p" / "part-2.parquet")
    with pytest.raises(
        ConfigError, match="source: part-0.parquet was .* rows.*is absent; source: part-2.parquet was absent"
    ):
        run(table, tmp_path / "rows")


def test_a_changed_option_is_refused_and_named_but_the_number_of_processes_is_free(tmp_path):
    reader = pairs_csv(tmp_path / "in")
    run(reader, tmp_path / "out", shard_samples=4)
    run(reader, tmp_path / "out", shard_samples=4, processes=2)
    for change, name in (
        ({"shard_samples": 5}, "shard_samples was 4, is 5"),
        ({"decode": True}, "decode was False, is True"),
    ):
        with pytest.raises(ConfigError, match=f"option {name}"):
            run(reader, tmp_path / "out", **{"shard_samples": 4, **change})
    other = pairs_csv(tmp_path / "in", kind="understanding", caption="ask")
    with pytest.raises(
        ConfigError, match="option columns was .*'caption'.*option kind was generation, is understanding"
    ):
        run(other, tmp_path / "out", shard_samples=4)
    with pytest.raises(ConfigError, match="folder of text was absent"):
        run(reader, tmp_path / "out", shard_samples=4, text_out=tmp_path / "t")


def test_an_import_that_wrote_no_shard_does_not_block_the_corrected_command(tmp_path):
    images = image_folder(tmp_path / "images", 3)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"image": image_name(n), "caption": "c"}) + "\n" for n in range(3)))
    (tmp_path / "empty").mkdir()
    wrong = record_reader("pairs", path, tmp_path / "empty", "generation", Columns())
    with pytest.raises(DataError, match="no entry of .* became a sample .3 skipped"):
        run(wrong, tmp_path / "out")
    run(record_reader("pairs", path, images, "generation", Columns()), tmp_path / "out")
    assert len(samples_in(tmp_path / "out")) == 3 and not skipped_in(tmp_path / "out")
    with pytest.raises(ConfigError, match="option images was"):
        run(wrong, tmp_path / "out")


def test_shards_of_somebody_else_and_changed_shards_are_never_touched(tmp_path):
    reader = text_jsonl(tmp_path / "in")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "000000.tar").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"holds shards \(000000.tar\) that no manifest.json"):
        run(reader, tmp_path / "foreign")
    assert (tmp_path / "foreign" / "000000.tar").read_bytes() == b"precious"
    assert run_and_kill(reader, tmp_path / "out", at=20, shard_samples=2)
    with open(tmp_path / "out" / "000000.tar", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="000000.tar has .* bytes, manifest.json says"):
        run(reader, tmp_path / "out", shard_samples=2)
    (tmp_path / "out" / "000000.tar").unlink()
    with pytest.raises(DataError, match="000000.tar is gone"):
        run(reader, tmp_path / "out", shard_samples=2)
    dump(tmp_path / "out" / "manifest.json", {"version": 99})
    with pytest.raises(DataError, match="version 99"):
        run(reader, tmp_path / "out", shard_samples=2)


def test_two_imports_do_not_write_the_same_folder(tmp_path):
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match="another import is writing"):
        run(text_jsonl(tmp_path / "in"), tmp_path / "out")
    run(text_jsonl(tmp_path / "in"), tmp_path / "out")


def test_two_imports_do_not_write_the_same_folder_of_texts(tmp_path):
    with locked(tmp_path / "text"), pytest.raises(ConfigError, match="another import is writing .*text"):
        run(conversations(tmp_path / "in"), tmp_path / "out", text_out=tmp_path / "text")


def test_an_import_of_something_else_says_which_folders_to_delete_and_they_are_enough(tmp_path):
    out, text = tmp_path / "out", tmp_path / "text"
    run(conversations(tmp_path / "in"), out, text_out=text)
    other = conversations(tmp_path / "other", count=8)
    with pytest.raises(ConfigError, match=f"or delete what it wrote: {out} and {text}"):
        run(other, out, text_out=text)
    shutil.rmtree(out)
    with pytest.raises(ConfigError, match="or delete this one if an import that you have deleted wrote it"):
        run(other, out, text_out=text)
    shutil.rmtree(text)
    run(other, out, text_out=text)


@pytest.mark.parametrize("source", ["", "*.jsonl", "**/*.jsonl", "te*.jsonl"])
def test_shards_are_not_written_where_the_next_run_would_read_the_reports_as_data(tmp_path, source):
    inside = text_jsonl(tmp_path / "in").source.parent
    reader = text_reader(inside / source, "file", Columns())
    with pytest.raises(ConfigError, match="lies within SOURCE"):
        run(reader, inside if "*" in source else inside / "out")
    assert os.listdir(inside) == ["text.jsonl"]
    for _ in range(2):
        assert run(reader, tmp_path / "out").complete


def test_a_full_disk_stops_the_import_which_then_goes_on_to_the_same_bytes(tmp_path):
    reader = parquet(tmp_path / "in", 12)
    run(reader, tmp_path / "whole", shard_samples=4)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "whole").glob("*.tar"))
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, sizes[-1] - 1))  # EFBIG, as a quota gives
            run(reader, tmp_path / "out", shard_samples=4)
        except DataError as error:
            status = 42 if "cannot write shard" in str(error) and "run the same command again" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert not list((tmp_path / "out").glob(".*.tmp"))
    run(reader, tmp_path / "out", shard_samples=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
