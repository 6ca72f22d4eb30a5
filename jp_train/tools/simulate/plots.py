"""A forecast as one image of six panels. matplotlib is imported on use, with its Agg canvas and no global state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jp_train.errors import DataError
from jp_train.types import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND_COLOURS = {"understanding": "#0072B2", "text": "#009E73", "generation": "#D55E00"}
"""Of Okabe and Ito (colour universal design, 2008). Sources of a kind differ in their dashes."""
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 3)), (0, (9, 2)))
INK, MUTED, GRID = "#1b1f24", "#656d76", "#e6e9ed"


def save_forecast(forecast: dict[str, Any], folder: Path) -> str:
    """Write `simulate.png` and `simulate.json` into `folder`; returns their paths as text. Raises DataError if it
    cannot be written."""
    image, numbers = folder / "simulate.png", folder / "simulate.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(forecast, indent=1), encoding="utf-8")
        draw_forecast(forecast, image)
    except OSError as error:
        raise DataError(
            f"cannot write the forecast to {folder}: {error}; give --out a folder that can be written"
        ) from error
    return f"{image}, {numbers}"


def draw_forecast(forecast: dict[str, Any], path: Path) -> None:
    """The six panels as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 9.8), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    title = (
        f"{forecast['stage']}: {forecast['steps']:,} steps x {forecast['rows_per_step']} rows of "
        f"{forecast['seq_len']:,} tokens, {forecast['world']} ranks"
    )
    if forecast["synthetic"]:
        title += "   (synthetic lengths)"
    figure.suptitle(title, fontsize=14, color=INK, x=0.01, ha="left")
    panels = figure.subplots(2, 3)
    for draw, axes in zip((_epochs, _lengths, _empty, _balance, _imbalance, _lacks), panels.flat, strict=True):
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(MUTED)
        draw(axes, forecast)
        axes.title.set_color(INK)
    figure.savefig(path)


