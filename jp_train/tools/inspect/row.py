"""One packed row as HTML: a bar to scale, the loss masks along it, and every document with its pictures and tokens.

Everything that comes from the data goes through `esc`: shards are written by strangers.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from jp_train.data.batch_text import Piece, Shown, pieces, printable
from jp_train.data.tokenizer import Tokenizer
from jp_train.tools.explain.table import remarks_of
from jp_train.tools.inspect.pictures import ShownPicture, data_uri
from jp_train.tools.inspect.style import PALETTE
from jp_train.types import IGNORE_INDEX

OPEN_ROWS = 2
"""Rows whose documents are unfolded when the page opens."""
_TINY = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedRow:
    """A described row (format of `explain`), its tokens int64 [T] (`input_ids`, `position_ids`, `labels`), and pictures
    by document number.

    `vq_ids`: by document number, the image head's targets, where they are known.
    """

    described: dict[str, Any]
    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    pictures: Mapping[int, Sequence[ShownPicture]]
    vq_ids: Mapping[int, np.ndarray]


def esc(value: Any) -> str:
    """`value` as HTML text without an invisible character, safe between tags and in a quoted attribute."""
    return html.escape(printable(str(value)), quote=True)


def source_class(source: str, sources: Sequence[str]) -> str:
    """The CSS class that carries a source's colour."""
    return f"s{list(sources).index(source) % len(PALETTE)}" if source in sources else "s0"


def row_section(row: InspectedRow, sources: Sequence[str], tokenizer: Tokenizer, *, opened: bool) -> Markup:
    """The row's section. `sources`: all of the configuration, in order, for their colours."""
    described = row.described
    number = described["row"]
    supervised = described["supervised"]
    documents = described["documents"]
    title = (
        f"<h2>Row {number} <small>{described['tokens']:,} of {described['seq_len']:,} tokens ({described['fill']:.2%}) · {_documents(documents)} · "
        f'<span class="th">text head {supervised["text"]:,}</span> · <span class="ih">image head {supervised["image"]:,}</span></small></h2>'
    )
    articles = "".join(_document(row, place, sources, tokenizer) for place in range(len(documents)))
    skipped = "".join(_skipped(skip) for skip in described["skipped"])
    unfolded = " open" if opened else ""
    return Markup(
        f'<section id="r{number}">{title}<div class="card">{_lanes(row, sources)}{skipped}<details{unfolded}>'
        f"<summary>{_documents(documents)} of row {number}</summary>{articles}</details></div></section>"
    )


def _documents(documents: Sequence[Any]) -> str:
    return f"{len(documents)} document{'' if len(documents) == 1 else 's'}"


def _skipped(skip: dict[str, Any]) -> str:
    length = skip["document_span"][1] - skip["document_span"][0]
    return (
        f'<p class="skipped"><b>Skipped:</b> source {esc(skip["source"])}, shard {esc(skip["shard"])}, key {esc(skip["key"])}; '
        f"its {length:,} tokens stay empty. {esc(skip['reason'])}</p>"
    )


# -- the bar ---------------------------------------------------------------------------------------


def _lanes(row: InspectedRow, sources: Sequence[str]) -> str:
    described = row.described
    seq_len, number, documents = described["seq_len"], described["row"], described["documents"]
    bar = "".join(_segment(document, place, number, seq_len, sources) for place, document in enumerate(documents))
    slots = [span for document in documents for own in document["image_slots"].values() for span in own]
    heads = {
        head: [span for document in documents for span in document["loss"][head]["spans"]] for head in ("text", "image")
    }
    starts = np.flatnonzero(row.position_ids == 0).tolist()
    lanes = [
        ("documents", f'<div class="bar">{bar}</div>'),
        (
            "position",
            _svg(
                "position",
                _sawtooth(row.position_ids, starts, seq_len),
                seq_len,
                f"position ids restart at {_some(starts)}",
                20,
            ),
        ),
        (
            "image slots",
            _svg("slots-lane", _rectangles(slots), seq_len, f"{sum(b - a for a, b in slots):,} image slots"),
        ),
        (
            "text head",
            _svg(
                "text-lane",
                _rectangles(heads["text"]),
                seq_len,
                f"{described['supervised']['text']:,} positions train the text head",
            ),
        ),
        (
            "image head",
            _svg(
                "image-lane",
                _rectangles(heads["image"]),
                seq_len,
                f"{described['supervised']['image']:,} positions train the image head",
            ),
        ),
        ("", _axis(seq_len)),
    ]
    return f'<div class="lanes">{"".join(f"<span>{name}</span>{lane}" for name, lane in lanes)}</div>'


