"""The histogram of the lengths: tokens per document, a row for each source, `data.seq_len` marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = {"understanding": "#0072b2", "text": "#8a8a8a", "generation": "#d55e00"}
_INK, _MUTED, _LINE = "#1b1f24", "#5c656f", "#e1e5ea"
_ROW_INCHES, _MOST_ROWS = 0.95, 40


def plot_lengths(
    lengths: dict[str, np.ndarray], kinds: dict[str, str], edges: np.ndarray, seq_len: int, path: Path
) -> None:
    """Write a PNG. `lengths`: documents per bin by source; bin i counts lengths from `edges[i]` up to the next edge."""
    names = [name for name in lengths if lengths[name].any()][:_MOST_ROWS]
    rows = max(1, len(names))
    figure = Figure(figsize=(9.5, 1.5 + _ROW_INCHES * rows), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    used = np.flatnonzero(sum((lengths[name] for name in names), np.zeros(len(edges), np.int64)))
    ends = np.append(edges[1:], edges[-1] * 2)
    low = edges[used[0]] if len(used) else 1
    high = max(ends[used[-1]] if len(used) else 2, seq_len * 1.15)
    for axis, name in zip(axes, names, strict=False):
        _row(axis, name, kinds[name], lengths[name], edges, ends, seq_len)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlim(max(1, low) * 0.9, high)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.minorticks_off()
    if not names:
        axes[0].text(
            0.5, 0.5, "no usable document", ha="center", va="center", color=_MUTED, transform=axes[0].transAxes
        )
    axes[0].annotate(
        f"seq_len {seq_len:,}",
        (seq_len, 1.0),
        (4, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=8,
        va="top",
    )
    axes[-1].set_xlabel("tokens per document (logarithmic)", color=_MUTED, fontsize=9)
    total = sum(int(lengths[name].sum()) for name in names)
    figure.suptitle(
        f"Lengths of {total:,} usable documents by source",
        x=0.02,
        ha="left",
        fontsize=12,
        fontweight="bold",
        color=_INK,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.subplots_adjust(hspace=0.5)
    figure.savefig(path)


def _row(
    axis: Axes, name: str, kind: str, counts: np.ndarray, edges: np.ndarray, ends: np.ndarray, seq_len: int
) -> None:
    colour = _COLOURS[kind]
    widths = ends - edges
    axis.bar(np.maximum(edges, 1), counts, width=widths, align="edge", color=colour, linewidth=0)
    axis.axvline(seq_len, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    total = int(counts.sum())
    middle = edges[np.searchsorted(np.cumsum(counts), (total + 1) // 2)]
    label = f"{name.encode('ascii', 'backslashreplace').decode()}  ({kind})"
    axis.text(
        0,
        1.03,
        label,
        transform=axis.transAxes,
        va="bottom",
        fontsize=9,
        fontweight="bold",
        color=_INK,
        parse_math=False,
    )
    summary = f"{total:,} documents, median about {middle:,} tokens"
    axis.text(1, 1.03, summary, transform=axis.transAxes, va="bottom", ha="right", fontsize=8, color=_MUTED)
    axis.set_ylim(0, counts.max() * 1.05)
    axis.set_yticks([])
    axis.tick_params(axis="x", colors=_MUTED, labelsize=8, length=3)
    for side in ("top", "left", "right"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_LINE)
