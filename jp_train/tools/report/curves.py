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
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from jp_train.files import write_atomically
from jp_train.run.reading import Series
from jp_train.run.summary import smooth
from jp_train.terminal import measured, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from matplotlib.transforms import Transform
    from PIL.Image import Image

Horizontal: TypeAlias = Literal["left", "center", "right"]
LEFT: Horizontal = "left"
RIGHT: Horizontal = "right"
PANEL_INCHES = (5.0, 3.1)
DPI = 160
MAX_POINTS = 700
"""Longer series are drawn as the band between the least and the greatest value of each of this many bins, half as
many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours of one scheme; `background` is the page's card colour, so that an image has no visible edge."""

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
    cycle=("#0072B2", "#D55E00", "#009E73", "#AA4499", "#8a6d00", "#7a4b2a", "#1b1f24"),
)
DARK = Theme(
    name="dark",
    background="#161b22",
    ink="#e6edf3",
    muted="#9aa4af",
    grid="#2b323b",
    alert="#ff8a80",
    cycle=("#56B4E9", "#F2A25C", "#2FC79B", "#E39CD0", "#F0E442", "#c8a27c", "#e6edf3"),
)
LABEL_CHARACTERS = 15
"""A longer name of a line is shortened in its middle."""
ENDS_EARLY = 0.9
"""A line that ends before this share of the step axis has the step of its end in its label."""
MIN_JOINED = 3
SYMBOLS = ("save", "spike")
"""Events that are drawn as a symbol, without a name."""
HEADROOM = 0.1
"""Share of a panel's height above the data, where it has events whose names stand there."""
INK = -1
"""Colour number of a line drawn in the text colour (the total of several kinds)."""
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One measured curve. `color` numbers the theme's cycle; `window` steps are averaged; `held_out` are rings, joined
    by a dashed line where there are MIN_JOINED of them: a line between two would look like a trend.

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
    """An event on the step axis: `kind` is save (a triangle), spike (a cross), or another event (a line with its
    name)."""

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
        """What the chart shows, in words, for readers who do not see it."""
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
        return f"{self.title}, {self.unit}: " + ("; ".join(parts) or "no data")

    def format(self, value: float) -> str:
        """A value of this panel for people."""
        if self.percent:
            percent = 100 * value
            return f"{percent:.2f}%" if abs(percent - 100) < 1 and percent != 100 else f"{percent:.1f}%"
        return measured(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelGroup:
    """A section of the page: `key` names the sheet `curves_KEY.png`; `note` says how to read its panels."""

    key: str
    title: str
    note: str
    panels: tuple[Panel, ...] = field(default=())


def draw_panel(panel: Panel, theme: Theme) -> Image:
    """One panel as an image of PANEL_INCHES at DPI."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image as PILImage

    figure = Figure(figsize=PANEL_INCHES, dpi=DPI, facecolor=theme.background)
    canvas = FigureCanvasAgg(figure)
    longest = max((len(_name(line) + _end_step(line, panel)) for line in panel.lines), default=0)
    right = 0.03 + min(0.40, 0.0135 * (longest + 7))  # room for `label 0.123` behind the line ends
    _draw(figure.add_axes((0.095, 0.135, 0.905 - right, 0.70)), panel, theme)
    canvas.draw()
    return PILImage.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def to_pngs(image: Image) -> tuple[bytes, bytes]:
    """PNG files of a chart that was drawn in LIGHT: as it is, and the same pixels with the colours of DARK."""
    reduced = _reduced(image)
    light = _png(reduced)
    palette = np.array(reduced.getpalette()).reshape(-1, 3)
    reduced.putpalette(recolored(palette, LIGHT, DARK).round().astype(np.uint8).tobytes())
    return light, _png(reduced)


def _reduced(image: Image) -> Image:
    """The image with a palette: charts have few colours, and it shrinks them to a third."""
    from PIL import Image as PILImage

    return image.quantize(colors=192, method=PILImage.Quantize.FASTOCTREE, dither=PILImage.Dither.NONE)


def recolored(colors: np.ndarray, before: Theme, after: Theme) -> np.ndarray:
    """The colours [n, 3] (0 to 255) of a chart in another theme. Each is a blend of the background with one colour of
    the theme, for antialiasing and faint lines: the nearest such blend is made of the other theme's colours."""

    def rgb(*names: str) -> np.ndarray:
        return np.array([list(bytes.fromhex(name.removeprefix("#"))) for name in names], float)

    background, to_background = rgb(before.background), rgb(after.background)
    directions = rgb(before.ink, before.alert, *before.cycle) - background
    to_directions = rgb(after.ink, after.alert, *after.cycle) - to_background
    offsets = colors - background
    shares = np.clip(offsets @ directions.T / (directions**2).sum(1), 0, 1)
    distances = ((offsets[:, None] - shares[..., None] * directions) ** 2).sum(-1)
    nearest = distances.argmin(1)
    return to_background + np.take_along_axis(shares, nearest[:, None], 1) * to_directions[nearest]


def _png(image: Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="png", compress_level=4)
    return out.getvalue()


def write_sheet(images: Sequence[Image], columns: int, path: Path) -> None:
    """All panels of a group on one PNG at `path`, `columns` a row. Raises OSError."""
    from PIL import Image as PILImage

    width, height = images[0].size
    sheet = PILImage.new("RGB", (width * columns, height * -(-len(images) // columns)), LIGHT.background)
    for i, image in enumerate(images):
        sheet.paste(image, (width * (i % columns), height * (i // columns)))
    write_atomically(path, _png(_reduced(sheet)))


def shared_limits(panels: Sequence[Panel]) -> tuple[float, float] | None:
    """The y range that shows every panel of a row, so that a reader may compare them side by side."""
    ranges = [r for r in (_data_range(panel) for panel in panels) if r is not None]
    if not ranges:
        return None
    named = any(mark.kind not in SYMBOLS for panel in panels for mark in panel.marks)
    return _padded(
        min(r[0] for r in ranges),
        max(r[1] for r in ranges),
        log=any(panel.log_y for panel in panels),
        headroom=HEADROOM if named else 0.0,
    )


def _draw(axes: Axes, panel: Panel, theme: Theme) -> None:
    axes.set_axis_off()  # matplotlib's own axis objects take half the time of a panel
    _text(axes, 0, 1.115, panel.title, theme.ink, size=10.5, va="bottom", weight="bold")
    _text(axes, 0, 1.085, panel.unit, theme.muted, va="top")
    _text(axes, 1, -0.115, "step", theme.muted, ha="right", va="top")
    limits = panel.limits or shared_limits([panel])
    if limits is None:
        _text(axes, 0.5, 0.5, "no data", theme.muted, size=9, ha="center")
        return
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_ylim(*limits)
    _scales(axes, panel, limits, theme)
    labels = [label for label in (_draw_line(axes, line, panel, theme) for line in panel.lines) if label is not None]
    if panel.threshold is not None and limits[0] <= panel.threshold[1] <= limits[1]:
        name, value = panel.threshold
        axes.axhline(value, color=theme.muted, linewidth=0.9, linestyle=(0, (4, 3)))
        labels.append((value, name, theme.muted))
    _draw_marks(axes, panel.marks, theme)
    _direct_labels(axes, labels)
    _note_off_scale(axes, panel, limits, theme)


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    color: str,
    *,
    size: float = 8,
    ha: Horizontal = LEFT,
    va: Literal["bottom", "center", "top"] = "center",
    weight: str = "normal",
    transform: Transform | None = None,
) -> Text:
    """Text at a place in shares of the panel, or in what `transform` says."""
    where = axes.transAxes if transform is None else transform
    return axes.text(
        x, y, text, color=color, fontsize=size, ha=ha, va=va, fontweight=weight, transform=where, parse_math=False
    )


def _scales(axes: Axes, panel: Panel, limits: tuple[float, float], theme: Theme) -> None:
    """The step axis with its ticks, and grid lines with their values."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    first, last = _step_range(panel)
    last = last if last > first else first + 1
    axes.set_xlim(first, last)
    nice = [1, 2, 5, 10]
    steps = MaxNLocator(nbins=6, integer=True, steps=nice).tick_values(first, last)
    rows = LogLocator(numticks=6, subs=(1.0, 2.0, 5.0)) if panel.log_y else MaxNLocator(nbins=5, steps=nice)
    values = [float(value) for value in rows.tick_values(*limits) if limits[0] <= value <= limits[1]]
    spacing = values[1] - values[0] if len(values) > 1 else 1.0
    along_x, along_y = axes.get_xaxis_transform(), axes.get_yaxis_transform()
    axes.hlines(values, 0, 1, transform=along_y, color=theme.grid, linewidth=0.8, zorder=0.5)
    for value in values:
        _text(axes, -0.012, value, _tick(panel, value, spacing), theme.muted, ha="right", transform=along_y)
    axes.hlines([0], 0, 1, transform=axes.transAxes, color=theme.muted, linewidth=0.8, clip_on=False)
    steps = [float(step) for step in steps if first <= step <= last]
    axes.vlines(steps, -0.02, 0, transform=along_x, color=theme.muted, linewidth=0.8, clip_on=False)
    for step in steps:
        _text(axes, step, -0.04, short_number(round(step)), theme.muted, ha="center", va="top", transform=along_x)


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


def _draw_line(axes: Axes, line: Line, panel: Panel, theme: Theme) -> tuple[float, str, str] | None:
    """Draws one curve and returns its direct label: (y, text, colour)."""
    color = theme.ink if line.color == INK else theme.cycle[line.color % len(theme.cycle)]
    style = DASHES[line.color // len(theme.cycle) % len(DASHES)] if line.color > 0 else "solid"
    end = None
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
    if line.held_out is not None and len(line.held_out):
        joined = (0, (2, 2)) if len(line.held_out) >= MIN_JOINED else "none"
        axes.plot(line.held_out.steps, line.held_out.values, color=color, linewidth=0.9, linestyle=joined, zorder=3,
                  marker="o", markersize=4.5, markerfacecolor=theme.background, markeredgecolor=color,
                  markeredgewidth=1.3, clip_on=False)  # fmt: skip
        if end is None:
            end = float(line.held_out.values[-1])
    if line.reference is not None:
        axes.axhline(line.reference, color=theme.ink, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    if end is None:
        return None
    return end, f"{_name(line)} {panel.format(end)}{_end_step(line, panel)}".strip(), color


def _name(line: Line) -> str:
    half = LABEL_CHARACTERS // 2
    return line.label if len(line.label) <= LABEL_CHARACTERS else f"{line.label[:half]}…{line.label[-half:]}"


def _end_step(line: Line, panel: Panel) -> str:
    """` at 900` for a line that ends long before others do."""
    first, last = _step_range(panel)
    end = max((int(s.steps[-1]) for s in (line.series, line.held_out) if s is not None and len(s)), default=last)
    return f" at {short_number(end)}" if end - first < ENDS_EARLY * (last - first) else ""


def _draw_raw(axes: Axes, points: Series, color: str) -> None:
    if len(points) <= MAX_POINTS:
        axes.plot(points.steps, points.values, color=color, linewidth=0.8, alpha=0.28)
        return
    bins = np.linspace(0, len(points), MAX_POINTS // 2 + 1).astype(int)[:-1]
    low, high = np.minimum.reduceat(points.values, bins), np.maximum.reduceat(points.values, bins)
    axes.fill_between(points.steps[bins], low, high, color=color, alpha=0.18, linewidth=0)


def _draw_marks(axes: Axes, marks: Sequence[Mark], theme: Theme) -> None:
    across = axes.get_xaxis_transform()
    first, last = axes.get_xlim()
    shown = [mark for mark in marks if first <= mark.step <= last]
    for kind, height, marker, color in (("save", 0.015, "^", theme.muted), ("spike", 1.025, "x", theme.alert)):
        steps = [mark.step for mark in shown if mark.kind == kind]
        axes.plot(steps, [height] * len(steps), transform=across, clip_on=False,
                  marker=marker, markersize=4, color=color, linestyle="none")  # fmt: skip
    for steps, names in _labels(shown, 0.2 * (last - first)):
        for step in steps:
            axes.axvline(step, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2)))
        near_end = steps[0] > first + 0.8 * (last - first)
        text, ha = (f"{names} ", RIGHT) if near_end else (f" {names}", LEFT)
        label = _text(axes, steps[0], 0.99, text, theme.muted, size=7.5, ha=ha, va="top", transform=across)
        label.set(zorder=4, bbox={"facecolor": theme.background, "edgecolor": "none", "alpha": 0.8, "pad": 0.5})


def _labels(marks: Sequence[Mark], room: float) -> list[tuple[list[int], str]]:
    """(steps, names) of the events that have a line: those within `room` steps of the first share its label."""
    labels: list[tuple[list[int], list[str]]] = []
    for mark in sorted(marks, key=lambda mark: mark.step):
        if mark.kind in SYMBOLS:
            continue
        if not labels or mark.step - labels[-1][0][0] > room:
            labels.append(([], []))
        labels[-1][0].append(mark.step)
        if mark.kind not in labels[-1][1]:
            labels[-1][1].append(mark.kind)
    return [(steps, ", ".join(names)) for steps, names in labels]


def _direct_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Labels right of the line ends, pushed apart so that none covers another; the order of the ends is kept."""
    height = axes.bbox.height
    gap = 11.5 * DPI / 72 / height
    low, high = axes.get_ylim()
    to_axes = axes.transAxes.inverted()
    heights = [
        float(to_axes.transform(axes.transData.transform((0, min(max(value, low), high))))[1]) for value, *_ in labels
    ]
    order = sorted(range(len(labels)), key=heights.__getitem__)
    for below, above in pairwise(order):
        heights[above] = max(heights[above], heights[below] + gap)
    if order and heights[order[-1]] > 1:
        heights[order[-1]] = 1.0
        for above, below in pairwise(reversed(order)):
            heights[below] = min(heights[below], heights[above] - gap)
    for where, (_, text, color) in zip(heights, labels, strict=True):
        _text(axes, 1.02, where, text, color, size=8.5)


def _note_off_scale(axes: Axes, panel: Panel, limits: tuple[float, float], theme: Theme) -> None:
    from matplotlib.transforms import blended_transform_factory

    outside = 0
    for line in panel.lines:
        if line.series is not None:
            values = line.series.finite().values
            outside += int(((values < limits[0]) | (values > limits[1])).sum())
    if outside:
        text = f"{outside} point{'s' if outside > 1 else ''} off scale"
        across = blended_transform_factory(axes.figure.transFigure, axes.transAxes)
        _text(axes, 0.985, 1.085, text, theme.muted, size=7.5, ha="right", va="top", transform=across)


def _step_range(panel: Panel) -> tuple[int, int]:
    steps = [s.steps for line in panel.lines for s in (line.series, line.held_out) if s is not None and len(s)]
    return min((int(s[0]) for s in steps), default=0), max((int(s[-1]) for s in steps), default=0)


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


def _padded(low: float, high: float, *, log: bool, headroom: float) -> tuple[float, float]:
    if log:
        return low / 1.25, high * 1.25 * (high / low) ** headroom
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    floor = low - room
    return (0.0 if low >= 0 and floor < 0 else floor), high + room + headroom * (high + room - floor)
