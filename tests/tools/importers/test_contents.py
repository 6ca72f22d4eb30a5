"""What a file is taken as, by its content, its name and the command; one that is refused is named for what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from jp_train.cli.main import main
from jp_train.tools.importers.contents import Contents, Form, contents_of, name_ending, not_text, taken_as
from tests.tools.importers.import_layouts import image_folder, notes_in, picture, skipped_in

RECORDS = [{"image": "000.jpg", "text": word, "caption": word} for word in ("one", "two")]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1).encode()
CSV = b"image,text,caption\n000.jpg,one,one\n000.jpg,two,two\n"
PROSE = b'{ This is how a story may begin.\n\n{"a": 1}\n[1] And so on.\n'
BOM = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"


def asking(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), buffer)
    return buffer.getvalue()


def as_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<w:t>one</w:t>")
    return buffer.getvalue()


def as_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return buffer.getvalue()


AS_LINES, AS_ARRAY = "JSON lines (by content)", "JSON array (by content)"
AS_CSV, AS_TEXT = "CSV or TSV (by name)", "plain text (by content)"
NO_RECORDS = "is plain text; expected JSON lines or a JSON array"
SAME = ""
TABLE: dict[str, tuple[bytes, str, str, str]] = {
    # content, names, what `import text` and `import pairs` take it as, or the sentence with which they refuse it
    "JSON lines": (
        LINES,
        "a.jsonl a.ndjson a.jl a.jsonlines a.JSONL a.jsonl.1 a.json a.json.txt a.md part-00000 x.y a.csv a.jsonl.gz",
        AS_LINES,
        SAME,
    ),
    "JSON lines, gzip": (gzip.compress(LINES), "a.jsonl.gz a.JSON.GZ a.jsonl part-00000.gz", AS_LINES, SAME),
    "JSON lines, bzip2": (bz2.compress(LINES), "a.jsonl.bz2 a", AS_LINES, SAME),
    "JSON lines, xz": (lzma.compress(LINES), "a.jsonl.xz a", AS_LINES, SAME),
    "JSON lines, zstd": (zstandard.compress(LINES), "a.jsonl.zst a.txt.zst a", AS_LINES, SAME),
    "JSON lines after a BOM": (BOM + LINES, "a.jsonl part-0", AS_LINES, SAME),
    "JSON lines of Windows": (b"\r\n" + LINES.replace(b"\n", b"\r\n"), "a.jsonl part-0", AS_LINES, SAME),
    "a JSON array": (ARRAY, "a.json a.JSON a.txt part-0", AS_ARRAY, SAME),
    "a JSON array after a BOM": (BOM + ARRAY, "a.json", AS_ARRAY, SAME),
    "a JSON array, gzip": (gzip.compress(ARRAY), "a.json.gz a", AS_ARRAY, SAME),
    "CSV": (CSV, "a.csv a.CSV", AS_CSV, SAME),
    "CSV after a BOM": (BOM + CSV, "a.csv", AS_CSV, SAME),
    "CSV, zstd": (zstandard.compress(CSV), "a.csv.zst", AS_CSV, SAME),
    "TSV": (CSV.replace(b",", b"\t"), "a.tsv", AS_CSV, SAME),
    "CSV of another name": (CSV, "a.txt part-0", AS_TEXT, NO_RECORDS),
    "prose that starts with a brace": (PROSE, "a.txt a", AS_TEXT, NO_RECORDS),
    "prose that starts with a bracket": (b"[Illustration]\n\nOnce\n", "a.txt a", AS_TEXT, NO_RECORDS),
    "prose, xz": (lzma.compress(b"Once upon a time\n"), "a.txt.xz a", AS_TEXT, NO_RECORDS),
    "Parquet": (
        as_parquet(),
        "a.parquet a.jsonl part-0",
        "is Parquet, which `jp-train data import parquet` reads",
        SAME,
    ),
    "a Word document": (as_zip(), "a.docx a.txt", "is a ZIP archive or an Office document: unpack it", SAME),
    "a PDF": (b"%PDF-1.7\nBT (one) Tj ET\n", "a.pdf a", "is a PDF: extract its text first", SAME),
    "a tar": (as_tar(), "a.tar a.txt", "is a tar archive: unpack it, or import it with", SAME),
    "a tar, gzip": (gzip.compress(as_tar()), "a.tar.gz", "is a tar archive", SAME),
    "an image": (picture(0), "a.jpg a.txt", "is an image (jpg)", SAME),
    "NUL bytes": (b"one\0two\n", "a.txt a.bin a.csv", "is binary data (a NUL byte at byte 3)", SAME),
    "UTF-16": ("one two".encode("utf-16"), "a.txt a.csv a.jsonl", "is UTF-16: write it as UTF-8 (iconv", SAME),
    "a Git LFS pointer": (POINTER, "a.jsonl a.txt a", "is a Git LFS pointer, not the file itself: run `git lfs", SAME),
    "an object over lines": (
        json.dumps({"data": RECORDS}, indent=1).encode(),
        "a.json a.json.gz",
        "is one JSON object",
        SAME,
    ),
    "a web page as records": (PAGE, "a.jsonl a.csv.gz", "is an HTML page, not the file itself", SAME),
}
CASES = [(what, name) for what, (_, names, _, _) in TABLE.items() for name in names.split()]


def typed(command: str, source: Path, out: Path, capsys, *options) -> tuple[int, str]:
    images = ["--kind", "generation", "--images", source.parent / "images"] if command == "pairs" else []
    words = ["data", "import", command, source, out, "--processes", "1", *images, *options]
    status = main([*map(str, words)])
    output = capsys.readouterr()
    return status, output.err + output.out


@pytest.mark.parametrize(("what", "name"), CASES, ids=[f"{what}-{name}" for what, name in CASES])
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path, capsys, what, name):
    content, _, by_text, by_pairs = TABLE[what]
    image_folder(tmp_path / "images", 1)
    (tmp_path / name).write_bytes(content)
    for command, result in (("text", by_text), ("pairs", by_pairs or by_text)):
        status, output = typed(command, tmp_path / name, tmp_path / command, capsys)
        if " (by " not in result:
            assert status in (2, 3) and f"{name} {result}" in output and not list((tmp_path / command).glob("*.tar"))
            continue
        assert status == 0 and f"1 file as {result}" in output
        notes = notes_in(tmp_path / command)
        if result == AS_TEXT:
            assert len(notes) == 1
        else:
            assert [note["text" if command == "text" else "caption"] for note in notes] == ["one", "two"]


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


OTHER = {"text": "two"}
NO_TEXT = 'no "text"; the record has '
FORMS: dict[str, tuple[str, bytes, list[str] | tuple[str, str], str]] = {
    # name of the file, content; the texts, or the entry and why it is skipped (beside "two" where that is there), or
    # the sentence of the refusal; options
    "another key": (
        "a.jsonl",
        lines({"content": "one"}),
        ("a.jsonl:1", NO_TEXT + '"content"; --text-column names'),
        "",
    ),
    "another key, named": ("a.jsonl", lines({"content": "one"}), ["one"], "--text-column content"),
    "null": ("a.jsonl", lines({"text": None}, OTHER), ("a.jsonl:1", '"text" is a NoneType, expected text'), ""),
    "a number": ("a.jsonl", lines({"text": 3}, OTHER), ("a.jsonl:1", '"text" is a int, expected text'), ""),
    "a list": ("a.jsonl", lines({"text": ["one"]}, OTHER), ("a.jsonl:1", '"text" is a list, expected text'), ""),
    "no word": ("a.jsonl", lines({"text": " "}, OTHER), ("a.jsonl:1", '"text" of .json is empty'), ""),
    "no record": ("a.jsonl", lines("one", OTHER), ("a.jsonl:1", "a str instead of an object with named values"), ""),
    "texts in an array": ("a.json", b'["one", {"text": "two"}]', ("a.json:1", "a str instead of an object"), ""),
    "half a line": ("a.jsonl", b'{"text": "one"\n' + lines(OTHER), ("a.jsonl:1", "no JSON that can be read"), ""),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}\n' + lines(OTHER), ("a.jsonl:1", "a lone surrogate"), ""),
    "Latin-1 lines": ("a.jsonl", b'{"text": "\xe9"}\n' + lines(OTHER), ("a.jsonl:1", "the record is not UTF-8"), ""),
    "Latin-1 cells": ("a.csv", b"text\n\xe9\ntwo\n", ("a.csv:1", "bytes that are not UTF-8"), ""),
    "Latin-1 text": ("a.txt", b"caf\xe9", ("a.txt", "the document is not UTF-8"), ""),
    "Alpaca": ("a.jsonl", lines({"instruction": "i", "output": "o"}), ("a.jsonl:1", NO_TEXT + '"instruction", "o'), ""),
    "semicolons": ("a.csv", b"text;lang\none;en\n", ("a.csv:1", NO_TEXT + '"text;lang"'), ""),
    "no header": ("a.csv", b"1,one\n2,two\n", ("a.csv:1", NO_TEXT + '"1", "one"'), ""),
    "two columns of one name": ("a.csv", b"text,text\none,two\n", ("a.csv:1", NO_TEXT + '"text (1 of 2)", "te'), ""),
    "other columns of one name": ("a.csv", b"text,,\none,,\n", ["one"], ""),
    "a late NUL": (
        "a.csv",
        b"text,n\n" + b"two," + b"9" * 9000 + b"\no\0ne,1\n",
        ("a.csv:2", "a NUL byte in a cell: it is no text"),
        "",
    ),
    "quotes": ("a.csv", b'text\n"one, ""two""\nthree"\n', ['one, "two"\nthree'], ""),
    "an open quote": ("a.csv", b'text\n"one\ntwo\n', ("", "correct the line (an unclosed quote?)"), ""),
    "nothing, text": ("a.txt", b"", ("a.txt", '"text" of .json is empty'), ""),
    "nothing, CSV": ("a.csv", b"", ("", "is empty"), ""),
    "no gzip": ("a.txt.gz", b"one", ["one"], ""),
    "two gzip streams": (
        "a.jsonl.gz",
        gzip.compress(lines({"text": "one"})) + gzip.compress(lines(OTHER)),
        ["one", "two"],
        "",
    ),
    "Windows line ends": ("a.txt", b"one\r\ntwo\r\n", ["one\r\ntwo"], ""),
    "a BOM": ("a.txt", BOM + b"one", ["one"], ""),
    "Markdown": ("a.md", b"# one\n", ["# one"], ""),
    "an endless number": (
        "a.jsonl",
        b'{"text": "one", "n": ' + b"9" * 5000 + b"}\n" + lines(OTHER),
        ("a.jsonl:1", "no JSON that can be read"),
        "",
    ),
    "not a number": ("a.jsonl", b'{"text": "one", "n": NaN}\n', ["one"], ""),
    "a conversation": ("a.jsonl", lines({"messages": asking("one", "two")}), ["one|two"], ""),
    "a text beside a conversation": ("a.jsonl", lines(OTHER | {"messages": asking("one", "two")}), ["one|two"], ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_text_of_this_form_is_taken_or_refused_with_its_sentence(tmp_path, capsys, form):
    name, content, expected, options = FORMS[form]
    (tmp_path / name).write_bytes(content)
    status, output = typed("text", tmp_path / name, tmp_path / "out", capsys, *options.split())
    texts = [
        note["text"] if "text" in note else "|".join(turn["value"] for turn in note["conversations"])
        for note in notes_in(tmp_path / "out")
    ]
    if isinstance(expected, list):
        assert status == 0 and texts == expected and not skipped_in(tmp_path / "out")
        return
    entry, sentence = expected
    assert status == (0 if texts else 3) and sentence in output and texts in ([], ["two"])
    assert not entry or entry == skipped_in(tmp_path / "out")[0][0]


@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_records_are_records_however_plain_text_would_be_cut(tmp_path, capsys, document):
    (tmp_path / "part-0").write_bytes(LINES)
    assert typed("text", tmp_path / "part-0", tmp_path / "out", capsys, "--document", document)[0] == 0
    assert [note["text"] for note in notes_in(tmp_path / "out")] == ["one", "two"]
    (tmp_path / "part-1").write_bytes(PROSE)
    assert typed("text", tmp_path / "part-1", tmp_path / "prose", capsys, "--document", "line")[0] == 0
    assert [note["text"] for note in notes_in(tmp_path / "prose")] == [
        line for line in PROSE.decode().split("\n") if line
    ]


def test_a_line_that_is_no_record_among_records_is_skipped_by_its_number(tmp_path, capsys):
    (tmp_path / "part-0").write_bytes(LINES * 3 + b"no record\n" + LINES)
    assert typed("text", tmp_path / "part-0", tmp_path / "out", capsys)[0] == 0
    assert skipped_in(tmp_path / "out") == [("part-0:7", "bad_record")] and len(notes_in(tmp_path / "out")) == 8


def test_a_file_that_is_no_document_among_documents_is_skipped_for_what_it_is(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, content in (("a.txt", b"one"), ("b.json", b'{\n "data": []\n}'), ("c.jsonl", PAGE), ("d.txt", POINTER)):
        (tmp_path / "in" / name).write_bytes(content)
    status, output = typed("text", tmp_path / "in", tmp_path / "out", capsys)
    assert status == 0 and "b.json: the document is one JSON object over several lines" in output
    assert skipped_in(tmp_path / "out") == [("b.json", "bad_record"), ("c.jsonl", "bad_record"), ("d.txt", "binary")]
    status, output = typed("pairs", tmp_path / "in", tmp_path / "pairs", capsys)
    assert status == 2 and "b.json is one JSON object" in output and "name the other files with a glob" in output


def test_a_binary_file_among_documents_is_skipped_and_one_whose_lines_would_be_documents_stops(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, content in (("a.txt", b"one"), ("b.txt", as_zip()), ("c.txt", b"x" * 9000 + b"\0"), ("d.txt", b"two")):
        (tmp_path / "in" / name).write_bytes(content)
    status, output = typed("text", tmp_path / "in", tmp_path / "out", capsys)
    assert status == 0 and "b.txt: the document is a ZIP archive or an Office document" in output
    assert skipped_in(tmp_path / "out") == [("b.txt", "binary"), ("c.txt", "binary")]
    status, output = typed("text", tmp_path / "in", tmp_path / "lines", capsys, "--document", "line")
    assert status == 2 and "b.txt is a ZIP archive" in output
    (tmp_path / "in" / "b.txt").unlink()
    assert typed("text", tmp_path / "in", tmp_path / "lines", capsys, "--document", "line")[0] == 0
    assert skipped_in(tmp_path / "lines") == [("c.txt:1", "binary")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.csv.gz", "a.json.zst"])
def test_a_compressed_file_that_is_cut_short_stops_with_its_name(tmp_path, capsys, name):
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
    many = {"csv": CSV, "json": json.dumps(RECORDS * 5000).encode()}.get(name.split(".")[1], LINES * 5000)
    whole = compress[name.rpartition(".")[2]](many)
    (tmp_path / name).write_bytes(whole[: len(whole) - 9])
    status, output = typed("text", tmp_path / name, tmp_path / "out", capsys)
    assert status == 3 and re.search(rf"cannot read \S*{name}", output)


def test_zstd_without_zstandard_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.jsonl").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    status, output = typed("text", tmp_path / "a.jsonl", tmp_path / "out", capsys)
    assert status == 2 and "pip install 'jp_train[zstd]'" in output


def test_files_of_two_forms_are_named_both(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "in" / "b.txt").write_bytes(PROSE)
    status, output = typed("text", tmp_path / "in", tmp_path / "out", capsys)
    assert status == 2 and "has records (a.jsonl) and plain text (b.txt)" in output
    (tmp_path / "in" / "b.txt").write_bytes(ARRAY)
    status, output = typed("text", tmp_path / "in", tmp_path / "out", capsys)
    assert status == 2 and "mixes JSON lines (a.jsonl) and JSON array (b.txt)" in output
    (tmp_path / "in" / "b.txt").write_bytes(b"")
    status, output = typed("text", tmp_path / "in", tmp_path / "out", capsys)
    assert status == 0 and "1 file as JSON lines (by content)" in output, "an empty file goes with any other"


def test_the_ending_of_a_name_is_what_is_below_compressions_and_numbers():
    names = ["a.JSONL.gz.1", "a.tar.gz", "part-00000", "part.00000", "a.b.txt", "a.zst"]
    assert [name_ending(name) for name in names] == [".jsonl", ".tar", "", "", ".txt", ""]


def test_contents_are_counted_by_form_and_what_told_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{broken\n" + LINES)
    assert contents_of(tmp_path / "a.jsonl") == Contents(form=Form.lines, by_content=False)
    by_name, lines = Contents(form=Form.lines, by_content=False), Contents(form=Form.lines)
    assert taken_as([lines, by_name, lines, Contents(form=Form.nothing)]) == (
        "2 files as JSON lines (by content), 1 file as JSON lines (by name)"
    )
    assert not_text(b"plain \xff") == ""