def _styles(forecast: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour by kind, dashes by place within the kind."""
    styles: dict[str, dict[str, Any]] = {}
    seen = dict.fromkeys(KIND_COLOURS, 0)
    for source in forecast["sources"]:
        kind = source["kind"]
        styles[source["name"]] = {
            "color": KIND_COLOURS[kind],
            "linestyle": DASHES[seen[kind] % len(DASHES)],
            "linewidth": 1.8,
        }
        seen[kind] += 1
    return styles


def _heading(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)


def _epochs(axes: Axes, forecast: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for name, style in _styles(forecast).items():
        (source,) = (source for source in forecast["sources"] if source["name"] == name)
        steps, epochs = np.array(source["epochs_at_steps"]).T
        # straight lines, also on log axes
        between = np.unique(np.concatenate([steps, np.geomspace(1, max(forecast["steps"], 2), 400)]))
        axes.plot(between, np.interp(between, steps, epochs), label=f"{name} {source['epochs']:.2f}", **style)
        repeats = source["repeats_at_steps"]
        axes.plot(
            repeats,
            np.interp(repeats, steps, epochs),
            "o",
            color=style["color"],
            markersize=6,
            markeredgecolor="white",
            zorder=5,
        )
    if any(source["repeats_at_steps"] for source in forecast["sources"]):
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    _heading(axes, "Epochs over the stage (dots: the source begins again)", "step", "epochs so far")
    first = min(
        (step for source in forecast["sources"] for step in source["repeats_at_steps"]), default=forecast["steps"]
    )
    if first < forecast["steps"] / 20:  # else the first dots would lie in the corner
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(max(1, first / 3), forecast["steps"])
        axes.set_ylim(bottom=0.1)
        axes.legend(fontsize=8, frameon=False, loc="upper left")
        return
    axes.set_xlim(0, forecast["steps"])
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _lengths(axes: Axes, forecast: dict[str, Any]) -> None:
    end = 0.0
    for name, style in _styles(forecast).items():
        histogram = forecast["histograms"]["lengths"].get(name)
        if histogram is None:
            continue
        counts, edges = np.array(histogram["counts"], float), np.array(histogram["edges"])
        share = 100 * counts / counts.sum()
        axes.stairs(share, edges, label=name, **style)
        end = max(end, edges[1 + np.flatnonzero(share > 0.05).max()])
    axes.axvline(forecast["seq_len"], color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, min(end * 1.05, 2 * forecast["seq_len"]))
    _heading(
        axes,
        "Lengths of the samples (dotted: data.seq_len)",
        "tokens (the last bin: all longer ones)",
        "% of the source",
    )
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_yticks([0, 1, 3, 10, 30, 100], ["0", "1", "3", "10", "30", "100"])
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _empty(axes: Axes, forecast: dict[str, Any]) -> None:
    histogram = forecast["histograms"]["empty_tokens"]
    counts, edges = np.array(histogram["counts"], float), np.array(histogram["edges"])
    axes.stairs(100 * counts / counts.sum(), edges, fill=True, color="#0072B2")
    axes.set_yscale("log")
    fill = forecast["fill"]
    _heading(
        axes, f"Empty end of a row (fill {100 * fill['mean']:.3f} %)", "tokens of a row without a document", "% of rows"
    )


def _balance(axes: Axes, forecast: dict[str, Any]) -> None:
    worlds = [entry["world"] for entry in forecast["ranks"]]
    for name, label, colour in (
        ("step", "ranks meet once a step", "#0072B2"),
        ("micro_batch", "once a micro-batch (ZeRO-3)", "#D55E00"),
    ):
        points = [(entry["world"], entry[name]["lost_percent"]) for entry in forecast["ranks"] if name in entry]
        if points:
            axes.plot(*np.array(points).T, "o-", color=colour, markersize=4, linewidth=1.8, label=label)
    _world_axis(axes, forecast, worlds)
    _heading(axes, "Waiting for the rank with the most FLOPs", "ranks", "% of all arithmetic")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9, frameon=False, loc="upper left")


def _imbalance(axes: Axes, forecast: dict[str, Any]) -> None:
    (entry,) = (entry for entry in forecast["ranks"] if entry["world"] == forecast["world"])
    for name, label, colour in (("step", "of a step", "#0072B2"), ("micro_batch", "of a micro-batch", "#D55E00")):
        if name in entry:
            counts, edges = (
                np.array(entry[name]["histogram"]["counts"], float),
                np.array(entry[name]["histogram"]["edges"]),
            )
            axes.stairs(counts / counts.sum() / np.diff(edges), edges, fill=True, alpha=0.55, color=colour, label=label)
    _heading(
        axes,
        f"Slowest rank over the average, {forecast['world']} ranks",
        "max / mean FLOPs",
        "density over the sampled steps or micro-batches",
    )
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])
    axes.legend(fontsize=9, frameon=False, loc="upper right")


def _lacks(axes: Axes, forecast: dict[str, Any]) -> None:
    worlds = [entry["world"] for entry in forecast["ranks"]]
    for kind in map(str, KINDS):
        for name, style in (("step", "-"), ("micro_batch", (0, (4, 2)))):
            points = [
                (entry["world"], 100 * entry[name]["some_rank_lacks"][kind])
                for entry in forecast["ranks"]
                if kind in entry.get(name, entry["step"])["some_rank_lacks"] and name in entry
            ]
            if points:
                label = kind if name == "step" else None
                axes.plot(
                    *np.array(points).T,
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    linewidth=1.8,
                    color=KIND_COLOURS[kind],
                    label=label,
                )
    _world_axis(axes, forecast, worlds)
    axes.set_ylim(-3, 103)
    _heading(axes, "Some rank has no document of a kind", "ranks", "% of steps (solid) or micro-batches (dashed)")
    axes.legend(fontsize=9, frameon=False, loc="center", bbox_to_anchor=(0.55, 0.3))


def _world_axis(axes: Axes, forecast: dict[str, Any], worlds: list[int]) -> None:
    axes.set_xscale("log", base=2)
    powers = [world for world in worlds if world & (world - 1) == 0]
    axes.set_xticks(powers, [str(world) for world in powers])
    axes.minorticks_off()
    axes.axvline(forecast["world"], color=INK, linewidth=0.8, linestyle=":")