def _segment(document: dict[str, Any], place: int, row: int, seq_len: int, sources: Sequence[str]) -> str:
    start, end = document["row_span"]
    about = f"document {place}: {document['kind']}, source {document['source']}, tokens {start:,} to {end:,} ({end - start:,})"
    return (
        f'<a class="{source_class(document["source"], sources)}" href="#r{row}d{place}" title="{esc(about)}" aria-label="{esc(about)}" '
        f'style="left:{100 * start / seq_len:.4g}%;width:{100 * (end - start) / seq_len:.4g}%"><b>{place}</b></a>'
    )


def _svg(name: str, path: str, seq_len: int, label: str, height: int = 10) -> str:
    return (
        f'<svg class="{name}" viewBox="0 0 {seq_len} {height}" preserveAspectRatio="none" role="img" aria-label="{esc(label)}">'
        f'<title>{esc(label)}</title><path d="{path}"/></svg>'
    )


def _rectangles(spans: Sequence[Sequence[int]]) -> str:
    return "".join(f"M{start} 0h{end - start}v10h-{end - start}z" for start, end in spans)


def _sawtooth(positions: np.ndarray, starts: Sequence[int], seq_len: int) -> str:
    """Position ids from 0 (bottom, 19) to the longest run (top, 1); they count by one, so each run is a straight
    line."""
    if not len(positions):
        return ""
    highest = max(int(positions.max()), 1)
    path = []
    for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
        path.append(f"M{start} 19L{end} {19 - 18 * int(positions[end - 1]) / highest:.2f}V19")
    return "".join(path)


def _axis(seq_len: int) -> str:
    marks = [0, seq_len // 4, seq_len // 2, 3 * seq_len // 4, seq_len]
    minor = {1, 3}
    return (
        '<div class="axis" aria-hidden="true">'
        + "".join(
            f'<span{" class=minor" if place in minor else ""} style="left:{100 * mark / seq_len:.4g}%">{mark:,}</span>'
            for place, mark in enumerate(marks)
        )
        + "</div>"
    )


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:,}" for number in numbers[:12])
    return shown + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")


# -- a document ------------------------------------------------------------------------------------


def _document(row: InspectedRow, place: int, sources: Sequence[str], tokenizer: Tokenizer) -> str:
    document = row.described["documents"][place]
    start, end = document["row_span"]
    ids, labels = row.input_ids[start:end], row.labels[start:end]
    loss = document["loss"]
    facts = [
        f"{end - start:,} tokens, {start:,} to {end:,} of the row",
        f'<span class="th">text head {loss["text"]["tokens"]:,}</span>',
        f'<span class="ih">image head {loss["image"]["tokens"]:,}</span>',
        *(f'<span class="chip">{esc(remark)}</span>' for remark in remarks_of(document)),
    ]
    if document["document_span"][0]:
        facts[0] += f" (its tokens from {document['document_span'][0]:,})"
    figures = "".join(_figure(picture) for picture in row.pictures.get(place, ()))
    trained_slots = bool(loss["image"]["tokens"])
    name = f"tokens of document {place} of row {row.described['row']}"
    return (
        f'<article class="doc {source_class(document["source"], sources)}" id="r{row.described["row"]}d{place}">'
        f'<h3><span class="badge">{place}</span>{esc(document["kind"])} · {esc(document["source"])} '
        f"<small>{esc(document['shard'])} · {esc(document['key'])}</small></h3>"
        f'<p class="facts">{"".join(f"<span>{fact}</span>" for fact in facts)}</p><div class="content">'
        + (f'<div class="figures">{figures}</div>' if figures else "")
        + f'<div class="tokens" dir="auto" tabindex="0" role="region" aria-label="{name}">'
        f"{token_html(ids, labels, tokenizer, offset=start, image_head=trained_slots)}</div></div>"
        f"{_ids(ids, row.vq_ids.get(place), tokenizer)}</article>"
    )


