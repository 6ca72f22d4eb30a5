"""Shards in all shapes that webdataset writes are read here as webdataset itself reads them."""

from __future__ import annotations

import gzip
import io
import tarfile
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import webdataset

from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.field_map import Fields, field_map
from jp_train.data.sample_fields import read_fields
from jp_train.data.samples import parse_variants
from jp_train.data.shards import ShardReader, expand_shards, scan_members
from jp_train.data.tar_samples import collapsed
from jp_train.errors import DataError, SkipSample
from jp_train.tools.importers.command import import_tars_command
from jp_train.types import Kind
from tests.data.data_samples import png

Samples = list[tuple[str, dict[str, bytes]]]


def of_webdataset(spec: str) -> Samples:
    dataset = webdataset.WebDataset(spec, shardshuffle=False, empty_check=False)
    names = {"__key__", "__url__", "__local_path__"}
    return [(s["__key__"], {name: s[name] for name in s if name not in names}) for s in dataset]


def of_house(spec: str) -> Samples:
    samples: Samples = []
    with closing(ShardReader()) as reader:
        for path in expand_shards(spec):
            shard = reader.stat(path)
            members = scan_members(shard, reader)
            assert not members.ignored
            for number, key in enumerate(members.keys):
                own = range(members.member_start[number], members.member_start[number + 1])
                read = [reader.read(shard, int(members.offset[m]), int(members.size[m])) for m in own]
                names = [members.extensions[members.extension[m]] for m in own]
                samples.append((key, dict(zip(names, read, strict=True))))
    return samples


def plain(count: int = 7) -> list[dict[str, Any]]:
    return [{"__key__": f"{n:06d}", "jpg": bytes([n]) * (300 * n), "json": b'{"n": 1}'} for n in range(count)]


ENCODED = [
    {
        "__key__": f"k{n}",
        "txt": "Größe",
        "json": {"caption": "c", "list": [n, None]},
        "cls": n,
        "npy": np.arange(n + 3),
        "png": np.full((4, 5, 3), n, np.uint8),
        "pyd": {"a": n},
        "note.json.gz": {"n": n},
        "_note": "kept only with keep_meta",
    }
    for n in range(3)
]
NAMED = [
    {"__key__": key, "txt": key.encode()}
    for key in ("a b", "./c", "dir/sub/d", "v1.5/e", "../f", "ключ/字", "-", "__g", "h__", "a\nb", "x" * 99, "/i")
]
FIELDS = [{"__key__": "a", "JPG": b"1", "Seg.PNG": b"2", "vq.npy": b"3", "0.jpg": b"", "1.jpg": b"5", "a..b": b"6"}]
DOTS = [{"__key__": f"img.{n:04d}", "jpg": b"j", "txt": b"t"} for n in range(6)]
FOLDERS = ("n" * 120 + "/") * 2
LONG = [{"__key__": FOLDERS[: 20 * n] + f"{n}" * 60, "txt": b"t", "json": b"{}"} for n in range(1, 12)]
SHAPES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "bytes": (plain(), {"encoder": False}),
    "bytearrays": ([{"__key__": "a", "txt": bytearray(b"b"), "bin": memoryview(b"m")}], {"encoder": False}),
    "encoded": (ENCODED, {}),
    "with the keys that begin with _": (ENCODED, {"keep_meta": True}),
    "an encoder of ones own": (plain(), {"encoder": lambda sample: sample | {"txt": b"added"}}),
    "owner, mode and time": (plain(), {"user": "u" * 31, "group": "", "mode": 0o600, "mtime": 12.75}),
    "names": (NAMED, {}),
    "names, GNU": (NAMED + LONG, {"format": "GNU_FORMAT"}),
    "names, PAX": (NAMED + LONG, {"format": "PAX_FORMAT", "mtime": 1.5}),
    "long names, ustar": ([s for s in LONG if len(s["__key__"]) < 150], {}),
    "fields": (FIELDS, {}),
    "dots in keys": (DOTS, {}),
    "a field that is empty": ([{"__key__": "a", "txt": b"", "json": b""}, {"__key__": "b", "txt": b"b"}], {}),
    "nothing": ([], {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tar_of_this_shape_has_the_keys_fields_bytes_and_order_that_webdataset_reads(tmp_path, shape):
    samples, options = SHAPES[shape]
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path), **options) as writer:
        for sample in samples:
            writer.write(sample)
    expected = of_webdataset(str(path))
    assert of_house(str(path)) == expected
    assert len(expected) == (1 if samples is DOTS else len(samples))
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, **{"mtime": 0, **options}) as writer:
        for sample in samples:
            writer.write(sample)
    path.write_bytes(stream.getvalue())
    assert of_house(str(path)) == of_webdataset(str(path)) == expected


