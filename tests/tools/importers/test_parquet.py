"""Parquet: image bytes, text and conversations; without pyarrow the error names the extra."""

from __future__ import annotations

import base64
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet as files

from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.field_map import Fields, field_map
from jp_train.data.samples import parse_variants
from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.parquet import ParquetReader
from jp_train.tools.importers.records import Columns
from jp_train.types import Kind, RawSample, SourceInfo
from tests.data.data_samples import png
from tests.tools.importers.import_layouts import notes_in, parquet, picture, run, samples_in, turns

QUESTION = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
PARTS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
]
PNG, OTHER = png(0), png(1)
STRUCT, BASE64 = {"bytes": PNG, "path": "a.png"}, base64.b64encode(PNG).decode()
ASKED, CAPTIONED = [("What?", "A.")], "A cat."
FORMS = {
    # one row: columns, kind, how they are named; what becomes of it: turns or caption, its images, or the sentence
    "image feature of datasets": ({"image": STRUCT, "caption": CAPTIONED}, "generation", {}, [CAPTIONED], 1),
    "bytes": ({"jpg": PNG, "txt": CAPTIONED}, "generation", {"image": "jpg", "caption": "txt"}, [CAPTIONED], 1),
    "large binary, dictionary": (
        {
            "image": pyarrow.array([PNG], pyarrow.large_binary()),
            "caption": pyarrow.array([CAPTIONED]).dictionary_encode(),
        },
        "generation",
        {},
        [CAPTIONED],
        1,
    ),
    "base64": ({"image": BASE64, "caption": CAPTIONED}, "generation", {}, [CAPTIONED], 1),
    "list of captions": ({"image": STRUCT, "caption": [CAPTIONED, "B."]}, "generation", {}, [CAPTIONED, "B."], 1),
    "captions by language": (
        {"image": STRUCT, "caption": {"en": [CAPTIONED]}},
        "generation",
        {},
        '"caption" is a dict, expected text',
        0,
    ),
    "addresses": (
        {"url": "http://h/0.jpg", "caption": CAPTIONED},
        "generation",
        {},
        "-column; images behind addresses are to be downloaded first (img2dataset)",
        0,
    ),
    "address as path": ({"image": "http://h/0.jpg", "caption": CAPTIONED}, "generation", {}, "is an address", 0),
    "two images to generate": (
        {"images": [STRUCT, STRUCT], "caption": CAPTIONED},
        "generation",
        {},
        "lists 2 images",
        0,
    ),
    "messages, a list of one image": ({"messages": QUESTION, "images": [STRUCT]}, "understanding", {}, ASKED, 1),
    "OneVision, without an image": (
        {"conversations": QUESTION, "image": pyarrow.nulls(1)},
        "understanding",
        {},
        "no image",
        0,
    ),
    "Cauldron": (
        {"texts": [{"user": "What?", "assistant": "A.", "source": "s"}], "images": [STRUCT]},
        "understanding",
        {},
        ASKED,
        1,
    ),
    "FineVision": (
        {"texts": [{"user": "What?", "assistant": "A."}], "images": [STRUCT, {"bytes": OTHER, "path": None}]},
        "understanding",
        {},
        ASKED,
        2,
    ),
    "VSFT": ({"messages": PARTS, "images": [STRUCT]}, "understanding", {}, ASKED, 1),
}


def made_of(files_of: dict[str, bytes], kind: str) -> tuple[Any, tuple[bytes, ...]]:
    """Turns, captions or text of a sample, and its images."""
    raw = RawSample(info=SourceInfo(source="s", shard="s.tar", key="k"), fields=files_of)
    texts = Fields(raw, field_map(SourceConfig(kind=SourceKind(kind))))
    samples = parse_variants(texts, image_slots=16, codebook_size=64)
    if kind == "generation":
        return [sample.caption for sample in samples], (samples[0].image,)
    (sample,) = samples
    return [(turn.question, turn.answer) for turn in sample.turns] or sample.text, getattr(sample, "images", ())


@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_this_form_becomes_its_sample_or_is_refused_with_its_sentence(tmp_path, name):
    columns, kind, names, expected, images = FORMS[name]
    arrays = {n: v if isinstance(v, pyarrow.Array) else pyarrow.array([v]) for n, v in columns.items()}
    files.write_table(pyarrow.table(arrays), tmp_path / "a.parquet")
    reader = ParquetReader(source=tmp_path / "a.parquet", images=None, kind=Kind(kind), columns=Columns(**names))
    if isinstance(expected, str):
        with pytest.raises((ConfigError, DataError)) as caught:
            run(reader, tmp_path / "out")
        assert expected in str(caught.value)
        return
    run(reader, tmp_path / "out")
    ((_, sample),) = samples_in(tmp_path / "out")
    assert made_of(sample, kind) == (expected, (PNG, OTHER)[:images])


def test_parquet_of_text_and_of_conversations(tmp_path):
    (tmp_path / "t").mkdir()
    files.write_table(
        pyarrow.table({"body": [f"text {n}" for n in range(5)]}), tmp_path / "t" / "a.parquet", row_group_size=2
    )
    run(
        ParquetReader(source=tmp_path / "t", images=None, kind=Kind.TEXT, columns=Columns(text="body")),
        tmp_path / "out",
    )
    assert [note["text"] for note in notes_in(tmp_path / "out")] == [f"text {n}" for n in range(5)]
    assert [note["source_id"] for note in notes_in(tmp_path / "out")] == [f"a.parquet:{n}" for n in range(1, 6)]
    rows = {
        "image": [{"bytes": picture(n), "path": None} for n in range(3)],
        "conversations": [turns(n) for n in range(3)],
    }
    files.write_table(pyarrow.table(rows), tmp_path / "d.parquet")
    run(ParquetReader(source=tmp_path / "d.parquet", images=None, kind=Kind.UNDERSTANDING), tmp_path / "und")
    assert [note["conversations"] for note in notes_in(tmp_path / "und")] == [turns(n) for n in range(3)]
    with pytest.raises(ConfigError, match="no column 'text'; it has body.*--text-column"):
        run(ParquetReader(source=tmp_path / "t", images=None, kind=Kind.TEXT), tmp_path / "none")


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    reader = parquet(tmp_path / "in")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'jp_train\[parquet\]'"):
        run(reader, tmp_path / "out")


def test_parquet_is_known_by_its_first_bytes_where_a_name_has_no_ending_and_a_pointer_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    whole = parquet(tmp_path / "made").source
    (whole / "part-0.parquet").rename(tmp_path / "in" / "part-00000")
    (whole / "part-1.parquet").rename(tmp_path / "in" / "b.PARQUET")
    (tmp_path / "in" / "README").write_bytes(b"Some words.\n")
    reader = ParquetReader(source=tmp_path / "in", images=None, kind=Kind.GENERATION)
    assert reader.listing().left_out == {"without ending": 1}
    run(reader, tmp_path / "out")
    assert len(notes_in(tmp_path / "out")) == 9
    (tmp_path / "in" / "b.PARQUET").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    )
    with pytest.raises(DataError, match="b.PARQUET is a Git LFS pointer"):
        reader.listing()
