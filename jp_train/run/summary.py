"""Derives the figures of the summary table from what `reading.py` read: plain numbers, no drawing, no HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np

from jp_train.run.reading import RunData, Series

KIND_NAMES = ("understanding", "text", "generation")
"""In the ratio order of the paper. Spelled here so that a report needs no torch (types.py imports it)."""
SUMMARY_SHARE = 0.05
"""The first and last loss of the table are means over this share of the steps ..."""
SUMMARY_MAX_STEPS = 50
"""... and over at most this many."""

ENDINGS = ("stop", "stopped_early", "failed")
"""Events that end a run."""
STATE_WORDS = {
    "stopped_early": "stopped early",
    "stopped": "stopped before its last step",
    "stopped_by_signal": "stopped by a signal, saved",
    "running": "running, or killed while running",
    "unknown": "unknown (no status.json)",
}
"""States that are not words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossChange:
    """Loss per supervised token (nats): mean of the first and last `over` training steps; held-out loss before and
    after. None: not measured."""

    name: str
    first: float | None
    last: float | None
    held_out_first: float | None
    held_out_last: float | None
    over: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareOfKind:
    """Shares of a kind in the recipe's unit, 0 to 1: `configured` and the mean over all steps `realised`."""

    name: str
    configured: float | None
    realised: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One column of the table. Seconds, tokens a second, GiB; shares from 0 to 1; None: unknown."""

    label: str
    stage: str
    model: str
    state: str
    reason: str
    steps_done: int
    steps_planned: int | None
    schedule_steps: int | None
    losses: tuple[LossChange, ...]
    shares: tuple[ShareOfKind, ...]
    ratio_unit: str
    fill: float | None
    truncated_tokens: int | None
    tokens_total: int | None
    tokens_per_s: float | None
    step_s: float | None
    data_wait_share: float | None
    mfu: float | None
    peak_gib: float | None
    skipped: int | None
    non_finite_steps: int
    resumes: int
    failures: int
    spikes: int
    world_size: int | None
    checkpoints: tuple[str, ...]
    trainable: tuple[str, ...]
    elapsed_s: float | None

    @property
    def state_words(self) -> str:
        """The state in words."""
        return STATE_WORDS.get(self.state, self.state)


def summarize(run: RunData) -> Summary:
    """The summary of one run folder; never fails on what a run does not have."""
    state, reason = run_state(run.status, run.events)
    return Summary(
        label=run.label,
        stage=str(run.configured("stage.name", "?")),
        model=str(run.configured("preset") or run.configured("model.name", "?")),
        state=state,
        reason=reason,
        steps_done=steps_done(run),
        steps_planned=planned_steps(run.config),
        schedule_steps=as_int(run.configured("stage.training_steps")),
        losses=tuple(c for c in (_loss_change(run, name) for name in ("total", *KIND_NAMES)) if c is not None),
        shares=tuple(
            ShareOfKind(name=kind, configured=share, realised=realised)
            for kind, share, realised in zip(KIND_NAMES, configured_shares(run), realised_shares(run), strict=True)
        ),
        ratio_unit=str(run.configured("stage.ratio_unit", "samples")),
        fill=_mean(run.series.get("packing/fill")),
        truncated_tokens=_total(run.series.get("packing/truncated_tokens")),
        tokens_total=_total(run.series.get("tokens/total")),
        tokens_per_s=_median(run, "perf/tokens_per_s"),
        step_s=_median(run, "time/step_s"),
        data_wait_share=_wait_share(run),
        mfu=_median(run, "perf/mfu"),
        peak_gib=_maximum(run.series.get("memory/peak_gib")),
        skipped=run.ledger.total or _total(run.series.get("data/skipped")),
        non_finite_steps=int(np.isnan(run.series["loss/total"].values).sum()) if "loss/total" in run.series else 0,
        resumes=sum(event["event"] == "resume" for event in run.events),
        failures=len(failures(run.events)),
        spikes=sum(event["event"] == "spike" for event in run.events),
        world_size=world_size(run.status, run.events),
        checkpoints=run.checkpoints,
        trainable=tuple(map(str, run.configured("stage.trainable", ()))),
        elapsed_s=_elapsed(run),
    )


def planned_steps(config: dict[str, Any]) -> int | None:
    """Steps the run will train: `early_stop.at_step` where it is set and smaller than `training_steps`."""
    stage = config.get("stage")
    if not isinstance(stage, dict):
        return None
    total = as_int(stage.get("training_steps"))
    early = stage.get("early_stop")
    at_step = as_int(early.get("at_step")) if isinstance(early, dict) else None
    return min((n for n in (total, at_step) if n is not None), default=None)


def run_state(status: dict[str, Any], events: tuple[dict[str, Any], ...]) -> tuple[str, str]:
    """What became of the run, and why: status.json first, else its last stop event. A run that was killed still
    says `running` there."""
    ends = [event for event in events if event.get("event") in (*ENDINGS, "start", "resume")]
    last_end = ends[-1] if ends and ends[-1]["event"] in ENDINGS else {}
    early = [event for event in ends if event["event"] == "stopped_early"] if last_end else []
    reason = str(status.get("reason") or (early[-1] if early else last_end).get("reason") or "")
    state = str(status.get("state") or "")
    if not state and last_end:
        state = (
            "stopped_early"
            if early
            else str(last_end.get("state") or ("failed" if last_end["event"] == "failed" else "stopped"))
        )
    return {"done": "finished", "": "unknown"}.get(state, state), reason


def world_size(status: dict[str, Any], events: tuple[dict[str, Any], ...]) -> int | None:
    """Ranks of the run's last start."""
    for record in (status, *reversed(events)):
        for key in ("dp_world_size", "world_size"):
            if as_int(record.get(key)) is not None:
                return as_int(record[key])
    return None


