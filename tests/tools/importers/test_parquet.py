"""Parquet: image bytes, text and conversations; without pyarrow the error names the extra."""

from __future__ import annotations

import pytest

from jp_train.errors import ConfigError
from jp_train.tools.importers.parquet import ParquetReader
from jp_train.tools.importers.records import Columns
from jp_train.types import Kind
from tests.tools.importers.import_layouts import notes_in, parquet, picture, run, turns


def test_parquet_of_text_and_of_conversations(tmp_path):
    import pyarrow
    from pyarrow import parquet as files

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
