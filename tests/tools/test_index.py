"""`jp-train data index`: its table, its progress, and what a terminal gets of foreign keys."""

from __future__ import annotations

import io
import tarfile

import pytest

from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.index import IndexProgress
from jp_train.errors import ConfigError
from jp_train.tools.index import IndexProgressLine, SourceSummary, format_table, index_command


def test_the_index_command_prints_a_table_and_progress(mixed):
    cfg = mixed()
    cfg.validation.sources = {"held": SourceConfig(kind=SourceKind.text, shards="text.tar")}
    table, progress = io.StringIO(), io.StringIO()
    summary = index_command(cfg, 1, table=table, progress=progress)
    assert [source["name"] for source in summary["sources"]] == ["real", "stored", "und", "text", "validation/held"]
    assert summary["sources"][0]["samples"] == 25 and summary["sources"][0]["shards"] == 2
    first, *_, last = progress.getvalue().splitlines()
    samples = sum(source["samples"] for source in summary["sources"])
    assert first.startswith("index: 6 shards (") and last.startswith(f"index: shard 6/6, {samples} samples, 100%, ")
    assert table.getvalue().splitlines()[0].split() == [
        "source",
        "kind",
        "samples",
        "tokens",
        "tokens/sample",
        "bad",
        "shards",
        "MiB",
        "id",
        "bytes/sample",
    ]


def test_keys_that_no_terminal_can_show_are_escaped_in_the_table(cfg, tmp_path, tokenizer):
    cfg.data.root = str(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, text in (("\udcff\x1b[31m.txt", b""), ("good.txt", b"some words")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    table = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    cfg.data.sources = {"s": SourceConfig(kind=SourceKind.text, shards="a.tar")}
    index_command(cfg, 1, table=table, progress=io.StringIO())
    table.flush()
    assert b"bad in s: \\udcff\\x1b[31m in " in table.buffer.getvalue()


def test_the_table_divides_by_samples_and_counts_the_bad_ones_that_it_does_not_name():
    summary = SourceSummary(
        name="text",
        kind="text",
        samples=4,
        tokens=10,
        bad=5,
        shards=2,
        mib=1.25,
        id_bytes_per_sample=12.4,
        bad_examples=("k in a.tar: no .txt",),
        taken={".txt": 3, '"text" of .json': 1},
        filtered={"not width >= 384": 1200},
        notes={},
        images=0,
        passed_over="1 *.tar.gz passed over",
    )
    _, row, texts, left_out, over, *bad = format_table([summary]).splitlines()
    assert texts == 'texts of text: .txt (3), "text" of .json (1)'
    assert left_out == "left out of text: 1,200 not width >= 384"
    assert over == "text: 1 *.tar.gz passed over"
    assert row.split() == ["text", "text", "4", "10", "2.5", "5", "2", "1.2", "12"]
    assert bad == ["bad in text: k in a.tar: no .txt", "bad in text: … and 4 more (the ledger of a run names all)"]


def test_no_time_left_is_claimed_before_a_shard_is_done_and_a_second_index_begins_anew():
    stream = io.StringIO()
    line = IndexProgressLine(stream)
    for _ in range(2):
        for done in (0, 1, 2):
            line(IndexProgress(shards_done=done, shards=2, samples=3 * done, bytes_done=done << 20, bytes=2 << 20))
    announced, last = "index: 2 shards (2.0 MiB) are to be indexed", "index: shard 2/2, 6 samples, 100%, 0.0 s"
    assert stream.getvalue().splitlines() == [announced, last] * 2


def test_a_config_without_sources_is_refused_with_the_key(cfg):
    cfg.data.sources = {}
    with pytest.raises(ConfigError, match="data.sources"):
        index_command(cfg, 1)
