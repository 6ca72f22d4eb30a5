"""The page of packed rows: one HTML file that loads and runs nothing. Pure: described rows in, a string out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jp_train.data.tokenizer import Tokenizer
from jp_train.tools.explain.table import totals
from jp_train.tools.inspect.row import OPEN_ROWS, InspectedRow, esc, row_section, source_class
from jp_train.tools.inspect.style import CSS

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of the page: even a text that got past the escaping could load and run nothing."""


def inspect_page(
    rows: Sequence[InspectedRow],
    *,
    title: str,
    about: str,
    sources: Mapping[str, str],
    tokenizer: Tokenizer,
    base_style: str,
    notes: Sequence[str] = (),
) -> str:
    """The page. `title` and `about` head it; `sources` maps every source of the configuration, in order, to its
    kind; `base_style` is the style sheet that the page's own is added to; `notes` are shown above the rows."""
    names = list(sources)
    total = totals([row.described for row in rows])
    now = datetime.now().astimezone()
    nav = '<a href="#summary">Summary</a>' + "".join(
        f'<a href="#r{row.described["row"]}">Row {row.described["row"]}</a>' for row in rows
    )
    sections = "".join(row_section(row, names, tokenizer, opened=place < OPEN_ROWS) for place, row in enumerate(rows))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{base_style}{CSS}</style></head><body><main><header><h1>{esc(title)}</h1>"
        f"<p>{esc(about)}</p><p>Written {now:%Y-%m-%d %H:%M %Z}</p></header>{_tiles(total)}"
        f'<nav aria-label="Sections">{nav}</nav>'
        f'<section id="summary"><h2>Summary</h2>{"".join(f"<p class=note>{esc(note)}</p>" for note in notes)}'
        f'<div class="card scroll">{_kinds(total)}</div><div class="card">{_legend(sources, rows, names)}</div></section>'
        f"{sections}<footer>jp_train data inspect. Position i of a row is trained to predict token i + 1: the lanes mark positions that carry a label, the text "
        "marks the tokens that are to be predicted.</footer></main></body></html>\n"
    )


def _tiles(total: dict[str, Any]) -> str:
    truncated = total["truncated_tokens"]
    tiles = [
        (f"<b>{total['fill']:.2%}</b>", f"fill of {total['rows']} rows"),
        (f"<b>{total['documents']:,}</b>", "documents"),
        (f"<b>{total['tokens']:,}</b>", "tokens"),
        (f'<b class="th">{total["supervised"]["text"]:,}</b>', "positions that train the text head"),
        (f'<b class="ih">{total["supervised"]["image"]:,}</b>', "positions that train the image head"),
        (
            f"<b>{total['cut']} / {'–' if truncated is None else f'{truncated:,}'} / {total['skipped']}</b>",
            "texts cut / tokens truncated / documents skipped",
        ),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile">{value}<span>{name}</span></div>' for value, name in tiles)
        + "</div>"
    )


def _kinds(total: dict[str, Any]) -> str:
    lines = []
    for kind, own in total["kinds"].items():
        share = own["tokens"] / total["tokens"] if total["tokens"] else 0.0
        lines.append(
            f'<tr><th scope="row">{esc(kind)}</th><td class="num">{own["documents"]:,}</td><td class="num">{own["tokens"]:,}</td>'
            f'<td class="num">{share:.1%}</td><td class="num">{own["text"]:,}</td><td class="num">{own["image"]:,}</td></tr>'
        )
    heads = "".join(
        f'<th class="num" scope="col">{name}</th>'
        for name in ("documents", "tokens", "share", "text head", "image head")
    )
    return f'<table><thead><tr><th scope="col">kind</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _legend(sources: Mapping[str, str], rows: Sequence[InspectedRow], names: Sequence[str]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        for document in row.described["documents"]:
            counts[document["source"]] = counts.get(document["source"], 0) + 1
    entries = "".join(
        f'<li><span class="swatch {source_class(name, names)}"></span>{esc(name)} <span class="none">{esc(kind)}, {counts.get(name, 0)} here</span></li>'
        for name, kind in sources.items()
    )
    signs = (
        '<li><span class="swatch text"></span>carries a label of the text head</li>'
        '<li><span class="swatch image"></span>carries a label of the image head</li>'
        "<li><mark>marked</mark>the text head is trained to produce these tokens</li>"
        '<li><span class="slots image">▦ slots</span>the image head is trained to produce these</li>'
        '<li><span class="slots">▦ slots</span>an image that is only looked at</li>'
        '<li><i class="sp">&lt;eos&gt;</i>a special token</li>'
        "<li>Point at a token for its position and id.</li>"
    )
    return f'<ul class="legend" aria-label="Sources">{entries}</ul><ul class="legend" aria-label="Signs">{signs}</ul>'