def steps_done(run: RunData) -> int:
    """Optimizer steps taken: `step` of a metrics line counts completed steps; status.json may know of more."""
    return max(run.last_step, as_int(run.status.get("step")) or 0)


def configured_shares(run: RunData) -> tuple[float | None, float | None, float | None]:
    """The recipe's mixture as shares that add up to 1, in KIND_NAMES order."""
    parts = [run.configured(f"stage.mixture.{kind}") for kind in KIND_NAMES]
    numbers = [float(p) for p in parts if isinstance(p, (int, float)) and not isinstance(p, bool)]
    if len(numbers) != len(KIND_NAMES) or sum(numbers) <= 0:
        return (None, None, None)
    understanding, text, generation = (number / sum(numbers) for number in numbers)
    return understanding, text, generation


def realised_shares(run: RunData) -> tuple[float | None, ...]:
    """Mean share of every kind over the steps. They add up to 1: a step in which no document starts (a long text
    fills it) says nothing about the ratio."""
    means = [_mean(run.series.get(f"mixture/{kind}")) for kind in KIND_NAMES]
    total = sum(mean for mean in means if mean is not None)
    return tuple(mean if mean is None or not total else mean / total for mean in means)


def held_out(run: RunData, name: str) -> Series | None:
    """The held-out loss of a kind or of `total` over steps: `val/loss/NAME` or `val/NAME`; else the mean over the
    kind's held-out sources."""
    for key in (f"val/loss/{name}", f"val/{name}"):
        if key in run.series:
            return run.series[key].finite()
    sources = run.configured("validation.sources", {})
    members = []
    for source, settings in sources.items() if isinstance(sources, dict) else ():
        if isinstance(settings, dict) and (name == "total" or settings.get("kind") == name):
            members += [
                run.series[key]
                for key in (f"val/loss/source/{source}", f"val/source/{source}", f"val/{source}")
                if key in run.series
            ][:1]
    if not members:
        return None
    steps = np.unique(np.concatenate([m.steps for m in members]))
    table = np.full((len(members), steps.shape[0]), np.nan)
    for row, member in enumerate(members):
        table[row, np.searchsorted(steps, member.steps)] = member.values
    complete = np.isfinite(table).all(axis=0)
    return Series(steps=steps[complete], values=table[:, complete].mean(axis=0)) if complete.any() else None


def settled(run: RunData, key: str) -> Series | None:
    """A metric without the first step after a start or a resume, which compiles, allocates and waits for the first
    data; the whole series where nothing else is left."""
    series = run.series.get(key)
    if series is None or not len(series):
        return series
    first = {int(series.steps[0])}
    first |= {
        step + 1
        for event in run.events
        if event["event"] == "resume" and (step := as_int(event.get("step"))) is not None
    }
    keep = ~np.isin(series.steps, list(first))
    return Series(steps=series.steps[keep], values=series.values[keep]) if keep.any() else series


