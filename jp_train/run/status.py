"""One screen about a run, running or not: `status` reads the run folder, `format_status` writes the screen.

Only status.json and the ends of metrics.jsonl and events.jsonl are read, so that it costs the same after ten steps and
after ten days.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from jp_train.errors import DataError
from jp_train.files import read_json_lines
from jp_train.run.reading import checkpoint_names
from jp_train.run.summary import KIND_NAMES, as_int, parse_time, planned_steps, run_state
from jp_train.terminal import duration

TAIL_BYTES = 512 * 1024
RECENT_STEPS = 100
"""Losses, step time and data wait are taken from at most so many of the last steps."""
STALE_FACTOR = 3.0
STALE_FLOOR_S = 15.0
"""A heartbeat is late after STALE_FACTOR times the slowest recent step, but never before this: saves and validations
take their time too."""
SHOWN_EVENTS = 6


def status(run_dir: Path, *, now: float | None = None) -> dict[str, Any]:
    """What a person on call asks first, as JSON-able values (seconds, tokens a second, shares from 0 to 1; None:
    unknown).

    Keys: run_dir, stage, state (starting | running | stale | finished | stopped_early | stopped_by_signal | stopped |
    failed | unknown), reason, step, planned_steps, share_done, losses {total and each kind: mean of the recent steps},
    held_out {name: newest}, tokens_per_s, step_s, eta_s, data_wait_share, fill, heartbeat_age_s, stale_after_s,
    slowest_rank {rank, step, phase, idle_s, age_s} or None, checkpoint {step, age_s, name} or None, checkpoints,
    failed_saves, skipped_documents, skipped_steps, world_size, events (the last ones, oldest first).

    `now`: seconds since 1970, for tests. Raises DataError when `run_dir` is no run folder.
    """
    run_dir = Path(run_dir)
    now = time.time() if now is None else now
    metrics, events = run_dir / "metrics.jsonl", run_dir / "events.jsonl"
    told = _read_object(run_dir / "status.json")
    if not run_dir.is_dir() or not (told or metrics.is_file() or events.is_file()):
        raise DataError(
            f"{run_dir} is not a run folder: expected status.json or metrics.jsonl in it. Name the `run_dir` of a training that was started"
        )
    recent = _recent_steps(metrics)
    timeline = _tail(events)
    trained = [record for record in recent if "loss/total" in record]
    step_times = _values(trained, "time/step_s")
    step = max((as_int(record["step"]) or 0 for record in (*recent[-1:], {"step": told.get("step")})), default=0)
    planned = as_int(told.get("planned_steps")) or planned_steps(_read_config(run_dir / "config.yaml"))
    step_s = median(step_times) if step_times else _float(told.get("step_s"))
    state, reason = run_state(told, tuple(timeline))
    age = _heartbeat_age((run_dir / "status.json", metrics), now)
    stale_after = max(STALE_FLOOR_S, STALE_FACTOR * max(step_times)) if step_times else None
    if state == "running" and age is not None and stale_after is not None and age > stale_after:
        state, reason = "stale", f"no sign of life for {duration(age)}; a step takes {duration(step_s)}"
    running = state in ("running", "starting", "stale")
    waited, worked = sum(_values(trained, "time/data_wait_s")), sum(step_times)
    return {
        "run_dir": str(run_dir),
        "stage": told.get("stage"),
        "state": state,
        "reason": reason,
        "step": step,
        "planned_steps": planned,
        "share_done": min(1.0, step / planned) if planned else None,
        "losses": {
            name: _mean(_values(trained, f"loss/{name}"))
            for name in ("total", *KIND_NAMES)
            if _values(trained, f"loss/{name}")
        },
        "held_out": _newest_held_out(recent),
        "tokens_per_s": median(_values(trained, "perf/tokens_per_s") or [_float(told.get("tokens_per_s")) or 0.0])
        or None,
        "step_s": step_s,
        "eta_s": _eta(told, planned, step, step_s) if running else None,
        "data_wait_share": waited / worked if worked > 0 else None,
        "fill": _mean(_values(trained, "packing/fill")),
        "heartbeat_age_s": age,
        "stale_after_s": stale_after,
        "slowest_rank": _slowest_rank(run_dir / "heartbeats", now) if running else None,
        "checkpoint": _last_checkpoint(run_dir, told, now),
        "checkpoints": len(checkpoint_names(run_dir)),
        "failed_saves": as_int(told.get("failed_saves")) or 0,
        "skipped_documents": _skipped(run_dir, told),
        "skipped_steps": as_int(told.get("skipped_steps")),
        "world_size": as_int(told.get("dp_world_size")),
        "events": timeline[-SHOWN_EVENTS:],
    }


def format_status(found: dict[str, Any]) -> str:
    """The screen: at most 80 columns but for long reasons, aligned, nothing that needs colour."""
    planned = found["planned_steps"]
    done = (
        f"{found['step']:,} of {planned:,} ({100 * found['share_done']:.1f}%)  {_bar(found['share_done'])}"
        if planned
        else f"{found['step']:,}"
    )
    ranks = f", {found['world_size']} ranks" if found["world_size"] else ""
    lines = [
        f"{found['run_dir']}  ({found['stage']}{ranks})" if found["stage"] else found["run_dir"],
        _row("state", found["state"].replace("_", " ") + (f": {found['reason']}" if found["reason"] else "")),
        _row("step", done),
        _row("loss", "  ".join(f"{name} {value:.4f}" for name, value in found["losses"].items()) or "-"),
    ]
    if found["held_out"]:
        lines.append(_row("held out", "  ".join(f"{name} {value:.4f}" for name, value in found["held_out"].items())))
    wait = "-" if found["data_wait_share"] is None else f"{100 * found['data_wait_share']:.1f}%"
    speed = (
        "-"
        if found["tokens_per_s"] is None
        else f"{found['tokens_per_s']:,.0f} tokens/s, {duration(found['step_s'])} a step, {wait} of it waiting for data"
    )
    lines.append(_row("speed", speed))
    if found["fill"] is not None:
        lines.append(_row("fill", f"{100 * found['fill']:.2f}%"))
    if found["state"] in ("running", "starting", "stale"):
        lines.append(_row("ETA", duration(found["eta_s"])))
        lines.append(
            _row("heartbeat", f"{duration(found['heartbeat_age_s'])} ago" + _told_slowest(found["slowest_rank"]))
        )
    checkpoint = found["checkpoint"]
    kept = f", {found['checkpoints']} on disk" if found["checkpoints"] else ""
    failed = f"; {found['failed_saves']} saves FAILED" if found["failed_saves"] else ""
    lines.append(
        _row(
            "checkpoint",
            f"step {checkpoint['step']:,}, {duration(checkpoint['age_s'])} ago{kept}{failed}"
            if checkpoint
            else f"none yet{failed}",
        )
    )
    skips = "unknown" if found["skipped_documents"] is None else f"{found['skipped_documents']:,} samples"
    lines.append(_row("skipped", skips + (f", {found['skipped_steps']} steps" if found["skipped_steps"] else "")))
    for event in found["events"]:
        when = parse_time(event.get("time"))
        detail = ", ".join(
            f"{key} {value}"
            for key, value in event.items()
            if key not in ("time", "event", "step") and value not in ("", None)
        )
        lines.append(_row("events" if event is found["events"][0] else "", f"{when:%m-%d %H:%M:%S}  " * bool(when) + f"step {event.get('step', '?')}  {event['event']}"
                          + (f"  {detail[:90]}" if detail else "")))  # fmt: skip
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"  {name:<11}{text}"


def _bar(share: float, width: int = 24) -> str:
    full = int(share * width)
    return "[" + "#" * full + "." * (width - full) + "]"


def _tail(path: Path) -> list[dict[str, Any]]:
    """The objects of the file's last TAIL_BYTES; the line that the cut goes through, and torn lines, are left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, 2) - TAIL_BYTES)
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    records = [record for record in read_json_lines(lines[1:] if start else lines) if record is not None]
    return [record for record in records if "event" in record or "step" in record]


