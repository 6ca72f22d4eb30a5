"""Everything that does not become a sample is named with its reason, and nothing outside the image folder is ever
read."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from jp_train.data.image import _to_rgb, decode_rgb
from jp_train.data.samples import MAX_TEXT_BYTES
from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers import images
from jp_train.tools.importers.coco import CocoReader
from jp_train.tools.importers.command import import_command
from jp_train.tools.importers.documents import text_reader
from jp_train.tools.importers.entries import REASONS, Skip
from jp_train.tools.importers.imagenet import ImageNetReader
from jp_train.tools.importers.images import read_inside, shard_image
from jp_train.tools.importers.parquet import ParquetReader
from jp_train.tools.importers.records import Columns, record_reader
from jp_train.tools.importers.run import FIRST_FAILURES, ImportSettings
from jp_train.types import Kind
from tests.tools.importers.import_layouts import (
    contents,
    dump,
    image_folder,
    image_name,
    notes_in,
    picture,
    run,
    samples_in,
    skipped_in,
    turns,
)


@pytest.fixture
def folder(tmp_path):
    """An image folder with a good image and everything that must not be read."""
    images = image_folder(tmp_path / "images", 2)
    (tmp_path / "secret.jpg").write_bytes(picture(5))
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too" / "a.jpg").write_bytes(picture(6))
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "out").symlink_to(tmp_path)
    (images / "inside.jpg").symlink_to(images / image_name(0))
    (images / "circle.jpg").symlink_to(images / "circle.jpg")
    (images / "folder.jpg").mkdir()
    os.mkfifo(images / "pipe.jpg")
    (images / "empty.jpg").write_bytes(b"")
    (images / "words.jpg").write_bytes(b"<html>not found</html>")
    (images / "cut.jpg").write_bytes(picture(1)[:25])
    (images / "cut-late.png").write_bytes(picture(1, "PNG")[:-100])
    return images


BAD_PATHS = {
    "../secret.jpg": "image_outside",
    "sub/../../secret.jpg": "image_outside",
    "../images-too/a.jpg": "image_outside",
    "/etc/passwd": "image_outside",
    "link.jpg": "image_outside",
    "out/secret.jpg": "image_outside",
    "circle.jpg": "image_missing",
    "folder.jpg": "image_no_file",
    "pipe.jpg": "image_no_file",
    "none.jpg": "image_missing",
    "000.jpg/x": "image_missing",
    "x" * 5000: "image_missing",
    "a\0b": "image_missing",
    "empty.jpg": "image_undecodable",
    "words.jpg": "image_undecodable",
    "cut.jpg": "image_undecodable",
    "http://host/a.jpg": "image_missing",
}


def pairs(tmp_path, folder, records, kind="generation", **columns):
    path = tmp_path / "records.jsonl"
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return record_reader("pairs", path, folder, kind, Columns(**columns))


def test_a_path_is_only_read_inside_the_image_folder(tmp_path, folder):
    good = [image_name(0), "inside.jpg", "./001.png"]
    records = [{"image": name, "caption": "c"} for name in [*good, *BAD_PATHS]]
    run(pairs(tmp_path, folder, records), tmp_path / "out")
    assert [note["source_id"] for note in notes_in(tmp_path / "out")] == [f"records.jsonl:{n}" for n in (1, 2, 3)]
    expected = [(f"records.jsonl:{4 + n}", reason) for n, reason in enumerate(BAD_PATHS.values())]
    assert skipped_in(tmp_path / "out") == expected
    shards = b"".join(contents(tmp_path / "out").values())
    assert picture(5) not in shards and picture(6) not in shards and b"root:" not in shards


@pytest.mark.parametrize("rest", ["../secret.jpg", "out/secret.jpg", "link.jpg", "%2e%2e/secret.jpg", "..\\secret.jpg"])
def test_an_absolute_path_is_read_inside_the_image_folder_and_there_alone(folder, tmp_path, rest):
    assert read_inside(folder, f"{folder}/{image_name(0)}") == (folder / image_name(0)).read_bytes()
    for path in (f"{folder}/{rest}", f"{folder}//{rest}", f"{folder}-too/a.jpg", f"{tmp_path}/secret.jpg"):
        with pytest.raises(Skip) as caught:
            read_inside(folder, path)
        assert caught.value.fault == "image_outside", path


def test_an_io_error_stops_the_import_and_is_no_reason_to_skip(folder, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(images.os, "stat", fails)
    with pytest.raises(DataError, match="Input/output error.*never skipped.*it resumes"):
        read_inside(folder, image_name(0))


RECORDS = [
    (b"{broken", "bad_record"),
    (b"[1, 2]", "bad_record"),
    (b'{"image": "000.jpg", "caption": "\xff"}', "not_unicode"),
    ({"image": "000.jpg"}, "bad_record"),
    ({"image": "000.jpg", "caption": 7}, "bad_record"),
    ({"image": "000.jpg", "caption": None}, "bad_record"),
    ({"image": "000.jpg", "caption": "  "}, "empty_text"),
    ({"image": "000.jpg", "caption": "\ud800"}, "not_unicode"),
    ({"image": "000.jpg", "caption": "x" * (MAX_TEXT_BYTES + 1)}, "field_too_large"),
    ({"caption": "c"}, "no_image"),
    ({"image": None, "caption": "c"}, "no_image"),
    ({"image": [], "caption": "c"}, "no_image"),
    ({"image": ["000.jpg", "001.png"], "caption": "c"}, "multi_image"),
    ({"image": 3, "caption": "c"}, "bad_record"),
]


def test_every_bad_record_is_named_with_its_line_and_reason(tmp_path, folder):
    records = [
        {"image": "000.jpg", "caption": "good"},
        *[record for record, _ in RECORDS],
        {"image": ["001.png"], "caption": "good too"},
    ]
    summary, text = import_command(pairs(tmp_path, folder, records), ImportSettings(out=tmp_path / "out"))
    assert skipped_in(tmp_path / "out") == [(f"records.jsonl:{2 + n}", reason) for n, (_, reason) in enumerate(RECORDS)]
    assert [note["caption"] for note in notes_in(tmp_path / "out")] == ["good", "good too"]
    assert summary["entries"] == len(records) == summary["samples"] + sum(summary["skipped"].values())
    assert all(reason in text for reason in summary["skipped"]) and "records.jsonl:2" in text


CONVERSATIONS = [
    ([], "bad_dialogue"),
    ("text", "bad_dialogue"),
    (turns(1)[:1], "bad_dialogue"),
    (turns(1, "<video>"), "bad_dialogue"),
    (turns(1, "<image><image>"), "bad_dialogue"),
    ([*turns(1), {"from": "system", "value": "s"}], "bad_dialogue"),
    ([turns(1)[0], {"from": "gpt", "value": ""}], "empty_text"),
    ([turns(1)[0], {"from": "gpt"}], "bad_type"),
]


def test_every_bad_conversation_is_named_with_its_reason(tmp_path, folder):
    records = [{"image": "000.jpg", "conversations": conversation} for conversation, _ in CONVERSATIONS]
    records += [
        {"image": "000.jpg", "conversations": turns(1)},
        {"image": ["000.jpg", "001.png"], "conversations": turns(1)},
        None,
        7,
    ]
    records += [{"conversations": [*turns(1, ""), "x"]}]
    path = dump(tmp_path / "llava.json", records)
    reader = record_reader("conversations", path, folder, "understanding", Columns())
    run(reader, tmp_path / "out", text_out=tmp_path / "text")
    expected = [reason for _, reason in CONVERSATIONS] + ["bad_dialogue", "bad_record", "bad_record", "bad_dialogue"]
    assert [reason for _, reason in skipped_in(tmp_path / "out")] == expected
    assert len(samples_in(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_hostile_record_costs_a_single_record_and_its_words_steer_no_terminal(tmp_path, folder, name, capsys):
    good = '{"image": "000.jpg", "caption": "c"}'
    deep = '{"image": "000.jpg", "conversations": %s}' % ("[" * 900 + "]" * 900)
    names = json.dumps({"image": "000.jpg", "\x1b[2J\ud800": 1})
    records = [good, '{"image": "000.jpg", "caption": "c", "n": %s}' % ("9" * 5000), names, *[deep] * 600]
    (tmp_path / name).write_text(f"[{','.join(records)}]" if name == "a.json" else "\n".join(records))
    reader = record_reader("pairs", tmp_path / name, folder, "understanding", Columns())
    _, text = import_command(reader, ImportSettings(out=tmp_path / "out", processes=2))
    assert [number for number, _ in skipped_in(tmp_path / "out")] == [f"{name}:{n}" for n in range(2, 604)]
    assert "\x1b" not in text and r'"\x1b[2J\ud800"' in text and text.encode()


def test_csv_rows_of_another_width_and_bytes_that_are_no_text_are_named(tmp_path, folder):
    path = tmp_path / "images" / "a.csv"
    path.write_bytes(b"image,caption\n000.jpg,fine\n000.jpg\n000.jpg,a,b\n\n000.jpg,\xff\xfe\n000.jpg,end\n")
    run(record_reader("pairs", path, None, "generation", Columns()), tmp_path / "out")
    assert skipped_in(tmp_path / "out") == [
        ("a.csv:2", "bad_record"),
        ("a.csv:3", "bad_record"),
        ("a.csv:4", "not_unicode"),
    ]
    assert [note["caption"] for note in notes_in(tmp_path / "out")] == ["fine", "end"]


def test_text_that_is_not_utf8_or_empty_is_named(tmp_path):
    (tmp_path / "t").mkdir()
    for name, data in (
        ("a.txt", b"fine"),
        ("b.txt", b"\xff\xfe\x00"),
        ("c.txt", b" \n "),
        ("d.txt", b"x" * (MAX_TEXT_BYTES + 1)),
    ):
        (tmp_path / "t" / name).write_bytes(data)
    run(text_reader(tmp_path / "t", "file", Columns()), tmp_path / "out")
    assert skipped_in(tmp_path / "out") == [("b.txt", "not_unicode"), ("c.txt", "empty_text"), ("d.txt", "bad_record")]


def test_a_truncated_image_is_detected_with_decode(tmp_path, folder):
    records = [{"image": name, "caption": "c"} for name in ("cut-late.png", "000.jpg")]
    run(pairs(tmp_path, folder, records), tmp_path / "headers")
    assert not skipped_in(tmp_path / "headers")
    run(pairs(tmp_path, folder, records), tmp_path / "decoded", decode=True)
    assert skipped_in(tmp_path / "decoded") == [("records.jsonl:1", "image_undecodable")]


@pytest.mark.parametrize("decode", [False, True])
def test_an_image_with_too_many_pixels_is_rejected_before_it_is_decoded(decode):
    for format in ("PNG", "BMP"):
        buffer = io.BytesIO()
        Image.new("1", (2000, 1000)).save(buffer, format)
        with pytest.raises(Skip) as caught:
            shard_image(buffer.getvalue(), 1_999_999, decode=decode)
        assert caught.value.fault == "image_too_large" and "2000 x 1000" in str(caught.value)
        assert shard_image(buffer.getvalue(), 2_000_000, decode=decode)[0] == "png"


def _modes():
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (13, 17, 4), np.uint8), "RGBA")
    grey16 = Image.fromarray(rng.integers(0, 65536, (13, 17), np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "BMP RGB": (rgb, "BMP", {}),
        "BMP L": (rgb.convert("L"), "BMP", {}),
        "BMP 1": (rgb.convert("1"), "BMP", {}),
        "GIF P": (rgb.quantize(64), "GIF", {}),
        "GIF transparent": (rgb.quantize(64), "GIF", {"transparency": 3}),
        "GIF animated": (rgb.quantize(64), "GIF", {"save_all": True, "append_images": [rgb.rotate(90).quantize(64)]}),
        "TIFF RGB": (rgb, "TIFF", {}),
        "TIFF RGBA": (alpha, "TIFF", {}),
        "TIFF CMYK": (rgb.convert("CMYK"), "TIFF", {}),
        "TIFF 16 bit": (grey16, "TIFF", {}),
        "TIFF turned": (rgb, "TIFF", {"exif": turned}),
        "PPM": (rgb, "PPM", {}),
        "PPM 16 bit": (grey16, "PPM", {}),
    }


@pytest.mark.parametrize("mode", list(_modes()))
def test_other_formats_become_png_without_a_change_of_what_training_sees(mode):
    image, format, options = _modes()[mode]
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    extension, png, converted = shard_image(buffer.getvalue(), 10**6, decode=False)
    assert (extension, converted) == ("png", True)
    original = Image.open(io.BytesIO(buffer.getvalue()))
    original.load()
    expected = image.transpose(Image.Transpose.ROTATE_270) if mode == "TIFF turned" else _to_rgb(original)
    np.testing.assert_array_equal(np.asarray(decode_rgb(png)), np.asarray(expected))


def test_converted_images_are_counted(tmp_path, folder):
    for number in range(2):
        (folder / f"{number}.bmp").write_bytes(picture(number, "BMP"))
    manifest = run(
        pairs(tmp_path, folder, [{"image": n, "caption": "c"} for n in ("0.bmp", "000.jpg", "1.bmp")]), tmp_path / "out"
    )
    assert manifest.counts["converted"] == 2
    assert [sorted(fields) for _, fields in samples_in(tmp_path / "out")] == [
        ["json", "png"],
        ["jpg", "json"],
        ["json", "png"],
    ]


def test_an_import_without_a_good_entry_is_an_error_that_names_the_first(tmp_path, folder):
    with pytest.raises(
        DataError,
        match=r"no entry .* became a sample \(1 skipped\); the first: records.jsonl:1: 'none.jpg' does not exist",
    ):
        run(pairs(tmp_path, folder, [{"image": "none.jpg", "caption": "c"}]), tmp_path / "out")
    many = pairs(tmp_path, folder, [{"image": "none.jpg", "caption": "c"}] * (FIRST_FAILURES + 500))
    with pytest.raises(
        DataError, match=r"none of the first 1,000 entries became a sample.*Check the options \(image folder"
    ):
        run(many, tmp_path / "many")
    assert len(skipped_in(tmp_path / "many")) == FIRST_FAILURES


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b"", "is empty: expected a header"),
        ("a.json", b'[{"image": "000.jpg", "capt', "item 1 of the array is broken"),
        ("a.jsonl.gz", b"\x1f\x8b\x08garbage", "cannot read"),
        ("a.csv", b'image,caption\n"' + b"x" * 2000, "field larger than field limit"),
        ("a.csv", b'image,caption\n000.jpg,"open\n000.jpg,b\n', "line 3.*unclosed quote"),
        ("a.csv", b'image,caption\n000.jpg,"open\n000.jpg,"b"\n', "line 3.*unclosed quote"),
    ],
)
def test_a_damaged_listing_stops_with_its_name(tmp_path, folder, name, data, says, monkeypatch):
    monkeypatch.setattr("jp_train.tools.importers.records.MAX_CELL", 1000)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says) as caught:
        run(record_reader("pairs", tmp_path / name, folder, "generation", Columns()), tmp_path / "out")
    assert name in str(caught.value)


def test_a_source_that_is_something_else_is_a_config_error(tmp_path, folder):
    cases = [
        (lambda: ImageNetReader(source=tmp_path / "none"), "expected a folder with one folder a class"),
        (lambda: ImageNetReader(source=tmp_path / "images-too"), "no class folder with files"),
        (lambda: CocoReader(source=folder, images=folder, kind=Kind.GENERATION), "not a file; expected COCO"),
        (
            lambda: CocoReader(source=dump(tmp_path / "c.json", []), images=folder, kind=Kind.GENERATION),
            'no list "images"',
        ),
        (lambda: text_reader(tmp_path / "none", "file", Columns()), "does not exist"),
        (
            lambda: record_reader("pairs", dump(tmp_path / "r.json", []), tmp_path / "none", "generation", Columns()),
            "--images .*none is no folder",
        ),
        (lambda: record_reader("pairs", folder, folder, "generation", Columns()), "holds no records"),
        (
            lambda: record_reader("pairs", folder / "000.jpg", folder, "generation", Columns()),
            r"000.jpg is an image \(jpg\); expected JSON lines",
        ),
        (lambda: ParquetReader(source=folder, images=None, kind=Kind.GENERATION), "holds no Parquet files"),
    ]
    for make, says in cases:
        with pytest.raises(ConfigError, match=says):
            run(make(), tmp_path / "out")


def test_a_skip_survives_the_way_between_processes():
    import pickle

    skip = pickle.loads(pickle.dumps(Skip("image_missing", "no such file")))
    assert (skip.fault, str(skip)) == ("image_missing", "no such file") and "image_missing" in REASONS
