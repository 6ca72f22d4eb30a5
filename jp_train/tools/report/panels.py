"""Decides which panels a report has: by run when runs are compared, by kind within one run, one column a stage for
consecutive stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from jp_train.run.reading import RunData, Series
from jp_train.run.summary import KIND_NAMES, as_int, configured_shares, failures, held_out, settled
from jp_train.tools.report.curves import INK, Line, Mark, Panel, PanelGroup, shared_limits

MARKED_EVENTS = {
    "accepted_differences": "changed",
    "resume": "resume",
    "rolled_back": "went back",
    "save": "save",
    "spike": "spike",
    "stop": "stop",
    "stopped_early": "stopped early",
}
"""Events that have a mark on the step axis, and its name."""
MAX_SOURCES = 7


class Layout(Enum):
    """How several runs share a page."""

    overlay = "overlay"
    stages = "stages"


def panel_groups(runs: Sequence[RunData], layout: Layout) -> tuple[PanelGroup, ...]:
    """The sections of the curves, in reading order. A group without any data is left out, an absent kind has no
    panel."""
    groups = [
        PanelGroup(
            key="loss",
            title="Loss",
            note="Line: moving average. Faint: every step. Rings: held-out documents, the same ones every time. "
            "Triangles on the step axis, here and below: saved checkpoints; crosses: spikes.",
            panels=_loss(runs, layout),
        ),
        PanelGroup(
            key="loss_source",
            title="Loss by source",
            note="Training loss of each source, moving average.",
            panels=_per_run(runs, _source_panel, share=layout is Layout.stages),
        ),
        PanelGroup(
            key="mixture",
            title="Mixture",
            note="Share of each kind in a step. Dashed: configured.",
            panels=_mixture(runs, layout),
        ),
        PanelGroup(
            key="speed",
            title="Packing and speed",
            note="How full the rows were; tokens of all ranks; the time a step waited for data. Speeds leave out the "
            "first step after a start or a resume, which compiles, allocates and waits for the first data.",
            panels=_simple(runs, layout, FILL, THROUGHPUT, DATA_WAIT),
        ),
        PanelGroup(
            key="optim",
            title="Optimizer",
            note="Gradient norm before clipping.",
            panels=_simple(runs, layout, LEARNING_RATE, GRADIENT_NORM),
        ),
    ]
    return tuple(group for group in groups if any(line for panel in group.panels for line in panel.lines))


def is_sequence_of_stages(runs: Sequence[RunData]) -> bool:
    """Whether the folders are stage1, stage2, ... under one parent: one training, not competitors."""
    names = [run.path.resolve().name for run in runs]
    parents = {run.path.resolve().parent for run in runs}
    return (
        len(runs) > 1
        and len(parents) == 1
        and len(set(names)) == len(names)
        and all(stage_number(n) is not None for n in names)
    )


def stage_number(name: str) -> int | None:
    """3 for `stage3` and `stage_3`; None for a folder that is no stage."""
    digits = name.lower().removeprefix("stage").lstrip("_-")
    return int(digits) if name.lower().startswith("stage") and digits.isdecimal() else None


def marks_of(run: RunData) -> tuple[Mark, ...]:
    """The run's events that belong on a step axis. Saves are left out where they would make a fence of ticks."""
    marks = [Mark(step=step, kind="failed") for step in failures(run.events)]
    for event in run.events:
        step = as_int(event.get("step"))
        if step is not None and (name := MARKED_EVENTS.get(str(event["event"]))):
            marks.append(Mark(step=step, kind=name))
    ends_early = {m.step for m in marks if m.kind == "stopped early"}
    marks = [m for m in marks if not (m.kind == "stop" and (m.step in ends_early or m.step >= run.last_step))]
    if sum(m.kind == "save" for m in marks) > 40:
        marks = [m for m in marks if m.kind != "save"]
    return tuple(marks)