def _figure(picture: ShownPicture) -> str:
    uri, width, height = data_uri(picture.pixels)
    tiny = ' class="tiny"' if max(width, height) <= _TINY else ""
    return f'<figure><img{tiny} src="{uri}" width="{width}" height="{height}" alt="{esc(picture.title)}"><figcaption>{esc(picture.title)}</figcaption></figure>'


def token_html(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer, *, offset: int, image_head: bool) -> str:
    """The tokens of one document as HTML: marked where the text head is trained to produce them, ids in the `title` of
    each piece.

    `labels` int64 [T]: position i's label is token i + 1, so token i is marked when labels[i - 1] is set. `offset`: of
    the document in the row. A label at the last position (of a cut text) is shown as the token it stands for, which is
    not part of this row.
    """
    targets = np.concatenate([[False], labels[:-1] != IGNORE_INDEX])
    out = []
    marked = False
    for group in _groups(pieces(ids.tolist(), tokenizer)):
        supervised = bool(targets[group[0].start : group[-1].end].any())
        if supervised != marked:
            out.append("<mark>" if supervised else "</mark>")
            marked = supervised
        out.append(_piece(group, ids, offset, image_head))
    if marked:
        out.append("</mark>")
    if len(labels) and labels[-1] != IGNORE_INDEX:
        (after,) = pieces([int(labels[-1])], tokenizer)
        out.append(
            f'<mark class="next" title="the last position is trained to produce id {int(labels[-1])}, which starts the rest">→{esc(after.text)}</mark>'
        )
    return "".join(out)


def _groups(found: Sequence[Piece]) -> list[list[Piece]]:
    """One piece a group, but neighbouring special tokens that are the same (dropped-out conditions are rows of pads)
    together."""
    groups: list[list[Piece]] = []
    for piece in found:
        if groups and piece.shown is Shown.special is groups[-1][0].shown and piece.text == groups[-1][0].text:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _piece(group: Sequence[Piece], ids: np.ndarray, offset: int, image_head: bool) -> str:
    piece, end = group[0], group[-1].end
    count = end - piece.start
    if piece.shown is Shown.slots:
        trained = " image" if image_head else ""
        what = "the image head is trained to produce them" if image_head else "filled with what the vision encoder sees"
        title = f"{offset + piece.start} to {offset + end}: {what}"
        return f'<span class="slots{trained}" title="{title}">▦ {count} image slots</span>'
    title = f"{offset + piece.start}: id " + " ".join(str(int(token)) for token in ids[piece.start : piece.end])
    if piece.shown is Shown.special:
        times = f" ×{count}" if count > 1 else ""
        return f'<i class="sp" title="{title}{times}">{esc(piece.text)}{times}</i>'
    text = esc(piece.text).replace("\n", '<span class="nl">↵</span>\n').replace("\t", '<span class="nl">⇥</span>\t')
    return f'<i title="{title}">{text}</i>'


def _ids(ids: np.ndarray, vq_ids: np.ndarray | None, tokenizer: Tokenizer) -> str:
    """The numbers themselves, folded away: for touch screens, and to copy."""
    lines = f"input ids: {_numbers(ids)}"
    if vq_ids is not None:
        lines += f"\n\nVQ ids, the image head's targets: {_numbers(vq_ids)}"
    return f"<details><summary>ids</summary><pre>{lines}</pre></details>"


def _numbers(ids: np.ndarray) -> str:
    """Numbers with a space between, runs of more than three as `n x times`."""
    out = []
    at = 0
    values = ids.tolist()
    while at < len(values):
        end = at
        while end < len(values) and values[end] == values[at]:
            end += 1
        out.append(f"{values[at]} x{end - at}" if end - at > 3 else " ".join([str(values[at])] * (end - at)))
        at = end
    return " ".join(out)
