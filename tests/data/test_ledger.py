from __future__ import annotations

import json
import tarfile
from dataclasses import replace

import pytest

from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.index import BadSample, SourceIndex, index_sources
from jp_train.data.ledger import Ledger, bad_share
from jp_train.data.tokenizer import load_tokenizer
from jp_train.errors import DataError
from jp_train.types import DocumentRef, SkippedDocument, SourceInfo
from tests.data.data_samples import generation_samples, write_shard


def bad(count: int, source: str = "a") -> list[SkippedDocument]:
    return [
        SkippedDocument(
            info=SourceInfo(source=source, shard="x.tar", key=f"k{n}"),
            ref=DocumentRef(source=0, epoch=0, sample=n, start=0, length=9),
            reason="undecodable é",
        )
        for n in range(count)
    ]


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_skip_is_one_line_with_source_shard_key_and_reason(cfg, tmp_path):
    Ledger(tmp_path / "run", cfg).record(bad(2), {"a": 100}, step=5)
    entries = lines(tmp_path / "run")
    assert [entry["key"] for entry in entries] == ["k0", "k1"]
    assert {key: entries[0][key] for key in ("step", "source", "shard", "reason")} == {
        "step": 5,
        "source": "a",
        "shard": "x.tar",
        "reason": "undecodable é",
    }
    assert entries[1]["document"]["sample"] == 1


def test_a_step_without_skips_writes_nothing(cfg, tmp_path):
    Ledger(tmp_path, cfg).record([], {"a": 100}, step=0)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_the_minimum_is_always_allowed_and_one_more_stops_with_the_counts(cfg, tmp_path):
    cfg.data.skip_minimum, cfg.data.skip_budget = 3, 0.0
    ledger = Ledger(tmp_path, cfg)
    ledger.record(bad(3), {"a": 7, "b": 50}, step=0)
    ledger.record(bad(3, "b"), {"a": 1, "b": 50}, step=1)  # each source has its own budget
    with pytest.raises(
        DataError, match=r"source 'a': 4 bad samples of 13 by step 2 exceed the budget of 3 .*k0.*undecodable"
    ):
        ledger.record(bad(1), {"a": 1}, step=2)
    assert len(lines(tmp_path)) == 7  # the one that broke the budget is named too


def test_the_budget_grows_with_the_samples_used(cfg, tmp_path):
    cfg.data.skip_minimum, cfg.data.skip_budget = 1, 0.01
    ledger = Ledger(tmp_path, cfg)
    ledger.record(bad(5), {"a": 1000}, step=0)
    ledger.record(bad(5), {"a": 1000}, step=1)
    with pytest.raises(DataError, match="exceed the budget"):
        ledger.record(bad(12), {"a": 10}, step=2)


def test_bad_samples_on_end_stop_the_run_and_a_good_one_starts_the_count_anew(cfg, tmp_path):
    cfg.data.skip_minimum, cfg.data.skip_consecutive = 1000, 6
    ledger = Ledger(tmp_path, cfg)
    ledger.record(bad(5), {"b": 9}, step=0)
    ledger.record(bad(5), {"a": 1}, step=1)
    ledger.record(bad(3), {}, step=2)
    with pytest.raises(DataError, match=r"6 bad samples on end by step 3"):
        ledger.record(bad(3), {"b": 9}, step=3)


def test_counts_survive_a_resume_and_other_ranks_write_nothing(cfg, tmp_path):
    cfg.data.skip_minimum = 4
    first = Ledger(tmp_path, cfg)
    first.record(bad(3), {"a": 10}, step=0)
    for write in (True, False):
        second = Ledger(tmp_path, cfg, write=write)
        second.restore(json.loads(json.dumps(first.state())))
        assert second.skipped == 3
        with pytest.raises(DataError, match="5 bad samples of 16"):
            second.record(bad(2), {"a": 1}, step=1)
    assert len(lines(tmp_path)) == 5


def test_samples_that_the_index_leaves_out_are_named_once(cfg, tmp_path):
    left_out = tuple(
        BadSample(info=SourceInfo(source="a", shard="x.tar", key=f"k{n}"), reason="no .json") for n in range(3)
    )
    index = SourceIndex(
        locator=None, tokens=None, short_tokens=None, dropped_tokens=None, conversations=0, bad=left_out
    )
    for _ in range(2):
        Ledger(tmp_path, cfg).record_index([index])
    entries = lines(tmp_path)
    assert [(entry["step"], entry["key"]) for entry in entries] == [(None, "k0"), (None, "k1"), (None, "k2")]


def test_a_source_of_mostly_bad_samples_is_refused_with_their_share_and_most_common_reason(cfg, tmp_path):
    """Six records end too early, each elsewhere; two have a file name with a dot (`g.edited.png` is field `edited.png`
    of `g`)."""
    good, dotted = generation_samples(12), generation_samples(2, 18)
    cut = [(key, {**fields, "json": b" " * n + b"{"}) for n, (key, fields) in enumerate(generation_samples(6, 12))]
    dotted = [(key, {f"edited.{name}": value for name, value in fields.items()}) for key, fields in dotted]
    write_shard(tmp_path / "a.tar", [*dotted, *good, *cut])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for number in range(30):
            tar.addfile(tarfile.TarInfo(f"._{number}.jpg"))  # what macOS adds belongs to no sample
    source = SourceConfig(kind=SourceKind.generation, shards=str(tmp_path / "a.tar"))
    (index,) = index_sources(cfg, load_tokenizer(cfg.tokenizer), sources={"a": source})
    assert len({sample.reason for sample in index.bad}) == 6 + 1 + 1
    text = bad_share(index, 0.4, "validation.sources")
    assert text.startswith(
        "validation.sources.a: 8 of 20 samples (40 %) are bad and left out; 6 of them like key 'g0012'"
    )
    assert text.endswith(next(sample.reason for sample in index.bad if sample.info.key == "g0012"))
    with pytest.raises(DataError, match=r"data\.max_bad_share is 0\.39: .*data verify.*data\.max_bad_share=0\.4 to"):
        bad_share(index, 0.39)
    assert bad_share(replace(index, bad=()), 0.0) == ""


def test_held_out_samples_are_named_once_under_their_own_source_and_cost_no_budget(cfg, tmp_path):
    cfg.data.skip_minimum, cfg.data.skip_budget = 0, 0.0
    index = SourceIndex(
        locator=None,
        tokens=None,
        short_tokens=None,
        dropped_tokens=None,
        conversations=0,
        bad=(BadSample(info=SourceInfo(source="a", shard="v.tar", key="q\u2028\udcff"), reason="no .json"),),
    )
    for _ in range(3):
        ledger = Ledger(tmp_path, cfg)
        assert ledger.record_held_out([index], bad(2)) == 2
        assert ledger.skipped == 0
    text = (tmp_path / "ledger.jsonl").read_bytes().split(b"\n")
    named = [(entry["source"], entry["key"], entry["step"]) for entry in map(json.loads, filter(None, text))]
    assert named == [
        ("validation/a", "q\u2028\udcff", None),
        ("validation/a", "k0", None),
        ("validation/a", "k1", None),
    ]
