"""Files that are replaced whole, and lines that a kill may have torn."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from jp_train import files
from jp_train.files import (
    FORMATS,
    append_lines,
    known_format,
    other_format_at,
    read_json_lines,
    replacing,
    stand_in,
    stand_in_at,
    text_format,
    write_atomically,
)


def test_a_replacement_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of it")
        raise RuntimeError
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["a.json"])
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert (path.read_text(), os.listdir(tmp_path)) == ("new", ["a.json"])


@pytest.mark.parametrize(("durable", "synced"), [(True, ["file", "folder"]), (False, [])])
def test_a_durable_replacement_syncs_the_file_and_then_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, synced: list[str]
) -> None:
    seen = []
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: seen.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
    )
    write_atomically(tmp_path / "a", "é", durable=durable)
    assert ((tmp_path / "a").read_bytes(), seen) == ("é".encode(), synced)


def test_appended_lines_are_read_back_whatever_their_keys_hold_and_never_run_into_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    entries = [{"key": "line\u2028end"}, {"key": "é\n"}, {"key": "x" * 10}]
    append_lines(path, [json.dumps(entry, ensure_ascii=False) for entry in entries])
    with path.open("ab") as file:
        file.write(b'{"key": "cut sho')
    append_lines(path, ['{"key": "\udcff"}'])
    with path.open(encoding="utf-8") as lines:
        assert list(read_json_lines(lines)) == [*entries, None, {"key": "\udcff"}]


def test_a_torn_line_is_told_as_none_and_the_object_behind_it_is_recovered() -> None:
    lines = ['{"step": 1}\n', '{"step": 2, "loss": 0.\n', "\n", "[1]\n", '{"step": 3, "lo{"step": 4}\n', '{"step": 5']
    assert list(read_json_lines(lines)) == [{"step": 1}, None, None, None, {"step": 4}, None]
    assert json.loads(lines[0]) == {"step": 1}


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4180000000\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LFS_POINTER, "Git LFS pointer.*git lfs pull"),
        (b"\n <!DOCTYPE html><html><body>Sign in</body>", "HTML page"),
        (b'{"error": "Unauthorized"}', 'server.s answer.*: {"error": "Unauthorized"}'),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "server.s answer"),
        (b"", "empty file"),
    ],
)
def test_what_lies_in_place_of_a_file_is_told_by_its_first_bytes(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a").write_bytes(content)
    found = stand_in_at(tmp_path / "a")
    assert re.search(what, found) and found == stand_in(content)


@pytest.mark.parametrize("content", [b"\x80\x02}q", b"PK\x03\x04", b'{"weight_map": {}}', b"000000.jpg\0", b"text"])
def test_files_that_are_what_they_should_be_are_no_stand_in(content: bytes) -> None:
    assert stand_in(content) == ""


def test_a_file_that_is_gone_is_no_stand_in(tmp_path: Path) -> None:
    assert stand_in_at(tmp_path / "absent") == other_format_at(tmp_path / "absent") == ""


@pytest.mark.parametrize(("at", "magic", "what"), FORMATS)
def test_a_file_of_another_format_is_named_for_it(tmp_path: Path, at: int, magic: bytes, what: str) -> None:
    (tmp_path / "a").write_bytes(bytes(at) + magic + bytes(9))
    assert other_format_at(tmp_path / "a") == f"is {what}" and known_format(b"-" + magic) == ""


def test_text_is_told_from_bytes_even_where_a_letter_is_cut() -> None:
    assert text_format("[é".encode()[:2]).startswith("JSON") and text_format("aé".encode()[:2]).startswith("plain text")
    assert [text_format(head) for head in (b"", b" \n", b"\xff", b"{\0")] == [""] * 4
