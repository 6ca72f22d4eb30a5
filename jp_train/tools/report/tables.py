"""The page's tables as HTML: summary, events, bad samples, evaluation. Every text from a file goes through `esc`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from jp_train.run.reading import LEDGER_ROWS, EvaluationRow, RunData
from jp_train.run.summary import LossChange, ShareOfKind, Summary, parse_time
from jp_train.terminal import duration

MAX_EVENTS = 200
OPEN_EVENTS = 24
"""A longer timeline is folded."""
STATE_WORDS = {
    "finished": "finished",
    "stopped_early": "stopped early",
    "stopped": "stopped before its last step",
    "stopped_by_signal": "stopped by a signal, saved",
    "starting": "starting",
    "failed": "failed",
    "running": "running, or killed while running",
    "unknown": "unknown (no status.json)",
}
NONE = '<span class="none">–</span>'


def esc(value: Any) -> str:
    """`value` as text that is safe in HTML, also inside a quoted attribute."""
    return html.escape(str(value), quote=True)


def count(value: int | None) -> str:
    """1234567 -> 1,234,567."""
    return NONE if value is None else f"{value:,}"


def large(value: float | None) -> str:
    """12345678 -> 12.3 M, for quantities whose last digits nobody reads."""
    if value is None:
        return NONE
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.1234 -> 12.3%."""
    return NONE if value is None else f"{100 * value:.{digits}f}%"


def summary_table(summaries: Sequence[Summary]) -> str:
    """One column a run or stage, one line a figure."""
    loss_names = [
        n
        for n in ("understanding", "text", "generation", "total")
        if any(c.name == n for s in summaries for c in s.losses)
    ]
    rows: list[tuple[str, list[str]]] = [
        ("State", [_state(s) for s in summaries]),
        ("Stage, model", [f"{esc(s.stage)}<small>{esc(s.model)}</small>" for s in summaries]),
        ("Steps", [_steps(s) for s in summaries]),
    ]
    for name in loss_names:
        rows.append((f"Loss, {esc(name)}", [_loss(s, name) for s in summaries]))
    rows += [
        ("Mixture", [_mixture(s) for s in summaries]),
        ("Packing fill", [f"{percent(s.fill, 2)}{_truncated(s)}" for s in summaries]),
        ("Throughput", [_throughput(s) for s in summaries]),
        ("Data wait", [f"{percent(s.data_wait_share)}<small>of the time of all steps</small>" for s in summaries]),
        ("Time in steps", [duration(s.elapsed_s) for s in summaries]),
        ("Ranks", [f"{count(s.world_size)}{_peak(s)}" for s in summaries]),
        ("Skipped samples", [count(s.skipped) for s in summaries]),
        ("Incidents", [_incidents(s) for s in summaries]),
        ("Checkpoints", [_checkpoints(s) for s in summaries]),
        (
            "Trained modules",
            [f'<span class="modules">{esc(", ".join(s.trainable))}</span>' if s.trainable else NONE for s in summaries],
        ),
    ]
    head = "".join(f'<th scope="col">{esc(s.label)}</th>' for s in summaries)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for name, cells in rows
    )
    return f'<div class="scroll"><table class="summary"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _state(summary: Summary) -> str:
    word = STATE_WORDS.get(summary.state, summary.state)
    reason = f"<small>{esc(summary.reason)}</small>" if summary.reason else ""
    return f'<span class="state {"good" if summary.state in ("finished", "stopped_early") else "open"}">{esc(word)}</span>{reason}'


def _steps(summary: Summary) -> str:
    planned = f" of {count(summary.steps_planned)}" if summary.steps_planned is not None else ""
    schedule = ""
    if summary.schedule_steps is not None and summary.schedule_steps != summary.steps_planned:
        schedule = f"<small>schedule of {count(summary.schedule_steps)}</small>"
    return f"<b>{count(summary.steps_done)}</b>{planned}{schedule}"


def _loss(summary: Summary, name: str) -> str:
    change = next((c for c in summary.losses if c.name == name), None)
    if change is None:
        return NONE
    return f"{_arrow(change.first, change.last)}<small>held-out {_held_out(change)}</small>"


def _held_out(change: LossChange) -> str:
    if change.held_out_last is None:
        return "not measured"
    if change.held_out_first is None:
        return f"{change.held_out_last:.3f} (measured once)"
    return _arrow(change.held_out_first, change.held_out_last)