def _recent_steps(path: Path) -> list[dict[str, Any]]:
    """The last RECENT_STEPS lines, without those that a resumed run has since trained again."""
    kept: list[dict[str, Any]] = []
    for record in _tail(path):
        step = as_int(record.get("step"))
        if step is None:
            continue
        while kept and kept[-1]["step"] >= step:
            kept.pop()
        kept.append(record)
    return kept[-RECENT_STEPS:]


def _newest_held_out(recent: list[dict[str, Any]]) -> dict[str, float]:
    for record in reversed(recent):
        found = {
            key.removeprefix("val/"): float(value)
            for key, value in record.items()
            if key.startswith("val/") and _float(value) is not None
        }
        if found:
            return found
    return {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _values(records: list[dict[str, Any]], key: str) -> list[float]:
    return [value for value in (_float(record.get(key)) for record in records) if value is not None]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _eta(told: dict[str, Any], planned: int | None, step: int, step_s: float | None) -> float | None:
    """The trainer's own estimate counts saves and validations; without it, steps left times the median step."""
    own = _float(told.get("eta_s"))
    if own is not None:
        return own
    return (planned - step) * step_s if planned and step_s is not None else None


def _slowest_rank(folder: Path, now: float) -> dict[str, Any] | None:
    """Of all ranks' heartbeats (`engine/watch/heartbeat.py`) the one that has gone longest without progress, None
    without heartbeats."""
    found: list[dict[str, Any]] = []
    for path in folder.glob("rank_*.json"):
        beat = _read_object(path)
        idle, written = _float(beat.get("idle_s")), _float(beat.get("time"))
        if idle is not None and written is not None and not beat.get("ended"):
            age = max(0.0, now - written)
            found.append(
                {
                    "rank": beat.get("rank"),
                    "step": beat.get("step"),
                    "phase": beat.get("phase"),
                    "idle_s": idle + age,
                    "age_s": age,
                }
            )
    return max(found, key=lambda beat: beat["idle_s"], default=None)


def _told_slowest(slowest: dict[str, Any] | None) -> str:
    if slowest is None:
        return ""
    return f"; slowest: rank {slowest['rank']}, {duration(slowest['idle_s'])} without progress ({slowest['phase']})"


def _heartbeat_age(paths: tuple[Path, ...], now: float) -> float | None:
    times = [path.stat().st_mtime for path in paths if path.is_file()]
    return max(0.0, now - max(times)) if times else None


def _last_checkpoint(run_dir: Path, told: dict[str, Any], now: float) -> dict[str, Any] | None:
    names = checkpoint_names(run_dir)
    if names:
        written = (run_dir / "checkpoints" / names[-1]).stat().st_mtime
        return {"step": int(names[-1].removeprefix("step_")), "age_s": max(0.0, now - written), "name": names[-1]}
    saved = told.get("checkpoint")  # the folder may lie on a disk of the training hosts
    if not isinstance(saved, dict) or as_int(saved.get("step")) is None:
        return None
    when = parse_time(saved.get("time"))
    return {"step": saved["step"], "age_s": max(0.0, now - when.timestamp()) if when else None, "name": None}


def _skipped(run_dir: Path, told: dict[str, Any]) -> int | None:
    known = as_int(told.get("skipped_documents"))
    if known is not None:
        return known
    ledger = run_dir / "ledger.jsonl"
    if not ledger.is_file():
        return None
    with ledger.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
