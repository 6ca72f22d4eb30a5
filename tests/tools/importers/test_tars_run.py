"""An existing WebDataset is validated in place; compressed tars and commands become plain shards, and only on
request."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml

from jp_train.config.batch import batch_plan
from jp_train.config.schema import MixtureConfig, SourceConfig, SourceKind
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan
from jp_train.data.shards import ShardReader
from jp_train.data.sidecar import load_members
from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.command import import_tars_command
from jp_train.tools.importers.documents import text_reader
from jp_train.tools.importers.records import Columns, record_reader
from jp_train.tools.importers.samples import MAIN
from jp_train.tools.importers.tars import find_tars
from jp_train.tools.importers.tars_run import import_tars, usable_samples
from jp_train.types import Kind
from tests.data.data_samples import (
    generation_samples,
    json_bytes,
    png,
    stored_samples,
    text_samples,
    understanding_samples,
    words,
    write_shard,
)
from tests.tools.importers.import_layouts import contents, picture, skipped_in, text_jsonl
from tests.tools.importers.import_layouts import run as imported


def run(source, out, kind=Kind.GENERATION, *, processes=1, allow_pipe=False, **options):
    return import_tars_command(str(source), out, kind, processes=processes, allow_pipe=allow_pipe, **options)


@pytest.mark.parametrize("kind", list(Kind), ids=str)
def test_plain_tars_are_validated_and_indexed_where_they_are(tmp_path, kind):
    make = {Kind.GENERATION: generation_samples, Kind.UNDERSTANDING: understanding_samples, Kind.TEXT: text_samples}[
        kind
    ]
    for number in range(2):
        write_shard(tmp_path / "in" / f"{number}.tar", make(5 + number))
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    summary, text = run(tmp_path / "in" / "{0..1}.tar", tmp_path / "out", kind)
    assert (summary["entries"], summary["samples"], summary["skipped"]) == (11, 11, {})
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "skipped.jsonl"]
    assert all(path.read_bytes() == data for path, data in before.items())
    reader = ShardReader()
    assert [len(load_members(reader.stat(str(path))).keys) for path in sorted(before)] == [5, 6]
    assert f'out: {{kind: {kind}, shards: "{tmp_path}/in/{{0..1}}.tar"' in text
    again, _ = run(tmp_path / "in" / "{0..1}.tar", tmp_path / "out", kind)
    assert again["samples"] == 11


def caption(n: int) -> str:
    return f"A picture of {words(n, 3)}. Number {n}."


def metadata(n: int, **more: object) -> bytes:
    """What img2dataset writes of an image."""
    return json_bytes({"url": f"http://h/{n}.jpg", "key": f"{n:09d}", "status": "success", "width": 24} | more)


LAYOUTS = {
    # the files of sample n as img2dataset, LAION and DataComp write them; `fields` that an import names
    "caption in JSON": (lambda n: {"jpg": picture(n), "json": metadata(n, caption=caption(n))}, "json:caption"),
    "text alone": (lambda n: {"jpg": picture(n), "txt": caption(n).encode()}, "txt"),
    "text and metadata": (lambda n: {"jpg": picture(n), "txt": caption(n).encode(), "json": metadata(n)}, "txt"),
    "list of captions": (lambda n: {"jpg": picture(n), "json": metadata(n, caption=[caption(n)])}, "json:caption[*]"),
    "LAION": (lambda n: {"jpg": picture(n), "json": metadata(n, TEXT=caption(n))}, "json:TEXT"),
    "captions": (lambda n: {"jpg": picture(n), "json": metadata(n, captions=[caption(n), None])}, "json:captions[*]"),
    "both, jfif": (
        lambda n: {"jfif": picture(n), "txt": b"alt", "json": metadata(n, caption=caption(n))},
        "json:caption",
    ),
    "some null": (
        lambda n: {
            "jpg": picture(n),
            "txt": caption(n).encode(),
            "json": metadata(n, caption=[None, caption(n)][n % 2]),
        },
        "json:caption;txt",
    ),
}


def rows_of(cfg, tokenizer, kind: str, **source: object) -> list[list]:
    """The tokens, labels and images of ten steps with this source alone."""
    cfg.data.sources = {"in": SourceConfig(kind=SourceKind(kind), **source)}
    shares = {name: float(name == kind) for name in ("understanding", "text", "generation")}
    cfg.stage.mixture = MixtureConfig(**shares)
    cfg.stage.batch_size, cfg.data.pad_dropout = 4, 0.3
    batch, indexes = batch_plan(cfg, 1), index_sources(cfg, tokenizer)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    with StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch) as loader:
        made = [micro for _ in range(10) for micro in next(loader).micro_batches]
    names = ("input_ids", "labels", "gen_labels", "und_images", "gen_images", "document_lengths")
    return [[getattr(micro, name).tolist() for name in names] for micro in made]


@pytest.mark.parametrize("kind", ["generation", "understanding"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_of_img2dataset_have_the_same_rows_in_place_imported_and_with_the_fields_that_an_import_prints(
    tmp_path, cfg, tokenizer, kind, layout
):
    files_of, place = LAYOUTS[layout]
    (tmp_path / "images").mkdir()
    for n in range(12):
        (tmp_path / "images" / f"{n}.jpg").write_bytes(picture(n))
    unusable = ("null", {"jpg": picture(0), "json": metadata(0, caption=None, TEXT=None)})
    write_shard(tmp_path / "in" / "00000.tar", [(f"{n:09d}", files_of(n)) for n in range(7)])
    write_shard(tmp_path / "in" / "00001.tar", [unusable, *((f"{n:09d}", files_of(n)) for n in range(7, 12))])
    shards = f"{tmp_path}/in/{{00000..00001}}.tar"
    in_place = rows_of(cfg, tokenizer, kind, shards=shards)
    summary, text = run(shards, tmp_path / "checked", Kind(kind))
    assert summary["skipped"] == {"missing_field": 1}
    assert f'fields: {{"caption": "{place}"}}' in text
    assert all(f"caption from {each} (" in text.partition("\ntexts: ")[2] for each in place.split(";"))
    (source,) = yaml.safe_load(summary["recipe"])["data"]["sources"].values()
    assert source.pop("kind") == kind and source["fields"] == {"caption": place}
    assert rows_of(cfg, tokenizer, **source, kind=kind) == in_place
    records = [{"image": f"{n}.jpg", "caption": caption(n)} for n in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    imported(record_reader("pairs", tmp_path / "a.jsonl", tmp_path / "images", kind, Columns()), tmp_path / "out")
    assert rows_of(cfg, tokenizer, kind, shards=f"{tmp_path}/out/*.tar") == in_place


def test_tars_in_place_are_the_shards_of_their_manifest_and_progress_counts_them(tmp_path):
    paths = [write_shard(tmp_path / "in" / f"{number}.tar", text_samples(5 + number)) for number in range(2)]
    stream = io.StringIO()
    tars = find_tars(str(tmp_path / "in"), allow_pipe=False)
    manifest = import_tars(str(tmp_path / "in"), tars, tmp_path / "out", Kind.TEXT, 1, stream)
    output = manifest.outputs[MAIN]
    assert (manifest.complete, usable_samples(manifest), output.folder, output.end) == (True, 11, "/", 2)
    assert [(shard.name, shard.size, shard.samples, shard.sha256) for shard in output.shards] == [
        (str(path), path.stat().st_size, 5 + number, "") for number, path in enumerate(paths)
    ]
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("import: tar 2/2, 11 entries, 0 skipped, 100%, ") and "left" not in last


def test_tars_of_a_folder_that_are_passed_over_and_a_failed_import_in_the_way(tmp_path, capsys):
    write_shard(tmp_path / "in" / "0.tar", text_samples(3))
    (tmp_path / "in" / "1.TAR").write_bytes(b"")
    (tmp_path / "a.jsonl").write_text('{"no": "text"}\n')
    with pytest.raises(DataError, match="no entry"):
        imported(text_reader(tmp_path / "a.jsonl", "file", Columns()), tmp_path / "out")
    assert run(tmp_path / "in", tmp_path / "out", Kind.TEXT)[0]["samples"] == 3, "it had written nothing"
    assert "import: 1 *.TAR passed over" in capsys.readouterr().err


def test_stored_ids_count_as_an_image(tmp_path):
    write_shard(tmp_path / "a.tar", stored_samples(3))
    assert run(tmp_path / "a.tar", tmp_path / "out")[0]["samples"] == 3


def test_samples_that_the_loader_would_refuse_are_named_and_counted(tmp_path):
    samples = [
        *generation_samples(3),
        ("nojson", {"png": png(1)}),
        ("empty", {"png": png(2), "json": json_bytes({"caption": ""})}),
    ]
    path = write_shard(tmp_path / "a.tar", samples)
    summary, text = run(path, tmp_path / "out")
    assert (summary["entries"], summary["samples"]) == (5, 3)
    assert skipped_in(tmp_path / "out") == [(f"{path}: nojson", "missing_field"), (f"{path}: empty", "empty_text")]
    assert "missing_field" in text
    with pytest.raises(DataError, match="no usable text sample.*is --kind right"):
        run(path, tmp_path / "text", Kind.TEXT)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("processes", [1, 2])
def test_compressed_tars_become_the_plain_tars_they_hold(tmp_path, suffix, processes):
    plain = [write_shard(tmp_path / f"{n}.tar", generation_samples(4, 4 * n)).read_bytes() for n in range(3)]
    (tmp_path / "in").mkdir()
    for number, data in enumerate(plain):
        (tmp_path / "in" / f"{number}.tar.{suffix}").write_bytes(COMPRESS[suffix](data))
    summary, _ = run(tmp_path / "in", tmp_path / "out", processes=processes)
    assert summary["samples"] == 12 and summary["sources"][0]["spec"] == f"{tmp_path}/out/{{000000..000002}}.tar"
    assert [(tmp_path / "out" / f"{n:06d}.tar").read_bytes() for n in range(3)] == plain
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]


def test_a_copy_that_stops_at_a_damaged_tar_goes_on_when_it_is_mended(tmp_path):
    good = [
        gzip.compress(write_shard(tmp_path / "p.tar", generation_samples(4, 4 * n)).read_bytes(), mtime=0)
        for n in range(3)
    ]
    folder = tmp_path / "in"
    folder.mkdir()
    for number, data in enumerate(good):
        (folder / f"{number}.tar.gz").write_bytes(data)
    run(folder, tmp_path / "whole")
    for damage in (
        good[1][:-2000],
        good[1][:200] + b"x" * 50 + good[1][250:],
        gzip.compress(gzip.decompress(good[1])[:9000]),
    ):
        out = tmp_path / f"out{len(damage)}"
        (folder / "1.tar.gz").write_bytes(damage)
        with pytest.raises(DataError, match=r"1\.tar\.gz"):
            run(folder, out)
        assert [name for name in sorted(contents(out)) if "tar" in name] == ["0/000000.tar"], "no half shard is left"
        (folder / "0.tar.gz").rename(tmp_path / "kept")
        (folder / "0.tar.gz").write_bytes(good[2])
        with pytest.raises(ConfigError, match=r"source: .*0\.tar\.gz was .*sha256"):
            run(folder, out)
        (tmp_path / "kept").rename(folder / "0.tar.gz")
        (folder / "1.tar.gz").write_bytes(good[1])
        run(folder, out)
        assert contents(out) == contents(tmp_path / "whole")


def test_the_same_compressed_tars_resume_after_the_shards_that_are_done(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.tar.gz").write_bytes(
            gzip.compress(write_shard(tmp_path / "p.tar", text_samples(3 + number)).read_bytes())
        )
    run(folder, tmp_path / "whole", Kind.TEXT)
    run(folder, tmp_path / "cut", Kind.TEXT)
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    state = manifest["outputs"]["shards"]
    manifest |= {"complete": False, "log_end": 1, "counts": {"entries": 3}}
    state |= {"end": 1, "shards": state["shards"][:1]}
    (tmp_path / "cut" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "cut" / "000001.tar").unlink()
    done = (tmp_path / "cut" / "000000.tar").stat().st_mtime_ns
    summary, _ = run(folder, tmp_path / "cut", Kind.TEXT)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and summary["samples"] == 12
    assert (tmp_path / "cut" / "000000.tar").stat().st_mtime_ns == done


def test_a_command_runs_only_when_it_is_allowed_and_never_through_a_shell(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"a {number}.tar", generation_samples(3, 3 * number))
    source = f"pipe:cat '{tmp_path}/a {{0..1}}.tar'"
    with pytest.raises(ConfigError, match="--allow-pipe"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary, _ = run(source, tmp_path / "out", allow_pipe=True)
    assert summary["samples"] == 6
    assert [(tmp_path / "out" / f"{n:06d}.tar").read_bytes() for n in range(2)] == [
        (tmp_path / f"a {n}.tar").read_bytes() for n in range(2)
    ]
    for command in ("cat a.tar | gunzip", "cat a.tar > b.tar", "true && cat a.tar", "", "'unclosed"):
        with pytest.raises(ConfigError):
            run(f"pipe:{command}", tmp_path / "no", allow_pipe=True)
    mark = tmp_path / "mark"
    with pytest.raises(DataError):
        run(f"pipe:cat $(touch {mark}) `touch {mark}`;touch {mark}", tmp_path / "no", allow_pipe=True)
    assert not mark.exists()


def test_a_command_that_fails_or_ends_early_leaves_no_shard_and_its_output_is_shown(tmp_path):
    path = write_shard(tmp_path / "a.tar", generation_samples(3))
    script = f"import sys; sys.stdout.buffer.write(open('{path}','rb').read()); sys.exit('the bucket is gone')"
    with pytest.raises(DataError, match="ended with status 1: the bucket is gone"):
        run(f'pipe:{sys.executable} -c "{script}"', tmp_path / "out", allow_pipe=True)
    with pytest.raises(DataError, match="truncated"):
        run(f"pipe:head -c 3000 {path}", tmp_path / "out2", allow_pipe=True)
    with pytest.raises(DataError, match="cannot be started"):
        run("pipe:/no/such/program", tmp_path / "out3", allow_pipe=True)
    for name in ("out", "out2", "out3"):
        assert not list((tmp_path / name).glob("*.tar")) and not list((tmp_path / name).glob(".*.tmp"))


def test_corrupt_tars_and_what_cannot_be_read_stop_with_their_name(tmp_path):
    path = write_shard(tmp_path / "a.tar", generation_samples(3))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a\.tar"):
        run(path, tmp_path / "out")
    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"link\.tar\.gz.*link"):
        run(tmp_path / "link.tar.gz", tmp_path / "out1")
    (tmp_path / "z.tar").write_bytes(b"\x28\xb5\x2f\xfd" + b"0" * 100)
    with pytest.raises(DataError, match=r"z\.tar: the zstd stream is truncated or corrupt"):
        run(tmp_path / "z.tar", tmp_path / "out2")
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        run(tmp_path / "none", tmp_path / "out3")


def test_the_reports_of_tars_in_place_never_replace_those_of_another_import(tmp_path):
    path = write_shard(tmp_path / "a.tar", text_samples(3))
    imported(text_jsonl(tmp_path / "in"), tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(
        ConfigError, match="holds an import of something else .text .*would be lost.*or delete this one"
    ):
        run(path, tmp_path / "out", Kind.TEXT)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_a_folder_of_plain_and_compressed_tars_is_refused_and_other_files_in_it_are_no_tars(tmp_path):
    data = write_shard(tmp_path / "p.tar", generation_samples(3)).read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "b.tar.gz").write_bytes(gzip.compress(data))
    (folder / "b.tar.gz.md5").write_text("0123")
    assert run(folder, tmp_path / "out")[0]["samples"] == 3
    (folder / "a.tar").write_bytes(data)
    with pytest.raises(ConfigError, match=r"plain tars \(a.tar\) and compressed ones \(b.tar.gz\)"):
        run(folder, tmp_path / "out2")


def test_ctrl_c_does_not_wait_for_the_tars_that_are_being_copied(tmp_path):
    marks = [tmp_path / f"mark{n}" for n in range(2)]
    script = tmp_path / "slow.py"
    script.write_text("import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)")
    words = [
        "data",
        "import",
        "webdataset",
        f"pipe:{sys.executable} {script} {tmp_path}/mark{{0..1}}",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, "-m", "jp_train", *words, "--kind", "text", "--allow-pipe", "--processes", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while process.poll() is None and not all(mark.exists() for mark in marks):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=40)
        assert process.returncode == 130 and "the same command goes on" in err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the commands themselves, which sleep on


def test_a_dry_run_says_how_many_tars_would_be_written_again(tmp_path):
    write_shard(tmp_path / "a.tar", generation_samples(3))
    result, text = run(tmp_path / "a.tar", tmp_path / "out", dry_run=True)
    judged = {"read": 3, "rejected": {}, "images_rejected": {}, "stops": False}
    assert result == {"format": "webdataset", "dry_run": True, "tars": 1, "copies": False} | judged
    assert "where they are" in text and not (tmp_path / "out").exists()