@pytest.mark.parametrize("options", [{"maxcount": 3}, {"maxsize": 1000}, {"maxcount": 1, "start_shard": 97}])
def test_shards_have_the_samples_in_the_order_in_which_webdataset_reads_them(tmp_path, options):
    with webdataset.ShardWriter(f"{tmp_path}/s-%04d.tar", encoder=False, verbose=0, **options) as writer:
        for sample in plain(9):
            writer.write(sample)
    names = sorted(path.name for path in tmp_path.glob("*.tar"))
    spec = f"{tmp_path}/s-{{{names[0][2:6]}..{names[-1][2:6]}}}.tar"
    assert len(names) > 1 and of_house(spec) == of_webdataset(spec)
    assert [key for key, _ in of_house(spec)] == [f"{n:06d}" for n in range(9)]


@pytest.mark.parametrize("options", [{"compress": True}, {"compress": "bz2"}, {"compress": "xz"}])
def test_compressed_shards_are_refused_in_place_and_their_import_has_what_webdataset_reads(tmp_path, options):
    (tmp_path / "in").mkdir()
    path = str(tmp_path / "in" / f"a.tar.{str(options['compress']).replace('True', 'gz')}")
    with webdataset.TarWriter(path, encoder=False, **options) as writer:
        for n in range(4):
            writer.write({"__key__": f"{n}", "txt": f"text {n}".encode()})
    with pytest.raises(DataError, match="compressed"):
        of_house(path)
    import_tars_command(path, tmp_path / "out", Kind.TEXT, processes=1, allow_pipe=False)
    assert of_house(f"{tmp_path}/out/000000.tar") == of_webdataset(path)


def test_the_notes_of_webdataset_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("__meta__", "__meta__/a.txt", "__index__.json", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    with closing(ShardReader()) as reader:
        members = scan_members(reader.stat(str(tmp_path / "a.tar")), reader)
    assert list(members.keys) == [key for key, _ in of_webdataset(str(tmp_path / "a.tar"))] == ["__index__", "b"]
    assert [name for name, _ in members.ignored] == ["__meta__", "__meta__/a.txt"]


@pytest.mark.parametrize("kind", list(SourceKind), ids=str)
def test_files_that_collapse_into_one_key_are_named_as_such(tmp_path, kind):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for n in range(6):
            writer.write({"__key__": f"img.{n:04d}", "jpg": png(n), "txt": b"t"})
    fields = field_map(SourceConfig(kind=kind))
    with closing(ShardReader()) as reader:
        shard = reader.stat(str(tmp_path / "a.tar"))
        raw = read_fields(shard, scan_members(shard, reader), 0, fields, "centre", reader, "s")
    with pytest.raises(SkipSample) as caught:
        parse_variants(Fields(raw, fields), image_slots=4, codebook_size=8)
    assert "; 12 files collapse into one key, which ends at the first dot of a file name" in str(caught.value)
    assert ".0000.txt" in str(caught.value)


def test_a_sample_of_several_files_is_not_taken_for_several_samples():
    assert not collapsed(["jpg", "json", "txt", "seg.png", "vq.npy"])
    assert "3 files" in collapsed(["json", "0.jpg", "1.jpg"]), "said only of a sample that cannot be used"


def test_a_compressed_field_stays_as_it_is(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "json.gz": {"text": "t"}})
    ((_, fields),) = of_house(str(tmp_path / "a.tar"))
    assert gzip.decompress(fields["json.gz"]) == b'{"text": "t"}'
