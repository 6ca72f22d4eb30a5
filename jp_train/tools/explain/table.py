"""Described rows as text: one row with its documents, or all rows of a step in a line each."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from jp_train.data.batch_file import HEADS
from jp_train.data.batch_text import printable
from jp_train.terminal import aligned
from jp_train.types import KINDS

MOST_SPANS = 2
"""Loss spans of a document that a table cell lists at most."""


def format_row(row: dict[str, Any], rows_per_step: int, width: int = 120) -> str:
    """A described row (see `explain`): a line about the row, a table of its documents, each with a line of its text."""
    supervised = row["supervised"]
    lines = [
        f"row {row['row']} of {rows_per_step}: {row['tokens']:,} of {row['seq_len']:,} tokens ({row['fill']:.2%}), "
        f"{len(row['documents'])} documents; trained on {supervised['text']:,} positions by the text head, "
        f"{supervised['image']:,} by the "
        "image head"
    ]
    head = ("#", "kind", "source", "of the document", "in the row", "text head", "image head", "shard", "key")
    cells = [
        (
            str(number),
            document["kind"],
            document["source"],
            _span(document["document_span"]),
            _span(document["row_span"]),
            _loss(document["loss"]["text"]),
            _loss(document["loss"]["image"]),
            document["shard"],
            document["key"],
        )
        for number, document in enumerate(row["documents"])
    ]
    table = aligned(_clean([head, *cells]), left=(1, 2, *range(7, len(head))))
    lines += table[:1]
    for text, document in zip(table[1:], row["documents"], strict=True):
        lines.append(text)
        remarks = "; ".join(remarks_of(document))
        if remarks:
            lines.append(f"     ({remarks})")
        if "snippet" in document:
            lines += (
                textwrap.wrap(document["snippet"], width - 5, initial_indent="     ", subsequent_indent="     ") or []
            )
    for skip in row["skipped"]:
        where = f"source {skip['source']!r}, shard {skip['shard']}, key {skip['key']!r}"
        lines.append(
            printable(f"skipped: {where}, its {_length(skip['document_span']):,} tokens stay empty: {skip['reason']}")
        )
    return "\n".join(lines)


def format_rows(rows: Sequence[dict[str, Any]], totals: dict[str, Any]) -> str:
    """Described rows in a line each, and their sum."""
    columns = ("row", "tokens", "fill", "documents", "und", "text", "gen", "text head", "image head")
    lines = [[*columns, "cut", "truncated", "skipped"]]
    for row in rows:
        kinds = [document["kind"] for document in row["documents"]]
        lines.append(
            [
                str(row["row"]),
                f"{row['tokens']:,}",
                f"{row['fill']:.2%}",
                str(len(kinds)),
                *(str(kinds.count(kind)) for kind in ("understanding", "text", "generation")),
                f"{row['supervised']['text']:,}",
                f"{row['supervised']['image']:,}",
                str(sum(document["goes_on"] for document in row["documents"])),
                _number(row["truncated_tokens"]),
                str(len(row["skipped"])),
            ]
        )
    lines.append(
        [
            "all",
            f"{totals['tokens']:,}",
            f"{totals['fill']:.2%}",
            str(totals["documents"]),
            *(str(totals["kinds"][kind]["documents"]) for kind in ("understanding", "text", "generation")),
            f"{totals['supervised']['text']:,}",
            f"{totals['supervised']['image']:,}",
            str(totals["cut"]),
            _number(totals["truncated_tokens"]),
            str(totals["skipped"]),
        ]
    )
    text = aligned(_clean(lines), left=())
    skipped = [
        printable(
            f"skipped in row {row['row']}: source {skip['source']!r}, shard {skip['shard']}, key {skip['key']!r}: "
            f"{skip['reason']}"
        )
        for row in rows
        for skip in row["skipped"]
    ]
    return "\n".join([*text, *skipped])


def remarks_of(document: dict[str, Any]) -> list[str]:
    """Remarks on a described document that is cut or truncated, or lost its caption."""
    remarks = []
    if document.get("condition_dropped"):
        remarks.append("its condition was dropped on purpose (data.pad_dropout): pads in its place")
    if document["begun_before"]:
        remarks.append("its start is in an earlier row")
    if document["goes_on"]:
        remarks.append("goes on in a later row")
    if document["truncated"]:
        remarks.append(f"too long for a row: {document['truncated']:,} tokens are lost")
    return remarks


def _clean(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[printable(cell).replace("\n", " ") for cell in line] for line in lines]


def _span(span: Sequence[int]) -> str:
    return f"{span[0]:,}-{span[1]:,}"


def _length(span: Sequence[int]) -> int:
    return span[1] - span[0]


def _loss(loss: dict[str, Any]) -> str:
    if not loss["tokens"]:
        return "-"
    spans = loss["spans"]
    if len(spans) > MOST_SPANS:
        return f"{loss['tokens']:,} in {len(spans)} spans"
    return f"{loss['tokens']:,} at {', '.join(map(_span, spans))}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def totals(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums over described rows: rows, tokens, fill, documents and tokens by kind, supervised positions by head,
    cuts, truncated, skipped."""
    rows = list(rows)
    documents = [document for row in rows for document in row["documents"]]
    capacity = sum(row["seq_len"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    truncated = [row["truncated_tokens"] for row in rows]
    kinds = {}
    for kind in map(str, KINDS):
        of_kind = [document for document in documents if document["kind"] == kind]
        kinds[kind] = {
            "documents": len(of_kind),
            "tokens": sum(document["row_span"][1] - document["row_span"][0] for document in of_kind),
            "text": sum(document["loss"]["text"]["tokens"] for document in of_kind),
            "image": sum(document["loss"]["image"]["tokens"] for document in of_kind),
        }
    return {
        "rows": len(rows),
        "documents": len(documents),
        "tokens": tokens,
        "capacity": capacity,
        "fill": tokens / capacity if capacity else 0.0,
        "supervised": {head: sum(row["supervised"][head] for row in rows) for head in HEADS},
        "kinds": kinds,
        "cut": sum(document["goes_on"] for document in documents),
        "truncated_tokens": None if None in truncated else sum(truncated),
        "skipped": sum(len(row["skipped"]) for row in rows),
    }
