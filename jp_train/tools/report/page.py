"""Writes the report: `report.html`, one file that loads nothing from anywhere, and the sheets `curves_*.png` beside
it."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jp_train.errors import ConfigError, DataError
from jp_train.run.reading import RunData, SampleImage, read_run
from jp_train.run.summary import Summary, summarize
from jp_train.terminal import duration
from jp_train.tools.report import curves
from jp_train.tools.report.curves import DARK, LIGHT, Panel, PanelGroup
from jp_train.tools.report.panels import Layout, is_sequence_of_stages, panel_groups, stage_number
from jp_train.tools.report.style import CSS
from jp_train.tools.report.tables import (
    STATE_WORDS,
    esc,
    evaluation_table,
    events_table,
    large,
    ledger_tables,
    percent,
    summary_table,
)

if TYPE_CHECKING:
    from PIL.Image import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of the page: even a caption that got past the escaping could load and run nothing."""


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
    drawn: dict[str, str] = {}
    for group in groups:
        pictures = [curves.draw_panel(panel, LIGHT) for panel in group.panels]
        columns = _columns(group, runs, layout)
        curves.write_sheet(pictures, columns, target.parent / f"curves_{group.key}.png")
        drawn[group.key] = _curves(group, columns, pictures)
    page = _page(runs, groups, drawn, layout, title or _default_title(paths, layout))
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


