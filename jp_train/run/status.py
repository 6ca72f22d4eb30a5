"""One screen about a run, running or not: `status` reads the run folder, `format_status` writes the screen.

Only status.json and the ends of metrics.jsonl and events.jsonl are read, so that it costs the same after ten steps and
after ten days.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any

from jp_train.errors import DataError
from jp_train.files import file_system_time, json_object, read_json_lines
from jp_train.run.reading import checkpoint_names, read_config
from jp_train.run.summary import KIND_NAMES, as_int, parse_time, planned_steps, run_state
from jp_train.terminal import duration, filled, shortened

NAMES = ("total", *KIND_NAMES)
"""Losses of the run as a whole; others are named after their source."""
TAIL_BYTES = 512 * 1024
RECENT_STEPS = 100
"""Losses, step time and data wait are taken from at most so many of the last steps."""
STALE_FACTOR = 3.0
STALE_FLOOR_S = 15.0
"""A heartbeat is late after STALE_FACTOR times the slowest recent step, but never before this: saves and validations
take their time too."""
SHOWN_EVENTS = 6
COLUMNS, INDENT = 80, 13
"""Width of the screen, and where its values begin."""
REASON_CHARACTERS = 180
"""events.jsonl has the whole reason."""


def status(run_dir: Path, *, now: float | None = None) -> dict[str, Any]:
    """What a person on call asks first, as JSON-able values (seconds, tokens a second, shares from 0 to 1; None:
    unknown).

    Keys: run_dir, stage, state (starting | running | stale | finished | stopped_early | stopped_by_signal | stopped |
    failed | unknown), reason, step, planned_steps, share_done, losses {total and each kind: mean of the last
    loss_steps steps}, loss_steps,
    held_out {name: newest}, tokens_per_s, step_s, eta_s, data_wait_share, fill, heartbeat_age_s, stale_after_s,
    slowest_rank {rank, step, phase, idle_s, age_s} or None, checkpoint {step, age_s, name} or None, checkpoints,
    abandoned_checkpoints (of steps that the run went back from),
    failed_saves, skipped_documents, skipped_steps, world_size, events (the last ones, oldest first).

    Ages are counted by the clock of the file system, which all hosts share. `now`: seconds since 1970, for tests.
    Raises DataError when `run_dir` is no run folder.
    """
    run_dir = Path(run_dir)
    now = file_system_time(run_dir) if now is None else now
    metrics, events = run_dir / "metrics.jsonl", run_dir / "events.jsonl"
    written = _read_object(run_dir / "status.json")
    if not run_dir.is_dir() or not (written or metrics.is_file() or events.is_file()):
        below = sorted(str(path.parent) for path in run_dir.glob("*/status.json"))
        raise DataError(
            f"{run_dir} is not a run folder: expected status.json or metrics.jsonl in it. "
            + (f"Below it are {', '.join(below)}" if below else "Name the `run_dir` of a training that was started")
        )
    recent, timeline = _recent_steps(metrics), _tail(events)
    trained = [record for record in recent if "loss/total" in record]
    speed = _speed(trained, timeline, written)
    step = max((as_int(record["step"]) or 0 for record in (*recent[-1:], {"step": written.get("step")})), default=0)
    planned = as_int(written.get("planned_steps")) or planned_steps(read_config(run_dir / "config.yaml"))
    age = _heartbeat_age((run_dir / "status.json", metrics), now)
    step_times = _values(trained, "time/step_s")
    stale_after = max(STALE_FLOOR_S, STALE_FACTOR * max(step_times)) if step_times else None
    state, reason = run_state(written, tuple(timeline))
    if state == "running" and age is not None and stale_after is not None and age > stale_after:
        state, reason = "stale", f"no sign of life for {duration(age)}; a step takes {duration(speed['step_s'])}"
    running = state in ("running", "starting", "stale")
    return {
        "run_dir": str(run_dir),
        "stage": written.get("stage"),
        "state": state,
        "reason": reason,
        "step": step,
        "planned_steps": planned,
        "share_done": min(1.0, step / planned) if planned else None,
        "losses": {name: _mean(values) for name in NAMES if (values := _values(trained, f"loss/{name}"))},
        "loss_steps": len(trained),
        "held_out": _newest_held_out(recent),
        "tokens_per_s": speed["tokens_per_s"],
        "step_s": speed["step_s"],
        "eta_s": _eta(written, planned, step, speed["step_s"]) if running else None,
        "data_wait_share": speed["data_wait_share"],
        "fill": _mean(_values(trained, "packing/fill")),
        "heartbeat_age_s": age,
        "stale_after_s": stale_after,
        "slowest_rank": _slowest_rank(run_dir / "heartbeats", now) if running else None,
        "checkpoint": _last_checkpoint(run_dir, written, now),
        "checkpoints": len(checkpoint_names(run_dir)),
        "abandoned_checkpoints": len(list(run_dir.glob("abandoned/*/checkpoints/step_*"))),
        "failed_saves": as_int(written.get("failed_saves")) or 0,
        "skipped_documents": _skipped(run_dir, written),
        "skipped_steps": as_int(written.get("skipped_steps")),
        "world_size": as_int(written.get("dp_world_size")),
        "events": timeline[-SHOWN_EVENTS:],
    }


def _speed(
    trained: list[dict[str, Any]], timeline: list[dict[str, Any]], written: dict[str, Any]
) -> dict[str, float | None]:
    """`step_s`, `tokens_per_s` and `data_wait_share` of the recent steps. The first one after a start or a resume waits
    for the first data: it counts for no share where there are others."""
    step_times = _values(trained, "time/step_s")
    rates = _values(trained, "perf/tokens_per_s") or [_float(written.get("tokens_per_s")) or 0.0]
    starts = {as_int(event.get("step")) for event in timeline if event.get("event") in ("start", "resume")}
    settled = [record for record in trained if (as_int(record["step"]) or 0) - 1 not in starts] or trained
    worked = sum(_values(settled, "time/step_s"))
    return {
        "step_s": median(step_times) if step_times else _float(written.get("step_s")),
        "tokens_per_s": median(rates) or None,
        "data_wait_share": sum(_values(settled, "time/data_wait_s")) / worked if worked > 0 else None,
    }


def format_status(status: dict[str, Any]) -> str:
    """The screen: at most COLUMNS wide (a longer path excepted), aligned, nothing that needs colour."""
    planned = status["planned_steps"]
    done = f"{status['step']:,}"
    if planned:
        done += f" of {planned:,} ({100 * status['share_done']:.1f}%)  {_bar(status['share_done'])}"
    ranks = f", {status['world_size']} ranks" if status["world_size"] else ""
    reason = shortened(status["reason"], REASON_CHARACTERS)
    lines = [
        f"{status['run_dir']}  ({status['stage']}{ranks})" if status["stage"] else status["run_dir"],
        _row("state", status["state"].replace("_", " ") + (f": {reason}" if reason else "")),
        _row("step", done),
        _losses("loss", status["losses"], f"(mean of {status['loss_steps']} steps)" if status["losses"] else ""),
    ]
    if (held_out := status["held_out"]).keys() & NAMES:
        lines.append(_losses("held out", {name: held_out[name] for name in NAMES if name in held_out}))
    if of_sources := {name: value for name, value in held_out.items() if name not in NAMES}:
        lines.append(_losses("by source", of_sources))
    speed = "-"
    if status["tokens_per_s"] is not None:
        wait = "-" if status["data_wait_share"] is None else f"{100 * status['data_wait_share']:.1f}%"
        rate = f"{status['tokens_per_s']:,.0f} tokens/s, {duration(status['step_s'])} a step"
        speed = f"{rate}, {wait} of it waiting for data"
    lines.append(_row("speed", speed))
    if status["fill"] is not None:
        lines.append(_row("fill", f"{100 * status['fill']:.2f}%"))
    if status["state"] in ("running", "starting", "stale"):
        lines.append(_row("ETA", duration(status["eta_s"])))
        heartbeat = f"{duration(status['heartbeat_age_s'])} ago{_slowest(status['slowest_rank'])}"
        lines.append(_row("heartbeat", heartbeat))
    lines.append(_row("checkpoint", _checkpoint(status)))
    skips = "unknown" if status["skipped_documents"] is None else f"{status['skipped_documents']:,} samples"
    lines.append(_row("skipped", skips + (f", {status['skipped_steps']} steps" if status["skipped_steps"] else "")))
    for number, event in enumerate(status["events"]):
        lines.append(f"  {'' if number else 'events':<11}{_event(event, status['run_dir'])}")
    return "\n".join(lines)


def _losses(title: str, losses: dict[str, float], note: str = "") -> str:
    fields = [f"{name} {value:.4f}" for name, value in losses.items()] or ["-"]
    fields += [note] if note else []
    return filled([f"  {title:<11}{fields[0]}", *fields[1:]], COLUMNS, joint="  ", indent=INDENT)


def _checkpoint(status: dict[str, Any]) -> str:
    checkpoint = status["checkpoint"]
    failed = f"; {status['failed_saves']} saves FAILED" if status["failed_saves"] else ""
    if not checkpoint:
        return f"none yet{failed}"
    kept = f", {status['checkpoints']} on disk" if status["checkpoints"] else ""
    kept += f", {status['abandoned_checkpoints']} in abandoned/" if status["abandoned_checkpoints"] else ""
    return f"step {checkpoint['step']:,}, {duration(checkpoint['age_s'])} ago{kept}{failed}"


def _event(event: dict[str, Any], run_dir: str) -> str:
    """Time, step, name, and as many of the details as there is room for on the line."""
    when = parse_time(event.get("time"))
    stamp = f"{when:%m-%d %H:%M:%S}  " if when else ""
    text = f"{stamp}step {event.get('step', '?')}  {event['event']}"
    joint = "  "
    folders = "|".join(re.escape(f"{folder}/") for folder in (run_dir, Path(run_dir).absolute()))
    below = re.compile(rf"(?<![\w/.~-])(?:{folders})")  # where a path begins, not in the middle of a longer one
    for key, value in event.items():
        if key in ("time", "event", "step") or value in ("", None):
            continue
        detail = below.sub("", f"{key} {value}")
        room = COLUMNS - INDENT - len(text) - len(joint)
        if len(detail) <= room:
            text, joint = f"{text}{joint}{detail}", ", "
        elif key == "reason" and room >= 20:
            return text + joint + shortened(detail, room)
    return text


def _row(name: str, text: str) -> str:
    first, *words = text.split(" ")
    return filled([f"  {name:<11}{first}", *words], COLUMNS, joint=" ", indent=INDENT)


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
        losses = {
            key.removeprefix("val/"): float(value)
            for key, value in record.items()
            if key.startswith("val/") and _float(value) is not None
        }
        if losses:
            return losses
    return {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return json_object(path.read_text(encoding="utf-8", errors="replace")) or {}
    except OSError:
        return {}


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _values(records: list[dict[str, Any]], key: str) -> list[float]:
    return [value for value in (_float(record.get(key)) for record in records) if value is not None]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _eta(written: dict[str, Any], planned: int | None, step: int, step_s: float | None) -> float | None:
    """The trainer's own estimate counts saves and validations; without it, steps left times the median step."""
    estimate = _float(written.get("eta_s"))
    if estimate is not None:
        return estimate
    return (planned - step) * step_s if planned and step_s is not None else None