def window_of(series: Series | None) -> int:
    """Steps to average over: a fortieth of the run, 1 (nothing) for a very short one, at most 500."""
    count = len(series) if series is not None else 0
    return 1 if count < 20 else min(500, max(5, count // 40))


def _line(
    run: RunData, key: str, label: str, color: int, *, held_out: Series | None = None, reference: float | None = None
) -> Line | None:
    series = run.series.get(key)
    if (series is None or not len(series.finite())) and not held_out:
        return None
    window = window_of(series)
    return Line(label=label, color=color, series=series, window=window, held_out=held_out, reference=reference)


def _present(lines: Sequence[Line | None]) -> tuple[Line, ...]:
    return tuple(line for line in lines if line is not None)


def _title(run: RunData, title: str, runs: Sequence[RunData]) -> str:
    return f"{run.label} · {title}" if len(runs) > 1 else title.capitalize()


def _per_run(
    runs: Sequence[RunData], make: Callable[[RunData, Sequence[RunData]], Panel], *, share: bool
) -> tuple[Panel, ...]:
    panels = [make(run, runs) for run in runs]
    if not any(panel.lines for panel in panels):
        return ()
    return _same_scale(panels) if share else tuple(panels)


def _same_scale(panels: Sequence[Panel]) -> tuple[Panel, ...]:
    limits = shared_limits(panels)
    return tuple(replace(panel, limits=limits) for panel in panels)


def _loss(runs: Sequence[RunData], layout: Layout) -> tuple[Panel, ...]:
    unit = "loss per supervised token (nats)"
    if layout is Layout.stages and len(runs) > 1:

        def of_stage(run: RunData, among: Sequence[RunData]) -> Panel:
            lines = [
                _line(run, f"loss/{kind}", kind, i, held_out=held_out(run, kind)) for i, kind in enumerate(KIND_NAMES)
            ]
            return Panel(title=_title(run, "loss", among), unit=unit, lines=_present(lines), marks=marks_of(run))

        return _per_run(runs, of_stage, share=True)
    panels = []
    for i, name in enumerate(("total", *KIND_NAMES)):
        color = INK if name == "total" else i - 1
        lines = []
        for j, run in enumerate(runs):
            label, number = ("", color) if len(runs) == 1 else (run.label, j)
            lines.append(_line(run, f"loss/{name}", label, number, held_out=held_out(run, name)))
        marks = marks_of(runs[0]) if len(runs) == 1 else ()
        title = "All kinds" if name == "total" else name.capitalize()
        panels.append(Panel(title=title, unit=unit, lines=_present(lines), marks=marks))
    return tuple(panel for panel in panels if panel.lines)


def _source_panel(run: RunData, runs: Sequence[RunData]) -> Panel:
    prefix = "loss/source/"
    everywhere = sorted({key.removeprefix(prefix) for other in runs for key in other.series if key.startswith(prefix)})
    names = [name for name in everywhere if prefix + name in run.series]  # a source has one colour in all stages
    lines = [_line(run, prefix + name, name, everywhere.index(name)) for name in names[:MAX_SOURCES]]
    quiet = tuple(replace(line, held_out=None) for line in _present(lines))
    more = f", {MAX_SOURCES} of {len(names)} sources" if len(names) > MAX_SOURCES else ""
    return Panel(
        title=_title(run, "loss by source", runs),
        unit=f"loss per supervised token (nats){more}",
        lines=quiet,
        marks=marks_of(run),
    )


def _mixture(runs: Sequence[RunData], layout: Layout) -> tuple[Panel, ...]:
    def unit(run: RunData) -> str:
        return f"share of a step's {run.configured('stage.ratio_unit', 'documents')}"

    if layout is Layout.stages or len(runs) == 1:

        def of_run(run: RunData, among: Sequence[RunData]) -> Panel:
            shares = configured_shares(run)
            lines = [
                _line(run, f"mixture/{kind}", kind, i, reference=shares[i])
                for i, kind in enumerate(KIND_NAMES)
                if _takes_part(run, kind)
            ]
            return Panel(
                title=_title(run, "realised mixture", among), unit=unit(run), lines=_present(lines), percent=True
            )

        return _per_run(runs, of_run, share=True)
    panels = []
    for i, kind in enumerate(KIND_NAMES):
        lines = [
            _line(run, f"mixture/{kind}", run.label, j, reference=configured_shares(run)[i])
            for j, run in enumerate(runs)
        ]
        if not any(_takes_part(run, kind) for run in runs):
            continue
        panels.append(Panel(title=f"Share of {kind}", unit=unit(runs[0]), lines=_present(lines), percent=True))
    return tuple(panel for panel in panels if panel.lines)


def _takes_part(run: RunData, kind: str) -> bool:
    """Whether the kind was asked for or seen: a kind at 0 from the first to the last step has no line."""
    series = run.series.get(f"mixture/{kind}")
    return bool(configured_shares(run)[KIND_NAMES.index(kind)]) or (
        series is not None and bool((series.finite().values > 0).any())
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What a panel of one metric shows: `series` reads it from a run; `window` None: averaged as the run is long."""

    title: str
    unit: str
    series: Callable[[RunData], Series | None]
    window: int | None = None
    threshold: Callable[[RunData], tuple[str, float] | None] = lambda run: None
    percent: bool = False
    log_y: bool = False

    def line(self, run: RunData, label: str, color: int) -> Line | None:
        """The run's curve, None where it has no finite value."""
        series = self.series(run)
        if series is None or not len(series.finite()):
            return None
        return Line(label=label, color=color, series=series, window=self.window or window_of(series))

    def panel(self, run: RunData, title: str, lines: tuple[Line, ...], marks: tuple[Mark, ...]) -> Panel:
        """A panel of these curves; the threshold is `run`'s."""
        return Panel(title=title, unit=self.unit, lines=lines, marks=marks, threshold=self.threshold(run),
                     percent=self.percent, log_y=self.log_y)  # fmt: skip


def _simple(runs: Sequence[RunData], layout: Layout, *metrics: Metric) -> tuple[Panel, ...]:
    """Of every metric a panel a stage on a common scale, or one panel with a line a run."""
    panels: list[Panel] = []
    for metric in metrics:
        if layout is Layout.stages and len(runs) > 1:
            of_stages = [
                metric.panel(
                    run, _title(run, metric.title.lower(), runs), _present([metric.line(run, "", INK)]), marks_of(run)
                )
                for run in runs
            ]
            panels += _same_scale(of_stages) if any(panel.lines for panel in of_stages) else ()
            continue
        single = len(runs) == 1
        lines = _present(
            [metric.line(run, "" if single else run.label, INK if single else j) for j, run in enumerate(runs)]
        )
        panels += [metric.panel(runs[0], metric.title, lines, marks_of(runs[0]) if single else ())] if lines else []
    return tuple(panels)


def _throughput(run: RunData) -> Series | None:
    return settled(run, "perf/tokens_per_s")


def _wait_share(run: RunData) -> Series | None:
    step, wait = settled(run, "time/step_s"), settled(run, "time/data_wait_s")
    if step is None or wait is None:
        return None
    steps, of_step, of_wait = np.intersect1d(step.steps, wait.steps, return_indices=True)
    positive = step.values[of_step] > 0
    of_step, of_wait = of_step[positive], of_wait[positive]
    return Series(steps=steps[positive], values=wait.values[of_wait] / step.values[of_step])


def _clip(run: RunData) -> tuple[str, float] | None:
    clip = run.configured("optimizer.clip")
    return ("clip " + f"{clip:g}", float(clip)) if isinstance(clip, (int, float)) and clip > 0 else None


FILL = Metric(
    title="Packing fill", unit="share of seq_len used", series=lambda run: run.series.get("packing/fill"), percent=True
)
THROUGHPUT = Metric(title="Throughput", unit="tokens a second, all ranks", series=_throughput)
DATA_WAIT = Metric(title="Data wait", unit="share of the step's time", series=_wait_share, percent=True)
LEARNING_RATE = Metric(
    title="Learning rate",
    unit="of the schedule, before module factors",
    series=lambda run: run.series.get("optim/lr"),
    window=1,
)
GRADIENT_NORM = Metric(
    title="Gradient norm",
    unit="global L2 norm, log scale",
    series=lambda run: run.series.get("optim/grad_norm"),
    log_y=True,
    threshold=_clip,
)
