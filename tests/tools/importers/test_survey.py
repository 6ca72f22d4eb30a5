"""`data import --dry-run`: what it says of a few entries is what the import makes of all of them."""

from __future__ import annotations

import json
import re

import pytest

from jp_train.cli.main import main
from jp_train.errors import DataError
from jp_train.tools.importers.command import import_command
from jp_train.tools.importers.records import Columns, record_reader
from jp_train.tools.importers.run import ImportSettings
from jp_train.tools.importers.survey import _extrapolated
from jp_train.types import Kind
from tests.data.data_samples import generation_samples, text_samples, write_shard
from tests.tools.importers.import_layouts import (
    coco,
    conversations,
    dump,
    image_folder,
    image_name,
    imagenet,
    pairs_csv,
    pairs_jsonl,
    parquet,
    picture,
    run,
    text_jsonl,
    turns,
)


def look(reader, tmp_path, **settings) -> tuple[dict, str]:
    return import_command(reader, ImportSettings(out=tmp_path / "out", **settings), dry_run=True)


def half_broken_parquet(tmp, count):
    return parquet(tmp, count, image=lambda n: b"broken" if n % 2 else picture(n))


LAYOUTS = {
    "imagenet": imagenet,
    "coco": lambda tmp, count: coco(tmp, count, kind=Kind.UNDERSTANDING, per="image"),
    "conversations": lambda tmp, count: conversations(tmp, count, texts=5),
    "pairs csv": pairs_csv,
    "pairs jsonl": pairs_jsonl,
    "parquet": half_broken_parquet,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_small_source_every_image_is_read_and_the_counts_are_those_of_the_import(layout, tmp_path):
    reader = LAYOUTS[layout](tmp_path / "in", 60)
    pictures = (path for path in (tmp_path / "in").rglob("*") if path.suffix in (".jpg", ".png", ".webp", ".JPEG"))
    for path in sorted(pictures)[::2]:
        path.write_bytes(b"broken")
    summary, text = look(reader, tmp_path)
    manifest = run(reader, tmp_path / "out")
    skipped = manifest.skipped
    assert (summary["read"], summary["rejected"]) == (60, {"image_undecodable": skipped["image_undecodable"]})
    assert summary["rejected"] == {"image_undecodable": 30} and not summary["stops"]
    assert summary["estimated_samples"] == manifest.outputs["shards"].samples == 30
    line = (
        "read the images of 60 of 60 entries, spread over the listing: 30 missing or rejected (50 %), all of them for"
    )
    assert f"  {line} image_undecodable (not an image that can be decoded)\n             e.g. " in text
    assert "6 bytes that start with 62 72 6f 6b 65 6e" in text
    assert re.search("would write 30 [a-z]+ samples in about 1 shards", text)


@pytest.fixture
def long(tmp_path):
    """Makes a listing of 3,000 records of which those in a range have no image."""
    images = image_folder(tmp_path / "images", 12)

    def make(bad: range):
        names = ("gone.jpg" if n in bad else image_name(n % 12) for n in range(3000))
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"image": name, "caption": "c"}) + "\n" for name in names))
        return record_reader("pairs", path, images, "generation", Columns())

    return make


@pytest.mark.parametrize("bad", [range(0), range(64), range(900), range(1500, 3000), range(200, 2900)], ids=str)
def test_of_a_long_listing_200_entries_spread_over_it_tell_what_becomes_of_all(long, tmp_path, bad):
    reader = long(bad)
    summary, text = look(reader, tmp_path)
    low, high = summary["estimated_range"]
    assert summary["read"] == 200 and low <= 3000 - len(bad) <= high and not summary["stops"]
    assert low <= summary["estimated_samples"] <= high and high - low < 450
    assert summary == look(reader, tmp_path)[0], "the same entries every time"
    assert f"samples ({low:,} to {high:,} at 95 %)" in text and "of 200 of 3,000 entries" in text


def test_chunks_beyond_those_that_are_kept_have_the_same_chance(long, tmp_path, monkeypatch):
    reader = long(range(1500, 3000))
    monkeypatch.setattr(type(reader), "surveyed", 20)
    summary, text = look(reader, tmp_path)
    assert 0.25 < summary["rejected"]["image_missing"] / summary["read"] < 0.75
    assert "in 20 of 47 row groups, so roughly" in text