def _expand(paths: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not (path / "metrics.jsonl").is_file() and path.is_dir():
            children = [
                c for c in path.iterdir() if stage_number(c.name) is not None and (c / "metrics.jsonl").is_file()
            ]
            if children:
                found += sorted(children, key=lambda c: stage_number(c.name) or 0)
                continue
        found.append(path)
    twice = [str(path) for path, n in Counter(p.resolve() for p in found).items() if n > 1]
    if twice:
        raise ConfigError(f"run folder {twice[0]} is given twice; name every run once")
    return found


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
            f"the {len(paths)} run folders have no common parent folder to write the report to; give --out FOLDER or --out FILE.html"
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
    return min(2, len(group.panels))


def _page(
    runs: Sequence[RunData], groups: Sequence[PanelGroup], drawn: dict[str, str], layout: Layout, title: str
) -> str:
    summaries = [summarize(run) for run in runs]
    sections: list[tuple[str, str, str]] = [
        ("summary", "Summary", f'<div class="card">{summary_table(summaries)}</div>{_reading_notes(runs)}')
    ]
    sections += [(key, name, html) for key, name, html in (_evaluation(runs), _pictures(runs)) if html]
    sections += [(group.key, group.title, drawn[group.key]) for group in groups]
    sections += [_events(runs), _ledger(runs), _config(runs)]
    nav = "".join(f'<a href="#{key}">{esc(name)}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{esc(name)}</h2>{html}</section>' for key, name, html in sections)
    where = " · ".join(esc(run.path) for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
    now = datetime.now().astimezone()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{CSS}</style></head><body><main><header><h1>{esc(title)}</h1>"
        f'<p>Written {now:%Y-%m-%d %H:%M %Z} from {where}</p></header>{_tiles(summaries, layout)}<nav aria-label="Sections">{nav}</nav>{body}'
        f"<footer>jp_train report. Loss in nats a supervised token; first and last are means over 5% of the steps (at most 50).</footer>"
        f"</main></body></html>\n"
    )


def _tiles(summaries: Sequence[Summary], layout: Layout) -> str:
    """The few figures that a reader looks for first; of one run or one training, not of runs that compete."""
    if layout is Layout.overlay and len(summaries) > 1:
        return ""
    last = summaries[-1]
    steps = sum(s.steps_done for s in summaries)
    planned = sum(s.steps_planned or 0 for s in summaries)
    tokens = sum(s.tokens_total or 0 for s in summaries)
    seconds = [s.elapsed_s for s in summaries if s.elapsed_s is not None]
    fills = [s.fill for s in summaries if s.fill is not None]
    of_last = f" in {esc(last.label)}" if len(summaries) > 1 else ""
    tiles = [
        (
            esc(STATE_WORDS.get(last.state, last.state)),
            f"state{f' of {esc(last.label)}' if len(summaries) > 1 else ''}",
        ),
        (f"{steps:,}", f"of {planned:,} steps" if planned else "steps"),
        (large(last.tokens_per_s), f"tokens/s{of_last}"),
        (percent(min(fills), 2) if fills else "–", "least mean packing fill" if len(summaries) > 1 else "packing fill"),
        (large(float(tokens)), "tokens trained on"),
        (duration(sum(seconds)) if seconds else "–", "in training steps"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in tiles)
        + "</div>"
    )


def _reading_notes(runs: Sequence[RunData]) -> str:
    notes = []
    for run in runs:
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        for key in ("config", "status"):
            if key in run.missing:
                notes.append(prefix + run.missing[key])
        for name, number in run.unreadable_lines.items():
            notes.append(
                f"{prefix}{number} line{'s' if number > 1 else ''} of {name} could not be read (a run that is killed leaves half a line)."
            )
        if run.repeated_steps:
            notes.append(
                f"{prefix}{run.repeated_steps} steps were lost to an interruption and trained again; the curves show the second time."
            )
    return "".join(f'<p class="note">{esc(note)}</p>' for note in notes)


def _curves(group: PanelGroup, columns: int, pictures: Sequence[Image]) -> str:
    figures = "".join(
        f"<figure>{_picture(panel, picture)}</figure>" for panel, picture in zip(group.panels, pictures, strict=True)
    )
    wide = " c3" if columns > 2 else ""
    return (
        f'<p class="note">{esc(group.note)} Also as <code>curves_{group.key}.png</code>.</p>'
        f'<div class="panels{wide}" style="--columns:{max(2, columns)}">{figures}</div>'
    )


def _picture(panel: Panel, light_picture: Image) -> str:
    light, dark = (_data_uri(curves.to_png(picture)) for picture in (light_picture, curves.draw_panel(panel, DARK)))
    width, height = light_picture.size
    return (
        f'<picture><source media="(prefers-color-scheme:dark)" srcset="{dark}">'
        f'<img src="{light}" width="{width}" height="{height}" alt="{esc(panel.describe())}"></picture>'
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _each(runs: Sequence[RunData], parts: Sequence[str]) -> str:
    """One part a run, headed by the run's name where there are several."""
    if len(runs) == 1:
        return parts[0]
    return "".join(f"<h3>{esc(run.label)}</h3>{part}" for run, part in zip(runs, parts, strict=True))


def _missing(text: str) -> str:
    return f'<p class="note">{esc(text)}</p>'


def _evaluation(runs: Sequence[RunData]) -> tuple[str, str, str]:
    shown = [run for run in runs if run.evaluation] or list(runs[-1:])
    parts = []
    for run in shown:
        note = _missing(run.missing["evaluation"]) if "evaluation" in run.missing else ""
        parts.append((f'<div class="card">{evaluation_table(run.evaluation)}</div>' if run.evaluation else "") + note)
    return "evaluation", "Evaluation", _each(shown, parts)


def _pictures(runs: Sequence[RunData]) -> tuple[str, str, str]:
    shown = [run for run in runs if run.samples] or list(runs[-1:])
    parts = []
    for run in shown:
        figures = "".join(_sample(image) for image in run.samples)
        left_out = _missing("Left out: " + ", ".join(run.samples_left_out)) if run.samples_left_out else ""
        parts.append(
            (f'<div class="pictures">{figures}</div>' if figures else _missing(run.missing["samples"])) + left_out
        )
    return "samples", "Samples", _each(shown, parts)


def _sample(image: SampleImage) -> str:
    tiny = ' class="tiny"' if image.width <= 192 else ""
    text = f"<span>{esc(image.text)}</span>" if image.text else ""
    return (
        f'<figure><img{tiny} src="{_data_uri(image.png)}" width="{image.width}" height="{image.height}" alt="{esc(image.title)}">'
        f"<figcaption><b>{esc(image.title)}</b>{text}</figcaption></figure>"
    )


def _events(runs: Sequence[RunData]) -> tuple[str, str, str]:
    parts = [
        f'<div class="card">{events_table(run)}</div>'
        if run.events
        else _missing(run.missing.get("events", "events.jsonl is empty."))
        for run in runs
    ]
    return "events", "Events", _each(runs, parts)


def _ledger(runs: Sequence[RunData]) -> tuple[str, str, str]:
    parts = []
    for run in runs:
        if run.ledger.total:
            parts.append(f'<div class="card">{ledger_tables(run)}</div>')
        else:
            parts.append(_missing(run.missing.get("ledger", "No sample was skipped.")))
    return "ledger", "Bad samples", _each(runs, parts)


def _config(runs: Sequence[RunData]) -> tuple[str, str, str]:
    parts = [
        f"<details><summary>config.yaml, as resolved</summary><pre>{esc(run.config_text)}</pre></details>"
        if run.config_text
        else _missing(run.missing["config"])
        for run in runs
    ]
    return "config", "Configuration", _each(runs, parts)
