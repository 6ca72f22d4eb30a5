"""Files that are replaced whole, and lines that a kill may have torn."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from jp_train import files
from jp_train.files import append_lines, read_json_lines, replacing, write_atomically


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
