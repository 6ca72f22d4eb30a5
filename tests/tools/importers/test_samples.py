"""An entry becomes a sample that the training loader takes, or a skip with the reason of the loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.tools.importers.entries import Entry, Skip
from jp_train.tools.importers.records import RecordReader
from jp_train.tools.importers.samples import MAIN, TEXT, SampleRules, check_sample, make_sample
from jp_train.types import Kind
from tests.data.data_samples import png
from tests.tools.importers.import_layouts import turns


def rules(kind: Kind, *, keep_text_only: bool = False) -> SampleRules:
    reader = RecordReader(source=Path("a.jsonl"), images=None, kind=kind)
    return SampleRules(reader=reader, decode=True, max_image_pixels=10_000, keep_text_only=keep_text_only)


def test_a_sample_holds_the_image_byte_for_byte_and_the_note_as_json():
    note = {"caption": "Größe", "source_id": "a.jsonl:4"}
    entry = Entry(number=3, name="a.jsonl:4", note=note, images=(png(5),), slug="a b/c")
    made = make_sample(entry, rules(Kind.GENERATION))
    assert (made.number, made.name, made.output, made.reason) == (3, "a.jsonl:4", MAIN, "") and not made.converted
    assert made.packed is not None and png(5) in made.packed
    assert json.dumps(note, ensure_ascii=False).encode() in made.packed
    assert b"000000003-a_b_c.png\0" in made.packed and b"000000003-a_b_c.json\0" in made.packed


@pytest.mark.parametrize("keep", [False, True])
def test_a_conversation_without_an_image_goes_to_the_text_output_or_is_skipped(keep):
    entry = Entry(number=0, name="a", note={"conversations": turns(1, "")}, text_only=True)
    made = make_sample(entry, rules(Kind.UNDERSTANDING, keep_text_only=keep))
    assert (made.output, made.reason) == ((TEXT, "") if keep else (MAIN, "text_only"))
    assert (made.packed is not None) == keep


@pytest.mark.parametrize(
    ("note", "image", "reason"),
    [
        ({"caption": "x"}, None, "no_image"),
        ({"caption": "x"}, "a.png", "image_missing"),
        ({"caption": "x"}, b"<html>", "image_undecodable"),
        ({"caption": "x"}, png(1, 101, 100), "image_too_large"),
        ({"caption": "x"}, png(1)[:-400], "image_undecodable"),
        ({"caption": "\ud800"}, png(1), "not_unicode"),
        ({"caption": object()}, png(1), "bad_record"),
        ({"caption": " "}, png(1), "empty_text"),
        ({}, png(1), "missing_field"),
    ],
)
def test_an_entry_that_training_would_not_take_is_skipped_with_its_reason(note, image, reason):
    images = () if image is None else (image,)
    made = make_sample(Entry(number=0, name="a", note=note, images=images), rules(Kind.GENERATION))
    assert (made.reason, made.packed) == (reason, None) and made.message


def test_a_sample_is_checked_by_the_loader_without_its_image():
    check_sample("k", {"json": b'{"caption": "a cat"}', "png": b""}, Kind.GENERATION)
    with pytest.raises(Skip) as caught:
        check_sample("k", {"json": b"{", "png": b""}, Kind.GENERATION)
    assert caught.value.fault == "bad_json"
