"""The page of packed rows: one HTML file that loads and runs nothing. Pure: described rows in, a string out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

from jp_train.data.batch_text import printable
from jp_train.data.tokenizer import Tokenizer
from jp_train.tools.explain.table import totals
from jp_train.tools.html import render
from jp_train.tools.inspect.row import OPEN_ROWS, PALETTE, InspectedRow, row_values, source_class


def inspect_page(
    rows: Sequence[InspectedRow],
    *,
    title: str,
    about: str,
    sources: Mapping[str, str],
    tokenizer: Tokenizer,
    notes: Sequence[str] = (),
) -> str:
    """The page. `title` and `about` head it; `sources` maps every source of the configuration, in order, to its
    kind; `notes` are shown above the rows."""
    names = list(sources)
    documents = Counter(document["source"] for row in rows for document in row.described["documents"])
    return render(
        "inspect/inspect.html",
        title=printable(title),
        about=printable(about),
        notes=[printable(note) for note in notes],
        sources=[
            (printable(name), printable(kind), source_class(name, names), documents[name])
            for name, kind in sources.items()
        ],
        rows=[row_values(row, names, tokenizer, opened=place < OPEN_ROWS) for place, row in enumerate(rows)],
        total=totals([row.described for row in rows]),
        printable=printable,
        palette=PALETTE,
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )
