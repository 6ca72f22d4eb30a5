"""A forecast as images: the memory of every candidate against the GPU's limit, and where a step's time goes.
matplotlib is imported on use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jp_train.errors import ConfigError
from jp_train.tools.forecast.table import PARTS, format_forecast

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#b8c0c8", "#7a6fbe", "#8c96a0", "#D55E00", "#E69F00", "#CC79A7", "#4a525a")
"""Of PARTS and the overhead: Okabe and Ito (colour universal design, 2008) and greys."""
LABELS = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "reduce_bucket": "reduce bucket",
    "secondary": "hpZ copy",
    "vq": "VQ tokenizer",
    "activations": "activations, logits",
    "gathered": "gathered parameters",
    "reducing": "gradients on their way",
    "overhead": "CUDA, NCCL, fragmentation",
}
WORK = (
    ("compute", "arithmetic", "#0072B2"),
    ("recompute", "recomputation", "#56B4E9"),
    ("vq_encode", "VQ encoding", "#009E73"),
    ("gather_forward", "gather, forward", "#E69F00"),
    ("gather_backward", "gather, backward", "#D55E00"),
    ("reduce", "scatter gradients", "#CC79A7"),
    ("update", "update", "#8c96a0"),
    ("host", "waiting for Python", "#444b54"),
)
INK, MUTED, GRID, LIMIT = "#1b1f24", "#656d76", "#e6e9ed", "#b3261e"


def save_forecast(forecast: dict[str, Any], folder: Path) -> str:
    """Write `memory.png`, `time.png`, `forecast.json` and `forecast.html` into `folder`; returns their paths in words.

    Raises ConfigError where the folder cannot be written.
    """
    from jp_train.tools.html import write_page

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "forecast.json").write_text(json.dumps(forecast, indent=1), encoding="utf-8")
        draw_memory(forecast, folder / "memory.png")
        draw_time(forecast, folder / "time.png")
        images = [(folder / name).read_bytes() for name in ("memory.png", "time.png")]
        write_page(folder / "forecast.html", "forecast/forecast.html",
                   title=f"Forecast: {_title(forecast)}", text=format_forecast(forecast), images=images)  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"cannot write the forecast to {folder}: {error}; give --out a folder that can be written"
        ) from error
    return f"{folder / 'forecast.html'}, memory.png, time.png, forecast.json"


def draw_memory(forecast: dict[str, Any], path: Path) -> None:
    """One bar a candidate, stacked by what takes the memory, against what the GPU has."""
    rows, limit = forecast["candidates"], forecast["hardware"]["memory_gib"]
    figure, axes = _figure(2.4 + 0.52 * len(rows))
    figure.suptitle(f"Memory of one GPU: {_title(forecast)}", fontsize=13, color=INK, x=0.012, ha="left")
    end = max(1.08 * limit, *(1.12 * row["total_gib"] for row in rows))
    for at, row in enumerate(rows):
        left = 0.0
        values = [row["memory_gib"][name] for name, _ in PARTS] + [row["overhead_gib"]]
        for value, colour in zip(values, COLOURS, strict=True):
            axes.barh(at, value, left=left, height=0.66, color=colour, edgecolor="white", linewidth=0.6)
            left += value
        mark = "fits" if row["roomy"] else "barely fits" if row["fits"] else "does not fit"
        colour = INK if row["fits"] else LIMIT
        axes.text(left + end / 150, at, f"{left:.1f}   {mark}", va="center", fontsize=9, color=colour)
    axes.axvline(limit, color=LIMIT, linewidth=1.6)
    text = f"{forecast['cluster']['gpu']}: {limit:g} GiB"
    axes.text(limit - end / 200, -0.72, text, color=LIMIT, fontsize=9, ha="right", va="bottom")
    _name_rows(axes, rows)
    axes.set_ylim(len(rows) - 0.45, -0.95)
    axes.set_xlim(0, end)
    axes.set_xlabel("GiB at the peak of the fullest micro-batch", fontsize=9, color=MUTED, loc="left")
    _legend(figure, list(zip(LABELS.values(), COLOURS, strict=True)))
    figure.savefig(path)


def draw_time(forecast: dict[str, Any], path: Path) -> None:
    """What the chosen configuration's step is made of, and the step of every candidate from full overlap to none."""
    rows, time = forecast["candidates"], forecast["chosen"]["time"]
    figure, (axes, second) = _figure(4.1 + 0.42 * len(rows), (1.5, 0.6 + 0.42 * len(rows)))
    figure.suptitle(f"Time of a step: {_title(forecast)}", fontsize=13, color=INK, x=0.012, ha="left")
    left = 0.0
    for name, _, colour in WORK:
        value = time["parts_s"][name]
        axes.barh(0, value, left=left, height=0.5, color=colour, edgecolor="white", linewidth=0.6)
        if value > 0.06 * time["serial_s"]:
            axes.text(left + value / 2, 0, f"{value:.2f}", ha="center", va="center", color="white", fontsize=9)
        left += value
    axes.axvline(time["overlapped_s"], color=INK, linewidth=1.2, linestyle=":")
    text = f"overlapped: {time['overlapped_s']:.2f} s  "
    axes.text(time["overlapped_s"], -0.42, text, fontsize=9, color=INK, ha="right", va="bottom")
    axes.set_yticks([0], ["one after\nthe other"])
    axes.set_ylim(0.45, -0.75)
    axes.set_xlim(0, 1.04 * left)
    mfu = f"MFU {100 * time['serial_mfu']:.0f} to {100 * time['mfu']:.0f} %"
    axes.set_title(f"This configuration: {mfu}, bound by {time['bound']}", fontsize=10, loc="left", color=INK)
    axes.set_xlabel("seconds", fontsize=9, color=MUTED, loc="left")
    for at, row in enumerate(rows):
        colour = "#0072B2" if row["fits"] else "#c5ccd3"
        second.plot((row["step_s"], row["serial_step_s"]), (at, at), color=colour, linewidth=5, solid_capstyle="round")
        text = f"{row['step_s']:.2f} to {row['serial_step_s']:.2f} s" + ("" if row["fits"] else ", does not fit")
        second.text(
            row["serial_step_s"], at, f"   {text}", va="center", fontsize=9, color=INK if row["fits"] else MUTED
        )
    _name_rows(second, rows)
    second.set_ylim(len(rows) - 0.5, -0.6)
    second.set_xlim(0, 1.3 * max(row["serial_step_s"] for row in rows))
    second.set_title("Every candidate: from full overlap to none", fontsize=10, loc="left", color=INK)
    second.set_xlabel("seconds a step", fontsize=9, color=MUTED, loc="left")
    _legend(figure, [(label, colour) for _, label, colour in WORK])
    figure.savefig(path)


def _figure(height: float, panels: tuple[float, ...] = ()) -> tuple[Any, Any]:
    """A white figure of one panel or of several under each other, in our style; no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels) or 1, 1, height_ratios=panels or None, squeeze=False)[:, 0]
    for panel in axes:
        _style(panel)
    return figure, axes if panels else axes[0]


def _name_rows(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["own"] else "normal")
        label.set_color(INK)


def _style(axes: Axes) -> None:
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _legend(figure: Any, entries: list[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=label) for label, colour in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=9, frameon=False)


def _title(forecast: dict[str, Any]) -> str:
    cluster = forecast["cluster"]
    return f"{forecast['model']} {forecast['stage']}, {cluster['nodes']} x {cluster['per_node']} {cluster['gpu']}"


def _recomputed(candidate: dict[str, Any]) -> str:
    if not candidate["activation_checkpointing"]:
        return "all kept"
    every = candidate["recompute_every"]
    return "checkpointing" if every == 1 else f"1/{every} checkpointed"


def _name(candidate: dict[str, Any]) -> str:
    rows = (
        f"{candidate['micro_batch_rows']} row{'s' if candidate['micro_batch_rows'] > 1 else ''} x "
        f"{candidate['accumulation']}"
    )
    parts = [rows, _recomputed(candidate), *([f"hpZ {candidate['hpz']}"] if candidate["hpz"] > 1 else [])]
    marks = [mark for mark, is_so in (("this", candidate["own"]), ("best", candidate["best"])) if is_so]
    return ", ".join(parts) + (f"  ({', '.join(marks)})" if marks else "")