def test_of_many_row_groups_16_are_read_with_their_images(tmp_path):
    summary, text = look(parquet(tmp_path / "in", 160), tmp_path)
    assert summary["read"] == 64 and "in 16 of 40 row groups, so roughly: none missing or rejected" in text
    assert summary["estimated_samples"] == 160 and summary["estimated_range"][0] < 155


NONE = {
    "the wrong folder of images": lambda tmp: (
        ["pairs", pairs_jsonl(tmp, 30).source, "--images", tmp.parent, "--kind", "generation"]
    ),
    "another column": lambda tmp: ["text", text_jsonl(tmp).source, "--text-column", "body"],
    "an empty listing": lambda tmp: ["pairs", dump(tmp / "a.json", []), "--kind", "generation"],
    "only broken images": lambda tmp: (
        ["parquet", parquet(tmp, image=lambda n: b"broken").source, "--kind", "generation"]
    ),
    "no conversation with an image": lambda tmp: (
        ["conversations", dump(tmp / "a.json", [{"conversations": turns(1, "")}]), "--images", tmp]
    ),
    "another kind of tar": lambda tmp: (
        ["webdataset", write_shard(tmp.parent / "a.tar", text_samples(4)), "--kind", "generation"]
    ),
}


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("case", NONE)
def test_where_no_entry_would_become_a_sample_it_ends_with_3_as_the_import_does(case, tmp_path, capsys, processes):
    (tmp_path / "in").mkdir()
    name, source, *options = map(str, NONE[case](tmp_path / "in"))
    words = ["data", "import", name, source, str(tmp_path / "out"), *options, "--processes", processes]
    assert main([*words, "--dry-run"]) == 3
    assert "stop with exit status 3" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main([*words, "--dry-run", "--json"]) == 3 and json.loads(capsys.readouterr().out)["stops"]
    assert main(words) == 3


def test_conversations_without_images_that_have_a_folder_of_their_own_are_an_import(tmp_path):
    reader = record_reader("conversations", dump(tmp_path / "a.json", [{"conversations": turns(1, "")}]), None,
                           "understanding", Columns())  # fmt: skip
    assert not look(reader, tmp_path, text_out=tmp_path / "t")[0]["stops"] and look(reader, tmp_path)[0]["stops"]


def test_a_listing_whose_first_thousand_entries_are_skipped_stops_as_the_import_does(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[]\n" * 1000 + '{"text": "one"}\n')
    reader = record_reader("text", path, None, "text", Columns())
    summary, text = look(reader, tmp_path)
    assert summary["stops"] and summary["skipped"] == {"bad_record": 1000}
    assert "none of the first 1,000 entries would become a sample: the import would stop with exit status 3" in text
    with pytest.raises(DataError, match="none of the first 1,000 entries became a sample"):
        run(reader, tmp_path / "out")


def test_the_bounds_are_those_of_wilson_and_never_against_what_was_seen():
    assert _extrapolated(150, 200, 10_000) == (7500, 6857, 8049)
    assert _extrapolated(30, 60, 60) == (30, 30, 30) and _extrapolated(0, 0, 0) == (0, 0, 0)
    good, low, high = _extrapolated(199, 200, 201)
    assert 199 <= low <= high == 200 and good == 200


def test_of_a_webdataset_samples_of_eight_tars_are_judged_and_nothing_is_written(tmp_path, capsys):
    for number in range(20):
        samples = generation_samples(4)
        samples[0] = ("b", {**samples[0][1], "json": b"{}"})
        key, fields = samples[1]
        samples[1] = (key, {name: data if name == "json" else b"broken" for name, data in fields.items()})
        write_shard(tmp_path / f"{number:02d}.tar", samples)
    before = sorted(tmp_path.iterdir())
    words = ["data", "import", "webdataset", str(tmp_path), str(tmp_path / "out"), "--kind", "generation"]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "read the first samples of 8 of 20 tars, 32 in all: 8 not usable, 8 with an image that cannot be used" in out
    assert sorted(tmp_path.iterdir()) == before
    assert main([*words, "--json"]) == 0 and json.loads(capsys.readouterr().out)["samples"] == 60
