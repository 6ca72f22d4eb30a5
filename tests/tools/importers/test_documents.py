"""Text: a file, a paragraph or a line is a document; records are recognised by the names of their files."""

from __future__ import annotations

import gzip

import pytest

from jp_train.tools.importers.documents import text_reader
from jp_train.tools.importers.records import Columns
from tests.tools.importers.import_layouts import notes_in, run, samples_in, text_jsonl


def test_plain_text_is_cut_into_files_paragraphs_or_lines(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("\ufeffOne line.\nTwo.\n\n\n  \nThree.\n" + "long " * 300, encoding="utf-8")
    (folder / "b.txt.gz").write_bytes(gzip.compress("Four é.\n".encode()))
    texts = {}
    for document in ("file", "paragraph", "line"):
        run(text_reader(folder, document, Columns()), tmp_path / document)
        texts[document] = [note["text"] for note in notes_in(tmp_path / document)]
    long = ("long " * 300).strip()
    assert texts["file"] == [f"One line.\nTwo.\n\n\n  \nThree.\n{long}", "Four é."]
    assert texts["paragraph"] == ["One line.\nTwo.", f"Three.\n{long}", "Four é."]
    assert texts["line"] == ["One line.", "Two.", "Three.", long, "Four é."]
    assert [note["source_id"] for note in notes_in(tmp_path / "paragraph")] == ["a.txt:1", "a.txt:6", "b.txt.gz:1"]


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "*/*/*.jsonl", "."])
def test_records_are_known_as_records_however_a_glob_finds_them(tmp_path, pattern):
    text_jsonl(tmp_path / "in" / "a" / "b")
    run(text_reader(tmp_path / "in" / pattern, "file", Columns()), tmp_path / "out")
    assert len(samples_in(tmp_path / "out")) == 9
