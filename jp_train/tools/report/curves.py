"""Draws panels: lines over steps with direct labels, as PNG bytes for the page and as sheets `curves_*.png` beside it.

What goes into which panel is decided in `panels.py`; here is only how it looks. matplotlib is imported on use, with its
Agg canvas and no global state (no pyplot, no rcParams left changed). Colours are those of Okabe and Ito (colour
universal design, 2008), lighter for dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jp_train.run.reading import Series
from jp_train.run.summary import smooth
from jp_train.terminal import short_number

if TYPE_CHECKING:
    from PIL.Image import Image

PANEL_INCHES = (5.0, 3.1)
DPI = 160
MAX_POINTS = 700
"""Longer series are drawn as the band between the least and the greatest value of each of this many bins, half as
many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours of one scheme; `background` is the page's card colour, so that a picture has no visible edge."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    alert: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1b1f24",
    muted="#656d76",
    grid="#e6e9ed",
    alert="#b3261e",
    cycle=("#0072B2", "#D55E00", "#009E73", "#AA4499", "#8a6d00", "#3b8fc4", "#1b1f24"),
)
DARK = Theme(
    name="dark",
    background="#161b22",
    ink="#e6edf3",
    muted="#9aa4af",
    grid="#2b323b",
    alert="#ff8a80",
    cycle=("#56B4E9", "#F2A25C", "#2FC79B", "#E39CD0", "#F0E442", "#9CCBEF", "#e6edf3"),
)
INK = -1
"""Colour number of a line drawn in the text colour (the total of several kinds)."""
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One measured curve. `color` numbers the theme's cycle; `window` steps are averaged; `held_out` are rings joined
    by a dashed line.

    `reference`, a constant or None, is the configured value the curve should meet, drawn dashed on top.
    """

    label: str
    color: int
    series: Series | None
    window: int = 1
    held_out: Series | None = None
    reference: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An event on the step axis: `kind` is save (a tick), spike (a cross), or another event (a line with its name)."""

    step: int
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One small chart. `unit` is written beside the title; `limits` fix the y range (panels that are compared share
    it)."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    limits: tuple[float, float] | None = None
    log_y: bool = False
    percent: bool = False
    threshold: tuple[str, float] | None = None

    def describe(self) -> str:
        """What the picture shows, in words, for readers who do not see it."""
        parts = []
        for line in self.lines:
            points = line.series.finite() if line.series is not None else None
            if points is not None and len(points):
                ends = [self.format(v) for v in smooth(points, line.window).values[[0, -1]].tolist()]
                parts.append(
                    f"{line.label} {ends[0]} to {ends[1]} (steps {points.steps[0]} to {points.steps[-1]})".strip()
                )
            if line.held_out is not None and len(line.held_out):
                ends = [self.format(v) for v in line.held_out.values[[0, -1]].tolist()]
                parts.append(f"held-out {line.label} {ends[0]} to {ends[1]}")
        return f"{self.title} ({self.unit}): " + ("; ".join(parts) or "no data")

    def format(self, value: float) -> str:
        """A value of this panel for people."""
        if self.percent:
            percent = 100 * value
            return f"{percent:.2f}%" if abs(percent - 100) < 1 and percent != 100 else f"{percent:.1f}%"
        return short_number(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelGroup:
    """A section of the page: `key` names the sheet `curves_KEY.png`; `note` says how to read its panels."""

    key: str
    title: str
    note: str
    panels: tuple[Panel, ...] = field(default=())


def draw_panel(panel: Panel, theme: Theme) -> Image:
    """One panel as a picture of PANEL_INCHES at DPI."""
    figure = _new_figure(theme)
    longest = max((len(line.label) for line in panel.lines), default=0)
    right = 0.03 + min(0.34, 0.0135 * (longest + 7))  # room for `label 0.123` behind the line ends
    _draw(figure.add_axes((0.095, 0.135, 0.905 - right, 0.70)), panel, theme)
    return _picture(figure)


def to_png(picture: Image) -> bytes:
    """A PNG file. Charts have few colours, so a palette shrinks it to a third."""
    from PIL import Image as PILImage

    out = io.BytesIO()
    picture.quantize(colors=192, method=PILImage.Quantize.FASTOCTREE, dither=PILImage.Dither.NONE).save(
        out, format="png"
    )
    return out.getvalue()


def write_sheet(pictures: Sequence[Image], columns: int, path: Path) -> None:
    """All panels of a group on one PNG at `path`, `columns` a row; written beside and renamed."""
    from PIL import Image as PILImage

    width, height = pictures[0].size
    sheet = PILImage.new("RGB", (width * columns, height * -(-len(pictures) // columns)), LIGHT.background)
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (width * (i % columns), height * (i // columns)))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(to_png(sheet))
    partial.replace(path)


def shared_limits(panels: Sequence[Panel]) -> tuple[float, float] | None:
    """The y range that shows every panel of a row, so that a reader may compare them side by side."""
    ranges = [r for r in (_data_range(panel) for panel in panels) if r is not None]
    if not ranges:
        return None
    return _padded(min(r[0] for r in ranges), max(r[1] for r in ranges), log=any(panel.log_y for panel in panels))


def _new_figure(theme: Theme) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL_INCHES, dpi=DPI, facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure


def _picture(figure: Any) -> Image:
    from PIL import Image as PILImage

    figure.canvas.draw()
    return PILImage.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())


def _draw(axes: Any, panel: Panel, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0, pad=4)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.text(
        0,
        1.115,
        panel.title,
        transform=axes.transAxes,
        color=theme.ink,
        fontsize=10.5,
        fontweight="bold",
        va="bottom",
        parse_math=False,
    )
    axes.text(0, 1.085, panel.unit, transform=axes.transAxes, color=theme.muted, fontsize=8, va="top", parse_math=False)
    axes.text(1, -0.115, "step", transform=axes.transAxes, color=theme.muted, fontsize=8, ha="right", va="top")
    limits = panel.limits or _own_limits(panel)
    if limits is None:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, color=theme.muted, fontsize=9, ha="center")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_ylim(*limits)
    _step_axis(axes, panel)
    labels = [label for label in (_draw_line(axes, line, panel, theme) for line in panel.lines) if label is not None]
    if panel.threshold is not None and limits[0] <= panel.threshold[1] <= limits[1]:
        name, value = panel.threshold
        axes.axhline(value, color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)))
        labels.append((value, name, theme.muted))
    _draw_marks(axes, panel.marks, theme)
    _direct_labels(axes, labels)
    _note_off_scale(axes, panel, limits, theme)


def _step_axis(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    first, last = _step_range(panel)
    axes.set_xlim(first, last if last > first else first + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(round(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(panel, value, spacing)))
    if panel.log_y:
        axes.yaxis.set_major_locator(LogLocator(numticks=6, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ticks = axes.get_yticks()
    spacing = float(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0


def _tick(panel: Panel, value: float, spacing: float) -> str:
    """An axis label with as many decimals as the distance between ticks needs, so that no two are the same."""
    if panel.percent:
        if abs(value - 1) < 1e-9:
            return "100%"
        return f"{100 * value:.{_decimals(100 * spacing)}f}%"
    if panel.log_y or abs(value) >= 9_995 or spacing < 0.001:
        return short_number(value)
    return f"{value:,.{_decimals(spacing)}f}"


def _decimals(spacing: float) -> int:
    mantissa, exponent = f"{spacing:.1e}".split("e")
    return max(0, -int(exponent) + (not mantissa.endswith(".0")))


def _draw_line(axes: Any, line: Line, panel: Panel, theme: Theme) -> tuple[float, str, str] | None:
    """Draws one curve and returns its direct label: (y, text, colour)."""
    color = theme.ink if line.color == INK else theme.cycle[line.color % len(theme.cycle)]
    style = DASHES[line.color // len(theme.cycle) % len(DASHES)] if line.color > 0 else "solid"
    end, text = None, line.label
    points = line.series.finite() if line.series is not None else None
    if points is not None and len(points):
        averaged = smooth(points, line.window)
        if line.window > 1:
            _draw_raw(axes, points, color)
        thin = max(1, len(averaged) // (2 * MAX_POINTS))
        keep = np.unique(np.append(np.arange(0, len(averaged), thin), len(averaged) - 1))
        marker = "o" if len(averaged) < 3 else None
        axes.plot(
            averaged.steps[keep],
            averaged.values[keep],
            color=color,
            linewidth=1.7,
            linestyle=style,
            marker=marker,
            markersize=4,
        )
        end = float(averaged.values[-1])
        text = f"{line.label} {panel.format(end)}".strip()
    if line.held_out is not None and len(line.held_out):
        axes.plot(line.held_out.steps, line.held_out.values, color=color, linewidth=0.9, linestyle=(0, (2, 2)), marker="o", markersize=4.5,
                  markerfacecolor=theme.background, markeredgecolor=color, markeredgewidth=1.3, clip_on=False, zorder=3)  # fmt: skip
        if end is None:
            end, text = (
                float(line.held_out.values[-1]),
                f"{line.label} {panel.format(float(line.held_out.values[-1]))}".strip(),
            )
    if line.reference is not None:
        axes.axhline(line.reference, color=theme.ink, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    return None if end is None else (end, text, color)


def _draw_raw(axes: Any, points: Series, color: str) -> None:
    if len(points) <= MAX_POINTS:
        axes.plot(points.steps, points.values, color=color, linewidth=0.8, alpha=0.28)
        return
    bins = np.linspace(0, len(points), MAX_POINTS // 2 + 1).astype(int)[:-1]
    low, high = np.minimum.reduceat(points.values, bins), np.maximum.reduceat(points.values, bins)
    axes.fill_between(points.steps[bins], low, high, color=color, alpha=0.18, linewidth=0)


def _draw_marks(axes: Any, marks: Sequence[Mark], theme: Theme) -> None:
    from matplotlib.transforms import blended_transform_factory

    across = blended_transform_factory(axes.transData, axes.transAxes)
    first, last = axes.get_xlim()
    named: set[str] = set()
    for mark in marks:
        if not first <= mark.step <= last:
            continue
        if mark.kind == "save":
            axes.plot(
                [mark.step],
                [0],
                marker=2,
                markersize=5,
                color=theme.muted,
                transform=across,
                clip_on=False,
                linestyle="none",
            )
        elif mark.kind == "spike":
            axes.plot(
                [mark.step],
                [1.025],
                marker="x",
                markersize=5,
                color=theme.alert,
                transform=across,
                clip_on=False,
                linestyle="none",
            )
        else:
            axes.axvline(mark.step, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2)))
            if mark.kind not in named:
                near_end = mark.step > first + 0.8 * (last - first)
                axes.text(mark.step, 0.99, f"{mark.kind} " if near_end else f" {mark.kind}", transform=across, color=theme.muted, fontsize=7.5,
                          ha="right" if near_end else "left", va="top", parse_math=False)  # fmt: skip
                named.add(mark.kind)


def _direct_labels(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Labels right of the line ends, pushed apart so that none covers another; the order of the ends is kept."""
    height = axes.bbox.height
    gap = 11.5 * DPI / 72 / height
    low, high = axes.get_ylim()
    placed = []
    for value, text, color in labels:
        where = axes.transAxes.inverted().transform(axes.transData.transform((0, min(max(value, low), high))))[1]
        placed.append([float(where), text, color])
    placed.sort(key=lambda item: item[0])
    for below, above in pairwise(placed):
        above[0] = max(above[0], below[0] + gap)
    overflow = placed[-1][0] - 1.0 if placed else 0.0
    if overflow > 0:
        placed[-1][0] = 1.0
        for below, above in zip(placed[-2::-1], placed[:0:-1], strict=False):
            below[0] = min(below[0], above[0] - gap)
    for where, text, color in placed:
        axes.text(1.02, where, text, transform=axes.transAxes, color=color, fontsize=8.5, va="center", parse_math=False)


def _note_off_scale(axes: Any, panel: Panel, limits: tuple[float, float], theme: Theme) -> None:
    outside = 0
    for line in panel.lines:
        if line.series is not None:
            values = line.series.finite().values
            outside += int(((values < limits[0]) | (values > limits[1])).sum())
    if outside:
        text = f"{outside} point{'s' if outside > 1 else ''} off scale"
        axes.text(1, 1.085, text, transform=axes.transAxes, color=theme.muted, fontsize=7.5, ha="right", va="top")


def _step_range(panel: Panel) -> tuple[int, int]:
    steps = [s.steps for line in panel.lines for s in (line.series, line.held_out) if s is not None and len(s)]
    return min(int(s[0]) for s in steps), max(int(s[-1]) for s in steps)


def _data_range(panel: Panel) -> tuple[float, float] | None:
    """What must be seen: averaged curves, held-out points, references, and all but the wildest 1% of single steps."""
    lows, highs = [], []
    for line in panel.lines:
        points = line.series.finite() if line.series is not None else None
        values: list[float] = []
        if points is not None and len(points):
            averaged = smooth(points, line.window).values
            edges = (
                np.percentile(points.values, (0.5, 99.5))
                if len(points) >= 20
                else (points.values.min(), points.values.max())
            )
            values += [float(averaged.min()), float(averaged.max()), float(edges[0]), float(edges[1])]
        if line.held_out is not None and len(line.held_out):
            values += [float(line.held_out.values.min()), float(line.held_out.values.max())]
        if values and line.reference is not None:
            values.append(line.reference)
        if panel.log_y:
            values = [v for v in values if v > 0]
        if values:
            lows.append(min(values))
            highs.append(max(values))
    return (min(lows), max(highs)) if lows else None


def _own_limits(panel: Panel) -> tuple[float, float] | None:
    found = _data_range(panel)
    return None if found is None else _padded(*found, log=panel.log_y)


def _padded(low: float, high: float, *, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.25, high * 1.25
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    floor = low - room
    return (0.0 if low >= 0 and floor < 0 else floor), high + room
