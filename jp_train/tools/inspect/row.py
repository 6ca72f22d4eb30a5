"""One packed row for the page: the lanes of its loss masks to scale, and every document with its images and tokens.

Everything that comes from the data passes `printable`, here or in the template, and is escaped: shards are written by
strangers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from jp_train.data.batch_text import Piece, Shown, pieces, printable
from jp_train.data.tokenizer import Tokenizer
from jp_train.tools.explain.table import remarks_of
from jp_train.tools.inspect.images import ShownImage, data_uri
from jp_train.types import IGNORE_INDEX

OPEN_ROWS = 2
"""Rows whose documents are unfolded when the page opens."""
PALETTE = (
    ("#b9d3ee", "#2f5d8c"),
    ("#f6cf9d", "#8a5a1c"),
    ("#b5dfc3", "#2c6e49"),
    ("#e6c3e4", "#7a4377"),
    ("#f3e29a", "#75661a"),
    ("#c9ccd6", "#555d70"),
    ("#f3bdb5", "#8c4038"),
    ("#b4dfe2", "#22696e"),
    ("#d3c8f2", "#574a8f"),
    ("#d8dfa5", "#5b651d"),
    ("#e3cdb8", "#6f5236"),
    ("#bcd9ff", "#24508f"),
)
"""One hue a source, as light page, dark page; neighbours differ in lightness too, for readers who tell hues apart
badly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedRow:
    """A described row (format of `explain`), its tokens int64 [T] (`input_ids`, `position_ids`, `labels`), and images
    by document number.

    `vq_ids`: by document number, the image head's targets, where they are known.
    """

    described: dict[str, Any]
    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    images: Mapping[int, Sequence[ShownImage]]
    vq_ids: Mapping[int, np.ndarray]


def source_class(source: str, sources: Sequence[str]) -> str:
    """The CSS class that carries a source's colour."""
    return f"s{list(sources).index(source) % len(PALETTE)}" if source in sources else "s0"


def row_values(row: InspectedRow, sources: Sequence[str], tokenizer: Tokenizer, *, opened: bool) -> dict[str, Any]:
    """What the template `row.html` shows of a row. `sources`: all of the configuration, in order, for their colours."""
    return {
        "described": row.described,
        "opened": opened,
        "lanes": _lanes(row),
        "documents": [_document(row, place, sources, tokenizer) for place in range(len(row.described["documents"]))],
    }


def _lanes(row: InspectedRow) -> list[tuple[str, str, str, str, int]]:
    """Name, CSS class, SVG path, words and height of each lane below the bar; one unit of width is a token."""
    documents, supervised = row.described["documents"], row.described["supervised"]
    slots = [span for document in documents for spans in document["image_slots"].values() for span in spans]
    starts = np.flatnonzero(row.position_ids == 0).tolist()
    lanes = [
        ("position", "position", _sawtooth(row.position_ids, starts), f"position ids restart at {_some(starts)}", 20),
        ("image slots", "slots-lane", _rectangles(slots), f"{sum(b - a for a, b in slots):,} image slots", 10),
    ]
    for head in ("text", "image"):
        path = _rectangles([span for document in documents for span in document["loss"][head]["spans"]])
        lanes.append(
            (f"{head} head", f"{head}-lane", path, f"{supervised[head]:,} positions train the {head} head", 10)
        )
    return lanes


def _rectangles(spans: Sequence[Sequence[int]]) -> str:
    return "".join(f"M{start} 0h{end - start}v10h-{end - start}z" for start, end in spans)


def _sawtooth(positions: np.ndarray, starts: Sequence[int]) -> str:
    """Position ids from 0 (bottom, 19) to the longest run (top, 1); they count by one, so each run is a straight
    line."""
    if not len(positions):
        return ""
    highest = max(int(positions.max()), 1)
    path = []
    for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
        path.append(f"M{start} 19L{end} {19 - 18 * int(positions[end - 1]) / highest:.2f}V19")
    return "".join(path)


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:,}" for number in numbers[:12])
    return shown + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")


def _document(row: InspectedRow, place: int, sources: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    document = row.described["documents"][place]
    start, end = document["row_span"]
    ids, labels = row.input_ids[start:end], row.labels[start:end]
    trained_slots = bool(document["loss"]["image"]["tokens"])
    vq_ids = row.vq_ids.get(place)
    numbers = f"input ids: {_numbers(ids)}"
    if vq_ids is not None:
        numbers += f"\n\nVQ ids, the image head's targets: {_numbers(vq_ids)}"
    return {
        "described": document,
        "place": place,
        "color": source_class(document["source"], sources),
        "remarks": remarks_of(document),
        "images": [(*data_uri(image.pixels), image.title) for image in row.images.get(place, ())],
        "tokens": token_html(ids, labels, tokenizer, offset=start, image_head=trained_slots),
        "ids": numbers,
    }


def token_html(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer, *, offset: int, image_head: bool) -> Markup:
    """The tokens of one document as HTML: marked where the text head is trained to produce them, ids in the `title` of
    each piece.

    `labels` int64 [T]: position i's label is token i + 1, so token i is marked when labels[i - 1] is set. `offset`: of
    the document in the row. A label at the last position (of a cut text) is shown as the token it stands for, which is
    not part of this row.
    """
    targets = np.concatenate([[False], labels[:-1] != IGNORE_INDEX])
    parts = []
    marked = False
    for group in _groups(pieces(ids.tolist(), tokenizer)):
        supervised = bool(targets[group[0].start : group[-1].end].any())
        if supervised != marked:
            parts.append(Markup("<mark>" if supervised else "</mark>"))
            marked = supervised
        parts.append(_piece(group, ids, offset, image_head))
    if marked:
        parts.append(Markup("</mark>"))
    if len(labels) and labels[-1] != IGNORE_INDEX:
        (after,) = pieces([int(labels[-1])], tokenizer)
        title = f"the last position is trained to produce id {int(labels[-1])}, which starts the rest"
        parts.append(Markup('<mark class="next" title="{}">→{}</mark>').format(title, printable(after.text)))
    return Markup("").join(parts)


def _groups(run: Sequence[Piece]) -> list[list[Piece]]:
    """One piece a group, but neighbouring special tokens that are the same (dropped-out conditions are rows of pads)
    together."""
    groups: list[list[Piece]] = []
    for piece in run:
        if groups and piece.shown is Shown.special is groups[-1][0].shown and piece.text == groups[-1][0].text:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _piece(group: Sequence[Piece], ids: np.ndarray, offset: int, image_head: bool) -> Markup:
    piece, end = group[0], group[-1].end
    count = end - piece.start
    if piece.shown is Shown.slots:
        kind = "slots image" if image_head else "slots"
        what = "the image head is trained to produce them" if image_head else "filled with what the vision encoder sees"
        title = f"{offset + piece.start} to {offset + end}: {what}"
        return Markup('<span class="{}" title="{}">▦ {} image slots</span>').format(kind, title, count)
    title = f"{offset + piece.start}: id " + " ".join(str(int(token)) for token in ids[piece.start : piece.end])
    if piece.shown is Shown.special:
        times = f" ×{count}" if count > 1 else ""
        return Markup('<i class="sp" title="{0}{1}">{2}{1}</i>').format(title, times, printable(piece.text))
    text = escape(printable(piece.text))
    for character, sign in (("\n", "↵"), ("\t", "⇥")):
        text = text.replace(character, Markup('<span class="nl">{}</span>{}').format(sign, character))
    return Markup('<i title="{}">{}</i>').format(title, text)


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
