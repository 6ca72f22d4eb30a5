"""Writes the report: `report.html`, one file that loads nothing from anywhere, and the sheets `curves_*.png` beside
it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jp_train.errors import ConfigError, DataError
from jp_train.run.reading import EvaluationRow, RunData, read_run
from jp_train.run.summary import Summary, parse_time, summarize, template_changes
from jp_train.terminal import duration
from jp_train.tools.html import large, percent, write_page
from jp_train.tools.report import curves
from jp_train.tools.report.curves import LIGHT, Panel, PanelGroup
from jp_train.tools.report.panels import Layout, is_sequence_of_stages, panel_groups, stage_number

if TYPE_CHECKING:
    from PIL.Image import Image


def build_report(
    run_dirs: Sequence[Path], out: Path | None = None, title: str | None = None, *, stages: bool | None = None
) -> Path:
    """Write the report of one or several runs and return the path of the HTML file.

    `run_dirs`: run folders, or a folder whose `stage1`, `stage2`, ... are run folders. Several are laid side by side
    when they are the stages of one training (`stages`; None: when their names say so), else they are overlaid. `out`:
    an .html file or a folder for `report.html`; None: the run folder itself, or the parent that several share.

    Raises DataError when a folder is no run folder or has no metrics, ConfigError when `out` is needed and missing.
    """
    paths = _expand([Path(p) for p in run_dirs])
    if not paths:
        raise ConfigError("report needs at least one run folder; name the `run_dir` of a training")
    target = _target(paths, out)
    runs = [read_run(path, label=label) for path, label in zip(paths, _labels(paths), strict=True)]
    side_by_side = is_sequence_of_stages(runs) if stages is None else stages
    layout = Layout.stages if side_by_side else Layout.overlay
    if layout is Layout.stages:
        runs.sort(key=lambda run: stage_number(run.path.resolve().name) or 0)
    groups = panel_groups(runs, layout)
    target.parent.mkdir(parents=True, exist_ok=True)
    charts: dict[str, list[Chart]] = {}
    for group in groups:
        images = [curves.draw_panel(panel, LIGHT) for panel in group.panels]
        curves.write_sheet(images, _columns(group, runs, layout), target.parent / f"curves_{group.key}.png")
        charts[group.key] = [_chart(panel, image) for panel, image in zip(group.panels, images, strict=True)]
    values = _values(runs, groups, layout)
    write_page(
        target,
        "report/report.html",
        title=title or _default_title(paths, layout),
        charts=charts,
        several=len(runs) > 1,
        **values,
    )
    return target


def _expand(paths: list[Path]) -> list[Path]:
    expanded: list[Path] = []
    for path in paths:
        if not (path / "metrics.jsonl").is_file() and path.is_dir():
            children = [
                c for c in path.iterdir() if stage_number(c.name) is not None and (c / "metrics.jsonl").is_file()
            ]
            if children:
                expanded += sorted(children, key=lambda c: stage_number(c.name) or 0)
                continue
        expanded.append(path)
    twice = [str(path) for path, n in Counter(p.resolve() for p in expanded).items() if n > 1]
    if twice:
        raise ConfigError(f"run folder {twice[0]} is given twice; name every run once")
    return expanded


def _labels(paths: Sequence[Path]) -> list[str]:
    """Folder names; where two are the same, with as much of the path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _target(paths: Sequence[Path], out: Path | None) -> Path:
    if out is not None:
        return out if out.suffix.lower() in (".html", ".htm") else out / "report.html"
    parents = {path.resolve().parent for path in paths}
    if len(paths) == 1:
        if not paths[0].is_dir():
            raise DataError(f"{paths[0]} is not a folder; expected a run folder (the `run_dir` of a training)")
        return paths[0] / "report.html"
    if len(parents) > 1:
        raise ConfigError(
            f"the {len(paths)} run folders have no common parent folder to write the report to; give --out FOLDER or "
            "--out FILE.html"
        )
    return parents.pop() / "report.html"


def _default_title(paths: Sequence[Path], layout: Layout) -> str:
    if len(paths) == 1:
        return f"Run {paths[0].resolve().name}"
    if layout is Layout.stages:
        return f"{paths[0].resolve().parent.name}: {len(paths)} stages"
    return f"{len(paths)} runs compared"


