"""A record about an image, a video or sound that is not read is no conversation of text."""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from jp_train.tools.importers.command import import_command
from jp_train.tools.importers.documents import text_reader
from jp_train.tools.importers.media import is_media, unread_media
from jp_train.tools.importers.parquet import ParquetReader
from jp_train.tools.importers.records import Columns, record_reader
from jp_train.tools.importers.run import ImportSettings
from jp_train.types import Kind
from tests.tools.importers.import_layouts import image_folder, notes_in, run, skipped_in

TURNS = [{"from": "human", "value": "What is on it?"}, {"from": "gpt", "value": "A cat."}]


def asking(question: str) -> list[dict]:
    return [{"from": "human", "value": question}, TURNS[1]]


UNREAD = {
    "LLaVA-Video": ({"video": "x.mp4", "conversations": asking("<video>\nWhat happens?")}, '"video" is not read: only'),
    "path": (
        {"image_path": "0.jpg", "messages": TURNS},
        '"image_path" is not read: images come from "image"; name another column with --image-column image_path',
    ),
    "capitals": ({"IMG": "0.jpg", "conversations": TURNS}, "--image-column IMG"),
    "number": (
        {"image": {"id": 7}, "conversations": TURNS},
        '"image" is not read: it has none of "bytes", "path", "file_name" and "url"',
    ),
    "sound": (
        {"audios": [{"path": "a.wav"}], "conversations": TURNS},
        '"audios" is not read: only images and text are',
    ),
    "Qwen": ({"conversations": asking("Picture 1: <img>0.jpg</img>\nWhat?")}, "a question has <img>, and nothing"),
    "InternVL": ({"conversations": asking("<IMG_CONTEXT>\nWhat?")}, "a question has <IMG_CONTEXT>"),
    "marker": ({"conversations": asking("What?\n<Image>")}, "a question has <Image>"),
    "null image": ({"image": None, "conversations": asking("<image>\nWhat?")}, "a question has <image>"),
}
TEXT = [
    {"image": "", "conversations": TURNS},
    {"image": None, "video": None, "audios": [], "conversations": TURNS},
    {"image": {"bytes": None, "path": None}, "images": [""], "num_images": 0, "conversations": TURNS},
    {"id": 7, "conversations": [TURNS[0], {"from": "gpt", "value": "Write <video> in HTML."}]},
]


@pytest.mark.parametrize("with_texts", [True, False])
def test_a_conversation_about_what_is_not_read_is_skipped_by_the_name_of_its_field(tmp_path, with_texts):
    records = [{"image": "000.jpg", "conversations": asking("<image>\nWhat?")}, *(each for each, _ in UNREAD.values())]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, *TEXT]))
    reader = record_reader(
        "conversations", tmp_path / "mix.jsonl", image_folder(tmp_path / "images", 1), "understanding", Columns()
    )
    texts = tmp_path / "text" if with_texts else None
    summary, text = import_command(reader, ImportSettings(out=tmp_path / "out", text_out=texts))
    assert summary["skipped"] == {"unread_media": len(UNREAD)} | ({} if with_texts else {"text_only": len(TEXT)})
    assert 'mix.jsonl:2: "video" is not read: only images and text are' in text
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    about_media = [line["message"] for line in lines if line["reason"] == "unread_media"]
    for (name, (_, message)), said in zip(UNREAD.items(), about_media, strict=True):
        assert message in said, name
    if with_texts:
        assert [note["source_id"] for note in notes_in(tmp_path / "text")] == [f"mix.jsonl:{n}" for n in range(11, 15)]


def test_an_import_of_text_skips_such_conversations_and_keeps_documents(tmp_path):
    records = [
        {"image": "0.jpg", "conversations": TURNS},
        {"image": None, "conversations": TURNS},
        {"image_url": "http://host/teaser.jpg", "text": "An article with <video> tags."},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run(text_reader(tmp_path / "a.jsonl", "file", Columns()), tmp_path / "out")
    assert skipped_in(tmp_path / "out") == [("a.jsonl:1", "unread_media")]
    assert '"image" is not read: `import conversations --image-column image`' in (
        (tmp_path / "out" / "skipped.jsonl").read_text().replace('\\"', '"')
    )


def test_a_pair_whose_image_is_in_another_column_says_which(tmp_path):
    records = [{"image": "000.jpg", "caption": "c"}, {"img": "000.jpg", "caption": "c"}, {"caption": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reader = record_reader("pairs", tmp_path / "a.jsonl", image_folder(tmp_path / "i", 1), "generation", Columns())
    run(reader, tmp_path / "out")
    assert skipped_in(tmp_path / "out") == [("a.jsonl:2", "unread_media"), ("a.jsonl:3", "no_image")]
    assert "--image-column img" in (tmp_path / "out" / "skipped.jsonl").read_text()


@pytest.mark.parametrize(("kind", "skipped"), [("text", [2, 3]), ("understanding", [1, 3])])
def test_columns_of_parquet_that_are_not_read_count_too(tmp_path, kind, skipped):
    image_folder(tmp_path / "images", 1)
    rows = {"conversations": [TURNS] * 3, "image": [None, "000.jpg", None], "video": [None, None, "v.mp4"]}
    rows["conversations"][1] = asking("<image>\nWhat?") if kind == "understanding" else TURNS
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    images = tmp_path / "images" if kind == "understanding" else None
    reader = ParquetReader(source=tmp_path / "a.parquet", images=images, kind=Kind(kind))
    run(reader, tmp_path / "out")
    reasons = {"text": "unread_media", "understanding": "text_only"}
    assert skipped_in(tmp_path / "out") == [
        (f"a.parquet:{skipped[0]}", reasons[kind]),
        (f"a.parquet:{skipped[1]}", "unread_media"),
    ]
    summary, _ = import_command(reader, ImportSettings(out=tmp_path / "none"), dry_run=True)
    assert summary["entries"] == 3


def test_names_that_only_begin_alike_and_what_is_read_are_no_media():
    assert all(
        map(is_media, ("image", "Images", "image_0", "imgPath", "picture", "video_url", "audio", "sound", "media"))
    )
    assert not any(map(is_media, ("caption", "num_images", "my_image", "text", "im")))
    assert unread_media({"image_note": "n", 3: "x"}, ["image_note"], None, "{}") == ""
