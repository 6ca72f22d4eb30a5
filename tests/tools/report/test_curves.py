"""Charts: what is drawn where, and the dark version of one."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from jp_train.run.reading import Series
from jp_train.tools.report import curves
from jp_train.tools.report.curves import (
    DARK,
    DPI,
    LIGHT,
    PANEL_INCHES,
    Line,
    Mark,
    Panel,
    draw_panel,
    recolored,
    shared_limits,
    to_pngs,
)


def series(*values: float) -> Series:
    return Series(steps=np.arange(1, len(values) + 1) * 10, values=np.array(values))


def rgb(color: str) -> list[int]:
    return list(bytes.fromhex(color[1:]))


def panel(held_out: Series | None = None, marks: tuple[Mark, ...] = ()) -> Panel:
    line = Line(label="text", color=0, series=series(*np.linspace(4, 1, 30)), held_out=held_out)
    return Panel(title="Text", unit="loss per supervised token (nats)", lines=(line,), marks=marks)


@pytest.mark.parametrize(("rings", "joined"), [(2, False), (3, True)])
def test_rings_are_joined_from_three_on(rings: int, joined: bool) -> None:
    axes = Figure().add_axes((0, 0, 1, 1))
    curves._draw(axes, panel(held_out=series(*[3.0] * rings)), LIGHT)
    (held_out,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert (held_out.get_linestyle() != "None") == joined


def test_a_line_that_ends_early_says_where_and_a_long_name_leaves_its_value_inside_the_picture() -> None:
    name = "step_0000012_back_to_0000004"
    lines = (
        Line(label=name, color=0, series=series(*[0.9993] * 20)),
        Line(label="run_b", color=1, series=series(*[0.9, 0.95] * 50)),
    )
    shown = Panel(title="Packing fill", unit="share of seq_len used", lines=lines, percent=True)
    axes = Figure().add_axes((0, 0, 1, 1))
    curves._draw(axes, shown, LIGHT)
    labels = [text.get_text() for text in axes.texts if text.get_position()[0] == 1.02]
    assert labels == ["step_00…0000004 99.93% at 200", "run_b 95.0%"] and name in shown.describe()
    pixels = np.asarray(draw_panel(shown, LIGHT))
    assert (pixels[:, -6:] == rgb(LIGHT.background)).all(), "nothing runs out of the picture"


def test_points_off_scale_are_counted_where_nothing_else_is_written() -> None:
    values = [1.0] * 299 + [9.0]
    lines = (Line(label="a rather long name", color=0, series=series(*values), window=40),)
    shown = Panel(title="Text", unit="loss per supervised token (nats)", lines=lines)
    figure = Figure(figsize=PANEL_INCHES, dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.095, 0.135, 0.45, 0.70))
    curves._draw(axes, shown, LIGHT)
    canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    note = boxes.pop("1 point off scale")
    assert not [text for text, box in boxes.items() if box.overlaps(note)] and note.x1 < figure.bbox.x1


def test_events_close_to_each_other_share_a_label_and_the_names_stand_above_the_data() -> None:
    marks = (Mark(step=100, kind="stop"), Mark(step=104, kind="resume"), Mark(step=200, kind="resume"))
    shown = panel(marks=(*marks, Mark(step=150, kind="save")))
    axes = Figure().add_axes((0, 0, 1, 1))
    curves._draw(axes, shown, LIGHT)
    names = [text.get_text().strip() for text in axes.texts]
    assert [name for name in names if "resume" in name] == ["stop, resume", "resume"]
    (saves,) = [line for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert list(saves.get_xdata()) == [150]
    limits, plain = shared_limits([shown]), shared_limits([panel()])
    assert limits is not None and plain is not None
    assert limits[0] == plain[0] and limits[1] > plain[1] + 0.05 * (plain[1] - plain[0])
    assert shared_limits([replace(shown, marks=marks[:0])]) == plain


def test_steps_on_the_axis_are_round_numbers() -> None:
    axes = Figure().add_axes((0, 0, 1, 1))
    curves._draw(axes, panel(), LIGHT)
    below = [text.get_text() for text in axes.texts if text.get_position()[1] == -0.04]
    assert below == ["50", "100", "150", "200", "250", "300"]


def test_every_colour_of_the_light_theme_becomes_its_counterpart_and_a_blend_the_same_blend() -> None:
    pairs = [(LIGHT.background, DARK.background), (LIGHT.ink, DARK.ink), (LIGHT.alert, DARK.alert)]
    pairs += list(zip(LIGHT.cycle, DARK.cycle, strict=True))
    before, after = (np.array([rgb(pair[side]) for pair in pairs], float) for side in (0, 1))
    assert np.abs(recolored(before, LIGHT, DARK) - after).max() < 1e-9
    for share in (0.28, 0.6):
        blend = before[:1] + share * (before - before[:1])
        expected = after[:1] + share * (after - after[:1])
        assert np.abs(recolored(blend, LIGHT, DARK) - expected).max() < 1e-9


def test_the_dark_chart_is_the_light_one_in_other_colours() -> None:
    image = draw_panel(panel(), LIGHT)
    assert image.size == tuple(round(inches * DPI) for inches in PANEL_INCHES)
    light, dark = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int) for png in to_pngs(image))
    assert light.shape == dark.shape == (*image.size[::-1], 3)
    assert (
        np.abs(light[0, 0] - rgb(LIGHT.background)).max() <= 2 and np.abs(dark[0, 0] - rgb(DARK.background)).max() <= 2
    )
    line = np.abs(light - rgb(LIGHT.cycle[0])).max(-1) <= 2
    assert line.sum() > 500 and np.abs(dark[line] - rgb(DARK.cycle[0])).max() <= 8