def _arrow(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return NONE
    word = "falls" if last < first else "rises" if last > first else "flat"
    return f'<span class="{word}">{first:.3f} → <b>{last:.3f}</b></span>{" (rose)" if word == "rises" else ""}'


def _mixture(summary: Summary) -> str:
    lines = "".join(_share(share) for share in summary.shares if share.realised or share.configured)
    return f"{lines}<small>in {esc(summary.ratio_unit)}: realised, configured</small>" if lines else NONE


def _share(share: ShareOfKind) -> str:
    return f'<span class="pair"><i>{esc(share.name)}</i> <b>{percent(share.realised, 2)}</b> · {percent(share.configured, 2)}</span>'


def _truncated(summary: Summary) -> str:
    return (
        "" if summary.truncated_tokens is None else f"<small>{count(summary.truncated_tokens)} tokens truncated</small>"
    )


def _throughput(summary: Summary) -> str:
    mfu = f", MFU {percent(summary.mfu)}" if summary.mfu else ""
    step = f"{summary.step_s:.3g} s a step" if summary.step_s is not None else ""
    return f"<b>{large(summary.tokens_per_s)}</b> tokens/s<small>{step}{mfu}; {large(summary.tokens_total)} tokens in all</small>"


def _peak(summary: Summary) -> str:
    return "" if not summary.peak_gib else f"<small>{summary.peak_gib:.3g} GiB at most on a rank</small>"


def _incidents(summary: Summary) -> str:
    found = [
        f"{number} {word}"
        for number, word in (
            (summary.resumes, "resumed" if summary.resumes == 1 else "times resumed"),
            (summary.spikes, "spike" if summary.spikes == 1 else "spikes"),
            (summary.non_finite_steps, "non-finite steps"),
        )
        if number
    ]
    return esc(", ".join(found)) if found else "none"


def _checkpoints(summary: Summary) -> str:
    if not summary.checkpoints:
        return "none on disk"
    return f"{len(summary.checkpoints)}<small>newest {esc(summary.checkpoints[-1])}</small>"


def events_table(run: RunData) -> str:
    """The run's timeline; the middle of a very long one is left out, and says so."""
    events = list(run.events)
    omitted = max(0, len(events) - MAX_EVENTS)
    if omitted:
        half = MAX_EVENTS // 2
        events = [*events[:half], {"event": "…", "note": f"{omitted} events left out"}, *events[-half:]]
    rows = []
    for event in events:
        when = parse_time(event.get("time"))
        rest = ", ".join(
            f"{key} {_plain(value)}"
            for key, value in event.items()
            if key not in ("time", "event", "step") and value not in ("", None)
        )
        stamp = (
            f'<time datetime="{esc(when.isoformat())}">{when:%Y-%m-%d %H:%M:%S}</time>'
            if when
            else esc(event.get("time", ""))
        )
        name = str(event["event"])
        rows.append(
            f'<tr><td class="num">{esc(event.get("step", ""))}</td><td><span class="event e-{esc(_slug(name))}">{esc(name.replace("_", " "))}</span></td>'
            f'<td class="nowrap">{stamp}</td><td class="wrap">{esc(rest)}</td></tr>'
        )
    table = _table(("step", "event", "time", "detail"), rows, numeric=(0,))
    return (
        table if len(rows) <= OPEN_EVENTS else f"<details><summary>{len(run.events)} events</summary>{table}</details>"
    )


def ledger_tables(run: RunData) -> str:
    """Counts by source and reason, then the first bad samples."""
    ledger = run.ledger
    counts = _table(
        ("samples", "source", "reason"),
        [
            f'<tr><td class="num">{n:,}</td><td>{esc(source)}</td><td class="wrap">{esc(reason)}</td></tr>'
            for source, reason, n in ledger.counts
        ],
        numeric=(0,),
    )
    rows = [
        f'<tr><td class="num">{esc("index" if row.get("step") is None else row["step"])}</td>'
        + "".join(f'<td class="wrap">{esc(row.get(key, ""))}</td>' for key in ("source", "shard", "key", "reason"))
        + "</tr>"
        for row in ledger.rows
    ]
    head = f"first {LEDGER_ROWS} of {ledger.total:,}" if ledger.total > LEDGER_ROWS else f"all {ledger.total:,}"
    listing = _table(("step", "source", "shard", "key", "reason"), rows, numeric=(0,))
    return f"{counts}<details><summary>The samples ({head})</summary>{listing}</details>"


def evaluation_table(rows: Sequence[EvaluationRow]) -> str:
    """Figures with a bar from 0; chance, ceiling and target are ticks on it, and are also given in words."""
    lines = []
    for row in rows:
        known = [abs(v) for v in (row.value, row.chance, row.ceiling, row.target) if v is not None]
        unit_scale = all(
            0 <= v <= 1 for v in (row.value, *(v for v in (row.chance, row.ceiling, row.target) if v is not None))
        )
        scale = 1.0 if unit_scale else 1.05 * max(known) or 1.0
        ticks = "".join(
            f'<s class="{name}" style="left:{_place(value, scale)}%"></s>'
            for name, value in (("chance", row.chance), ("ceiling", row.ceiling), ("target", row.target))
            if value is not None
        )
        verdict = {
            None: "",
            True: '<span class="met">target met</span>',
            False: '<span class="missed">target missed</span>',
        }[row.met]
        sense = "at most" if row.lower_is_better else "at least"
        words = [
            text
            for text in (
                None if row.chance is None else f"chance {row.chance:.3g}",
                None if row.ceiling is None else f"ceiling {row.ceiling:.3g}",
                None if row.target is None else f"target {sense} {row.target:.3g}",
            )
            if text
        ]
        lines.append(
            f'<tr><th scope="row">{esc(row.name)}{f"<small>{esc(row.note)}</small>" if row.note else ""}</th>'
            f'<td class="num"><b>{row.value:.3g}</b></td>'
            f'<td class="bar"><div class="track"><div class="fill" style="width:{_place(row.value, scale)}%"></div>{ticks}</div>'
            f"<small>{esc(' · '.join(words))}</small></td><td>{verdict}</td></tr>"
        )
    key = '<p class="note">Bars start at 0. Ticks: <i class="k chance"></i>chance <i class="k ceiling"></i>ceiling <i class="k target"></i>target.</p>'
    return f'<div class="scroll"><table class="evaluation"><tbody>{"".join(lines)}</tbody></table></div>{key}'


def _place(value: float, scale: float) -> str:
    return f"{100 * min(max(value / scale, 0.0), 1.0):.2f}"


def _table(columns: Sequence[str], rows: Sequence[str], *, numeric: Sequence[int] = ()) -> str:
    head = "".join(
        f'<th scope="col"{" class=num" if i in numeric else ""}>{esc(name)}</th>' for i, name in enumerate(columns)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return str(value)


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)[:24]