def _columns(group: PanelGroup, runs: Sequence[RunData], layout: Layout) -> int:
    if layout is Layout.stages and len(runs) > 1:
        return len(runs)
    return 3 if len(group.panels) == 3 else min(2, len(group.panels))


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One panel as PNG files for the two colour schemes, their size in pixels, and in words what they show."""

    light: bytes
    dark: bytes
    width: int
    height: int
    alt: str


def _chart(panel: Panel, image: Image) -> Chart:
    light, dark = curves.to_pngs(image)
    width, height = image.size
    return Chart(light=light, dark=dark, width=width, height=height, alt=panel.describe())


def _values(runs: Sequence[RunData], groups: Sequence[PanelGroup], layout: Layout) -> dict[str, Any]:
    """What the template shows, but for title and charts."""
    summaries = [summarize(run) for run in runs]
    changes = template_changes(runs) if layout is Layout.stages else {}
    shown = {
        "evaluated": [run for run in runs if run.evaluation],
        "sampled": [run for run in runs if run.samples or run.samples_left_out],
        "with_bad_samples": [run for run in runs if run.ledger.total],
    }
    sections = [("summary", "Summary")]
    sections += [("evaluation", "Evaluation")] if shown["evaluated"] else []
    sections += [("samples", "Samples")] if shown["sampled"] else []
    sections += [(group.key, group.title) for group in groups] + [("events", "Events")]
    sections += [("ledger", "Bad samples")] if shown["with_bad_samples"] else []
    sections += [("config", "Configuration")]
    return {
        **shown,
        "runs": runs,
        "summaries": summaries,
        "template_changes": changes,
        "sections": sections,
        "tiles": _tiles(summaries, layout),
        "notes": [*changes.values(), *_notes(runs)],
        "group_rows": _group_rows(groups),
        "columns": {group.key: _columns(group, runs, layout) for group in groups},
        "bar_scale": bar_scale,
        "details": details,
        "parse_time": parse_time,
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    }


def _group_rows(groups: Sequence[PanelGroup]) -> list[list[PanelGroup]]:
    """Groups of one panel that follow each other share a row of the page."""
    rows: list[list[PanelGroup]] = []
    for group in groups:
        if rows and len(group.panels) == len(rows[-1][-1].panels) == 1:
            rows[-1].append(group)
        else:
            rows.append([group])
    return rows


def _tiles(summaries: Sequence[Summary], layout: Layout) -> list[tuple[str, str]]:
    """The few figures that a reader looks for first; of one run or one training, not of runs that compete."""
    if layout is Layout.overlay and len(summaries) > 1:
        return []
    last = summaries[-1]
    steps = sum(s.steps_done for s in summaries)
    planned = sum(s.steps_planned or 0 for s in summaries)
    tokens = sum(s.tokens_total or 0 for s in summaries)
    seconds = [s.elapsed_s for s in summaries if s.elapsed_s is not None]
    fills = [s.fill for s in summaries if s.fill is not None]
    several = len(summaries) > 1
    return [
        (last.state_words, f"state of {last.label}" if several else "state"),
        (f"{steps:,}", f"of {planned:,} steps" if planned else "steps"),
        (large(last.tokens_per_s), f"tokens/s in {last.label}" if several else "tokens/s"),
        (percent(min(fills), 2) if fills else "–", "least mean packing fill" if several else "packing fill"),
        (large(float(tokens)), "tokens trained on"),
        (duration(sum(seconds)) if seconds else "–", "in training steps"),
    ]


def _notes(runs: Sequence[RunData]) -> list[str]:
    """What a reader should know about the files that the page was made from."""
    notes = []
    for run in runs:
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        absent = {key: text for key, text in run.missing.items() if key not in ("config", "events")}
        notes += [prefix + text for text in absent.values()]
        for name, number in run.unreadable_lines.items():
            notes.append(
                f"{prefix}{number} line{'s' if number > 1 else ''} of {name} could not be read "
                "(a run that is killed leaves half a line)."
            )
        if run.repeated_steps:
            notes.append(
                f"{prefix}{run.repeated_steps} steps were lost to an interruption and trained again; the curves show "
                "the second time."
            )
    return notes


def details(event: Mapping[str, Any]) -> str:
    """Everything of an event but its time, name and step."""
    return ", ".join(
        f"{key} {_plain(value)}"
        for key, value in event.items()
        if key not in ("time", "event", "step") and value not in ("", None)
    )


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return str(value)


def bar_scale(row: EvaluationRow) -> float:
    """The value at the right end of a figure's bar: 1 where everything lies between 0 and 1."""
    known = [v for v in (row.value, row.chance, row.ceiling, row.target) if v is not None]
    return 1.0 if all(0 <= v <= 1 for v in known) else 1.05 * max(map(abs, known)) or 1.0
