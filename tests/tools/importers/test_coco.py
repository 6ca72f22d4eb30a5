"""COCO captions: an entry for every caption or every image, and what does not fit together is named."""

from __future__ import annotations

import json

from tests.tools.importers.import_layouts import coco, dump, notes_in, run, samples_in, skipped_in


def test_coco_gives_a_sample_for_every_caption_or_for_every_image(tmp_path):
    run(coco(tmp_path, 3), tmp_path / "captions")
    assert [note["caption"] for note in notes_in(tmp_path / "captions")] == [
        f"Caption {n}. More." for n in (0, 3, 1, 4, 2, 5)
    ]
    run(coco(tmp_path, 3, per="image"), tmp_path / "images-only")
    assert [note["caption"] for note in notes_in(tmp_path / "images-only")] == [f"Caption {n}. More." for n in range(3)]
    assert notes_in(tmp_path / "images-only")[1]["source_id"] == "captions.json image 101 annotation 1"


def test_coco_entries_that_do_not_fit_together_are_named(tmp_path):
    reader = coco(tmp_path, 2)
    value = json.loads(reader.source.read_text())
    value["images"] += [
        {"id": 5, "file_name": "none.jpg"},
        {"id": 6, "file_name": "000.jpg"},
        {"file_name": "x"},
        {"id": 7, "file_name": 3},
        "x",
    ]
    value["annotations"] += [
        {"id": 90, "image_id": 5, "caption": "c"},
        {"id": 91, "image_id": 404, "caption": "c"},
        {"id": 92, "caption": "c"},
    ]
    value["annotations"] += [{"id": 93, "image_id": 7, "caption": "c"}, {"id": 94, "image_id": 100, "caption": None}, 3]
    dump(reader.source, value)
    run(reader, tmp_path / "out")
    assert sorted(skipped_in(tmp_path / "out")) == sorted(
        [
            ("captions.json image 5 annotation 90", "image_missing"),
            ("captions.json image 6", "no_caption"),
            ("captions.json image at place 4", "bad_record"),
            ("captions.json image 7 annotation 93", "bad_record"),
            ("captions.json image at place 6", "bad_record"),
            ("captions.json image 404 annotation 91", "image_missing"),
            ("captions.json image 100 annotation 94", "missing_field"),
            ("captions.json annotation at place 6", "bad_record"),
            ("captions.json annotation at place 9", "bad_record"),
        ]
    )
    assert len(samples_in(tmp_path / "out")) == 4