def _slowest_rank(folder: Path, now: float) -> dict[str, Any] | None:
    """Of all ranks' heartbeats (`engine/watch/heartbeat.py`) the one that has gone longest without progress, None
    without heartbeats."""
    beats: list[dict[str, Any]] = []
    for path in folder.glob("rank_*.json"):
        beat = _read_object(path)
        idle, age = _float(beat.get("idle_s")), _age(path, now)
        if idle is not None and age is not None and not beat.get("ended"):
            beats.append(
                {
                    "rank": beat.get("rank"),
                    "step": beat.get("step"),
                    "phase": beat.get("phase"),
                    "idle_s": idle + age,
                    "age_s": age,
                }
            )
    return max(beats, key=lambda beat: beat["idle_s"], default=None)


def _slowest(slowest: dict[str, Any] | None) -> str:
    if slowest is None:
        return ""
    return f"; slowest: rank {slowest['rank']}, {duration(slowest['idle_s'])} without progress ({slowest['phase']})"


def _heartbeat_age(paths: tuple[Path, ...], now: float) -> float | None:
    return min((age for path in paths if (age := _age(path, now)) is not None), default=None)


def _age(path: Path, now: float) -> float | None:
    """Seconds since the file was written; None where there is none."""
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None


def _last_checkpoint(run_dir: Path, written: dict[str, Any], now: float) -> dict[str, Any] | None:
    names = checkpoint_names(run_dir)
    if names:
        saved_at = (run_dir / "checkpoints" / names[-1]).stat().st_mtime
        return {"step": int(names[-1].removeprefix("step_")), "age_s": max(0.0, now - saved_at), "name": names[-1]}
    saved = written.get("checkpoint")  # the folder may lie on a disk of the training hosts
    if not isinstance(saved, dict) or as_int(saved.get("step")) is None:
        return None
    when = parse_time(saved.get("time"))
    return {"step": saved["step"], "age_s": max(0.0, now - when.timestamp()) if when else None, "name": None}


def _skipped(run_dir: Path, written: dict[str, Any]) -> int | None:
    known = as_int(written.get("skipped_documents"))
    if known is not None:
        return known
    ledger = run_dir / "ledger.jsonl"
    if not ledger.is_file():
        return None
    with ledger.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
