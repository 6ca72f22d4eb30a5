"""The short text a smoke run ends with: losses, ratio, fill and speed of every stage, scores beside chance, where to
look."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from examples.smoke.targets import SPREADS
from jp_train.run.reading import read_run
from jp_train.run.summary import LossChange, Summary, summarize, template_changes

COLUMNS = 100
MISS = """below target: every step ran to its end (else the exit status would not be 0), but the model
learned less than in about 19 of 20 runs. Run once more with SMOKE_ARGS="--seed 1"; a second miss
points at a fault in data or training: look at the held-out losses above and at the report's curves."""
"""A miss is not an error: the exit status stays 0."""


def format_summary(out: Path, *, seconds: float) -> str:
    """The summary of the smoke run in `out`; `seconds` is what this call of it took. Raises DataError for a stage
    without metrics."""
    lines = ["", f"smoke run in {out}: {seconds / 60:.1f} minutes"]
    runs = [read_run(folder) for folder in sorted(out.glob("stage[0-9]"))]
    changes = template_changes(runs)
    for run in runs:
        lines += _stage(summarize(run))
        if run.label in changes:
            lines += textwrap.wrap(changes[run.label], COLUMNS, initial_indent="  ", subsequent_indent="  ")
    evaluation = out / "stage3" / "evaluation.json"
    if evaluation.exists():
        rows = json.loads(evaluation.read_text())
        lines += ["", f"{'after stage 3':<44}{'score':>7}{'chance':>8}{'ceiling':>9}{'target':>8}"]
        lines += [_score(row).rstrip() for row in rows]
        lines += ["ceiling: what the judge says of true images; it errs, so a score can lie above it"]
        lines += [f"scores vary between seeds and machines: {', '.join(f'{n} ±{s:.2f}' for n, s in SPREADS.items())}"]
        if any(row.get("target") is not None and row["value"] < row["target"] for row in rows):
            lines += [MISS]
    lines += [
        "",
        f"curves, images, tables     {out / 'report.html'}",
        f"generated images           {out / 'stage3' / 'samples'}",
        f"weights (transformers)     {out / 'stage3' / 'export'}",
        f"wandb, offline             {out / 'stage3' / 'wandb'}",
    ]
    return "\n".join(lines)


def _stage(summary: Summary) -> list[str]:
    stopped = f", {summary.reason}" if summary.state == "stopped_early" else ""
    speed = f"{summary.tokens_per_s:,.0f} tokens/s" if summary.tokens_per_s else "speed not measured"
    fill = f"{summary.fill:.1%} full" if summary.fill is not None else "fill not measured"
    shares = " : ".join("–" if share.realised is None else f"{share.realised:.3f}" for share in summary.shares)
    configured = " : ".join("–" if share.configured is None else f"{share.configured:.3f}" for share in summary.shares)
    lines = [
        "",
        f"{summary.label}: {summary.steps_done} steps{stopped}",
        f"  {summary.world_size} ranks, {speed}, rows {fill}, {summary.skipped or 0} samples skipped",
        f"  und : text : gen   configured {configured}   realised {shares}",
    ]
    return lines + [_loss(change) for change in summary.losses if change.name != "total"]


def _loss(change: LossChange) -> str:
    def arrow(first: float | None, last: float | None) -> str:
        return "not measured" if first is None or last is None else f"{first:.3f} -> {last:.3f}"

    held_out = arrow(change.held_out_first, change.held_out_last)
    return f"  {change.name:<14} held-out loss {held_out}   training {arrow(change.first, change.last)}"


def _score(row: dict[str, Any]) -> str:
    def cell(name: str, width: int) -> str:
        value = row.get(name)
        return f"{'' if value is None else f'{value:.3f}':>{width}}"

    target = row.get("target")
    verdict = "" if target is None else ("  met" if row["value"] >= target else "  below target")
    return (
        f"{row['name'][:43]:<44}{cell('value', 7)}{cell('chance', 8)}{cell('ceiling', 9)}{cell('target', 8)}{verdict}"
    )