def failures(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps at which attempts that had trained died: of the event `failed`, or, where an attempt was killed before it
    could write one, the step that the next one resumed after. A start that was refused is no failure."""
    steps = []
    running = False
    for event in events:
        step = as_int(event.get("step")) or 0
        if event["event"] in ("start", "resume"):
            if running:
                steps.append(step)
            running = True
        elif event["event"] in ENDINGS and (step or event["event"] != "failed"):
            if event["event"] == "failed":
                steps.append(step)
            running = False
    return steps


CHAT_TEMPLATE = "stage3"
"""The `stage.template` that wraps questions and prompts in a conversation (data/layouts.py)."""


def template_change(before: object, after: object, name: str) -> str:
    """A sentence where two values of `stage.template` ask in so different a form that held-out losses cannot be
    compared; empty otherwise. `name`: the model or stage that asked as `before`."""
    if not before or before == after or CHAT_TEMPLATE not in (before, after):
        return ""
    return (
        f"stage.template {before} -> {after}: questions are asked in another form than in {name}, so the first "
        "held-out losses are not comparable with its last ones"
    )


def template_changes(runs: Sequence[RunData]) -> dict[str, str]:
    """For stages that follow each other, {label: sentence} where `template_change` has one."""
    sentences = {
        run.label: template_change(before.configured("stage.template"), run.configured("stage.template"), before.label)
        for before, run in pairwise(runs)
    }
    return {label: f"{label}: {sentence}." for label, sentence in sentences.items() if sentence}


def smooth(series: Series, window: int) -> Series:
    """Exponential moving average with a memory of `window` points, corrected for its start; non-finite points are
    left out."""
    points = series.finite()
    if window <= 1 or len(points) < 3:
        return points
    decay = 1.0 - 1.0 / window
    out = np.empty_like(points.values)
    total = weight = 0.0
    for i, value in enumerate(points.values.tolist()):
        total = decay * total + value
        weight = decay * weight + 1.0
        out[i] = total / weight
    return Series(steps=points.steps, values=out)


def as_int(value: Any) -> int | None:
    """`value` if it is a whole number, else None (a bool is no number)."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value != int(value)
    ):
        return None
    return int(value)


def parse_time(value: Any) -> datetime | None:
    """A time of events.jsonl or status.json: seconds since 1970, or ISO 8601 (without a zone: local time). In local
    time."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return datetime.fromtimestamp(value).astimezone()
        return datetime.fromisoformat(str(value).replace("Z", "+00:00")).astimezone()
    except (ValueError, OverflowError, OSError):
        return None


def _loss_change(run: RunData, name: str) -> LossChange | None:
    series = run.series.get(f"loss/{name}")
    points = series.finite().values if series is not None else np.empty(0)
    measured = held_out(run, name)
    measured = measured if measured is not None and len(measured) else None
    if not len(points) and measured is None:
        return None
    count = max(1, min(SUMMARY_MAX_STEPS, round(len(points) * SUMMARY_SHARE)))
    return LossChange(
        name=name,
        first=float(points[:count].mean()) if len(points) else None,
        last=float(points[-count:].mean()) if len(points) else None,
        held_out_first=float(measured.values[0]) if measured is not None and len(measured) > 1 else None,
        held_out_last=float(measured.values[-1]) if measured is not None else None,
        over=count,
    )


def _mean(series: Series | None) -> float | None:
    values = series.finite().values if series is not None else ()
    return float(np.mean(values)) if len(values) else None


def _maximum(series: Series | None) -> float | None:
    values = series.finite().values if series is not None else ()
    return float(np.max(values)) if len(values) else None


def _total(series: Series | None) -> int | None:
    values = series.finite().values if series is not None else ()
    return round(float(np.sum(values))) if len(values) else None


def _median(run: RunData, key: str) -> float | None:
    series = settled(run, key)
    values = series.finite().values if series is not None else ()
    return float(np.median(values)) if len(values) else None


def _wait_share(run: RunData) -> float | None:
    step, wait = settled(run, "time/step_s"), settled(run, "time/data_wait_s")
    total = float(np.nansum(step.values)) if step is not None else 0.0
    return float(np.nansum(wait.values)) / total if wait is not None and total > 0 else None


def _elapsed(run: RunData) -> float | None:
    step = run.series.get("time/step_s")
    return float(np.nansum(step.values)) if step is not None else None
