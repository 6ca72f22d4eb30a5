"""Described rows as text and as sums, from rows made by hand."""

from __future__ import annotations

from typing import Any

from jp_train.tools.explain.table import format_row, format_rows, remarks_of, totals


def document(kind: str, start: int, length: int, text: int, image: int, **changed: Any) -> dict[str, Any]:
    spans = [[start + 1, start + 1 + text]] if text else []
    return {
        "kind": kind, "source": f"{kind}s", "shard": "a.tar", "key": "k\x1b[2J", "document_span": [0, length],
        "row_span": [start, start + length], "begun_before": False, "goes_on": False, "truncated": 0,
        "loss": {"text": {"tokens": text, "spans": spans}, "image": {"tokens": image, "spans": [[0, image]] * 3}},
        **changed,
    }  # fmt: skip


def row(number: int, documents: list[dict[str, Any]], truncated: int | None = 0, **changed: Any) -> dict[str, Any]:
    tokens = sum(entry["row_span"][1] - entry["row_span"][0] for entry in documents)
    supervised = {head: sum(entry["loss"][head]["tokens"] for entry in documents) for head in ("text", "image")}
    return {
        "row": number, "tokens": tokens, "seq_len": 2000, "fill": tokens / 2000, "documents": documents,
        "supervised": supervised, "truncated_tokens": truncated, "skipped": [], **changed,
    }  # fmt: skip


SKIPPED = {"source": "s", "shard": "b.tar", "key": "bad\n", "document_span": [0, 1200], "reason": "empty_text"}
ROWS = [
    row(0, [document("text", 0, 1000, 999, 0, goes_on=True), document("generation", 1000, 600, 0, 576)], 7),
    row(1, [document("understanding", 0, 1500, 20, 0, snippet="What is this?")], 0, skipped=[SKIPPED]),
]


def test_totals_are_sums_by_kind_and_head():
    total = totals(ROWS)
    assert (total["rows"], total["documents"], total["tokens"], total["capacity"]) == (2, 3, 3100, 4000)
    assert total["fill"] == 0.775 and total["supervised"] == {"text": 1019, "image": 576}
    assert total["kinds"]["generation"] == {"documents": 1, "tokens": 600, "text": 0, "image": 576}
    assert (total["cut"], total["truncated_tokens"], total["skipped"]) == (1, 7, 1)
    assert totals([])["fill"] == 0.0
    assert totals([*ROWS, row(2, [], None)])["truncated_tokens"] is None, "a part that is unknown makes the sum unknown"


def test_every_row_is_a_line_and_the_last_line_is_their_sum():
    lines = format_rows(ROWS, totals(ROWS)).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["0", "1,600", "80.00%", "2", "0", "1", "1", "999", "576", "1", "7", "0"],
        ["1", "1,500", "75.00%", "1", "1", "0", "0", "20", "0", "0", "0", "1"],
        ["all", "3,100", "77.50%", "3", "1", "1", "1", "1,019", "576", "1", "7", "1"],
    ]
    assert lines[4] == "skipped in row 1: source 's', shard b.tar, key 'bad\\n': empty_text"


def test_a_row_lists_its_documents_with_their_spans_and_no_control_character():
    text = format_row(ROWS[0], 8)
    first, second = (line for line in text.splitlines() if "a.tar" in line)
    assert "row 0 of 8: 1,600 of 2,000 tokens (80.00%), 2 documents" in text
    assert first.split()[:4] == ["0", "text", "texts", "0-1,000"] and "999 at 1-1,000" in first
    assert "576 in 3 spans" in second and "1,000-1,600" in second and " - " in second
    assert "(goes on in a later row)" in text and "\x1b" not in text
    text = format_row(ROWS[1], 8)
    assert "     What is this?" in text.splitlines() and "its 1,200 tokens stay empty: empty_text" in text


def test_remarks_name_what_is_not_whole_about_a_document():
    assert remarks_of(document("text", 0, 9, 8, 0)) == []
    cut = document("text", 0, 9, 8, 0, begun_before=True, goes_on=True, truncated=1234)
    assert remarks_of(cut) == [
        "its start is in an earlier row",
        "goes on in a later row",
        "too long for a row: 1,234 tokens are lost",
    ]
