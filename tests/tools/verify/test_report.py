"""The report of a pass, from findings made by hand: what is counted, what is clean, what a person reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jp_train import data
from jp_train.config.schema import RunConfig
from jp_train.data.shards import Shard
from jp_train.tools.verify.faults import REMEDIES
from jp_train.tools.verify.report import Report, format_report, lengths_by_source, write_report
from jp_train.tools.verify.shard import EDGES, Fault, ShardReport


def fault(key, kind="bad_json", *, shard="/data/a.tar", source="s", **options):
    return Fault(fault=kind, source=source, shard=shard, key=key, offset=512, reason=f"reason of {key}", **options)


def shard_report(path="/data/a.tar", *faults, source="s", lengths=(10, 20), **options):
    counts = np.histogram(lengths, [*EDGES, 1 << 40])[0]
    shard = Shard(path=path, size=1 << 20, stamp="7")
    numbers = {"samples": len(lengths) + len(faults), "good": len(lengths), "tokens": sum(lengths)}
    return ShardReport(
        source=source,
        kind="text",
        shard=shard,
        longest=max(lengths),
        lengths=counts,
        faults=list(faults),
        **numbers,
        **options,
    )


def test_every_class_of_a_bad_sample_has_a_remedy():
    code = "".join(path.read_text() for path in Path(data.__file__).parent.glob("*.py"))
    classes = {name for text in re.findall(r"SkipSample\((.*?)\)\s*(?:from|\n)", code, re.S) for name in _class(text)}
    assert {"bad_class", "bad_mapping", "bad_dialogue", "empty_text"} <= classes <= REMEDIES.keys()


def _class(arguments: str) -> list[str]:
    return re.findall(r',\s*"([a-z_]+)",?\s*$', arguments)


def report_of(*shards, **options):
    return Report(
        sources={"s": "text"}, shards=list(shards), decode=None, seconds=1.5, **{"unreachable": [], **options}
    )


@pytest.fixture
def written(tmp_path):
    """(document, text) of a report."""

    def write(report):
        document = write_report(report, RunConfig(), tmp_path)
        assert json.loads((tmp_path / "verify.json").read_text()) == document and (tmp_path / "lengths.png").exists()
        return document, format_report(report, document)

    return write


def test_the_document_counts_samples_faults_and_lengths_by_source(written):
    shards = shard_report("/data/a.tar", fault("x"), fault("y")), shard_report("/data/b.tar", lengths=(20, 300))
    missing = fault(None, "unreadable", shard="/data/c.tar")
    document, text = written(report_of(*shards, unreachable=[missing]))
    (source,) = document["sources"]
    expected = {"shards": 3, "broken_shards": 1, "samples": 6, "usable": 4, "tokens": 350, "longest": 300}
    assert {name: source[name] for name in expected} == expected
    assert source["faults"] == {"bad_json": 2, "unreadable": 1} and not source["warnings"]
    assert [finding["key"] for finding in document["findings"]] == [None, "x", "y"]
    assert all(finding["remedy"] == REMEDIES[finding["fault"]] for finding in document["findings"])
    edges, counts = document["lengths"]["edges"], document["lengths"]["documents"]["s"]
    assert sum(counts) == 4 and edges[-1] <= 300 < EDGES[len(edges)], "the empty bins at the end are left out"
    np.testing.assert_array_equal(lengths_by_source(report_of(*shards))["s"][: len(counts)], counts)
    assert "1 shards cannot be used: training refuses to start with them" in text
    assert text.splitlines()[-1].startswith("faults found: 6 samples in 2 shards, 2.0 MiB in 1.5 s; ")


def test_only_warnings_and_samples_that_were_excluded_before_leave_a_pass_clean():
    warning, hidden = fault("w", "over_long", warning=True), fault("x", "picture_truncated", image=True)
    place = ("s", "/data/a.tar", "x")
    assert report_of(shard_report()).clean and report_of(shard_report("/data/a.tar", warning)).clean
    assert not report_of(shard_report("/data/a.tar", hidden)).clean
    assert report_of(shard_report("/data/a.tar", hidden), excluded={place}).clean
    assert not report_of(shard_report("/data/a.tar", hidden), excluded={place}, newly_excluded={place}).clean
    shown = fault("x", "bad_json")
    assert not report_of(shard_report("/data/a.tar", shown), excluded={place}).clean, "the index names it itself"


def test_the_text_names_three_examples_of_a_class_and_escapes_what_would_steer_a_terminal(written):
    faults = [fault(f"k{number}\x1b[31m") for number in range(5)]
    document, text = written(report_of(shard_report("/data/a.tar", *faults)))
    lines = text.splitlines()
    start = lines.index("fault bad_json in s:")
    assert lines[start + 1] == "  k0\\x1b[31m in a.tar at byte 512: reason of k0\\x1b[31m"
    assert lines[start + 4] == f"  … and 2 more, all in {document['files']['report']}"
    assert lines[start + 5] == f"  remedy: {REMEDIES['bad_json']}"
    assert text.count("reason of") == 3 and len(document["findings"]) == 5


def test_a_pass_that_decoded_a_part_says_so(written):
    report = report_of(shard_report(decoded=2))
    report.decode = 2
    document, text = written(report)
    assert not document["all_pictures_decoded"] and document["pictures_decoded"] == 2
    assert "only 2 images were decoded" in text
