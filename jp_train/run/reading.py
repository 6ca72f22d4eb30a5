"""Reads a run folder: config.yaml, metrics.jsonl, status.json, ledger.jsonl, events.jsonl, samples/, evaluation.json.

The reader never trusts a file to be whole: a run may be training while it is read, may have been killed in the middle
of a line, and may have repeated steps after a resume. What could not be read is counted and shown; only a run without a
single metrics line is an error.
"""

from __future__ import annotations

import io
import json
import math
import struct
from array import array
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jp_train.errors import DataError
from jp_train.files import json_object, read_json_lines

LEDGER_ROWS = 50
"""Ledger lines kept for the table; all lines are counted."""
MAX_SAMPLE_IMAGES = 48
MAX_SAMPLE_BYTES = 24 * 2**20
"""Images of samples/ that are read, together at most this many bytes; the others are named as left out."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One metric over steps: `steps` int64 [N] ascending and unique, `values` float64 [N], NaN where the metric was
    not finite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return int(self.steps.shape[0])

    def finite(self) -> Series:
        """The series without its non-finite points."""
        keep = np.isfinite(self.values)
        return Series(steps=self.steps[keep], values=self.values[keep])


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleImage:
    """One PNG of `samples/` with its caption. `title` and `text` are untrusted: escape them."""

    name: str
    png: bytes
    width: int
    height: int
    title: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Bad samples: the first LEDGER_ROWS lines, and how many there were for every (source, reason)."""

    rows: tuple[dict[str, Any], ...] = ()
    counts: tuple[tuple[str, str, int], ...] = ()
    total: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One figure of evaluation.json. `lower_is_better` turns the meaning of `target` round."""

    name: str
    value: float
    chance: float | None = None
    ceiling: float | None = None
    target: float | None = None
    note: str = ""
    lower_is_better: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None:
            return None
        return self.value <= self.target if self.lower_is_better else self.value >= self.target


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """Everything the report knows of one run. `missing` maps what every run should have and this one lacks, or has in
    a form that cannot be read, to a sentence about it.

    `series` maps a metrics.jsonl key to its values; `unreadable_lines` counts torn lines by file; `repeated_steps`
    counts steps that were lost to a kill and trained again after a resume (the last time counts).
    """

    path: Path
    label: str
    config: dict[str, Any]
    config_text: str
    series: dict[str, Series]
    status: dict[str, Any]
    events: tuple[dict[str, Any], ...]
    ledger: Ledger
    samples: tuple[SampleImage, ...]
    evaluation: tuple[EvaluationRow, ...]
    checkpoints: tuple[str, ...]
    missing: dict[str, str] = field(default_factory=dict)
    unreadable_lines: dict[str, int] = field(default_factory=dict)
    repeated_steps: int = 0
    samples_left_out: tuple[str, ...] = ()

    def configured(self, dotted: str, default: Any = None) -> Any:
        """A key of the run's config.yaml such as `stage.mixture.text`; `default` where the config is missing or
        lacks it."""
        node: Any = self.config
        for part in dotted.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return default if node is None else node

    @property
    def last_step(self) -> int:
        """The last step in metrics.jsonl."""
        return max(int(s.steps[-1]) for s in self.series.values())


def read_run(path: Path, *, label: str | None = None) -> RunData:
    """Read one run folder.

    Raises DataError when the folder, its metrics.jsonl, or any complete line in it is missing; everything else may be
    absent.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(
            f"{path} is not a folder; expected a run folder (the `run_dir` of a training, with metrics.jsonl in it)"
        )
    missing: dict[str, str] = {}
    unreadable: Counter[str] = Counter()
    series, repeated = _read_metrics(path / "metrics.jsonl", unreadable)
    config, config_text = _read_config(path / "config.yaml", missing)
    samples, left_out = _read_samples(path / "samples")
    return RunData(
        path=path,
        label=label or path.resolve().name,
        config=config,
        config_text=config_text,
        series=series,
        status=_read_status(path / "status.json", missing),
        events=_read_events(path / "events.jsonl", missing, unreadable),
        ledger=_read_ledger(path / "ledger.jsonl", unreadable),
        samples=samples,
        evaluation=_read_evaluation(path / "evaluation.json", missing),
        checkpoints=checkpoint_names(path),
        missing=missing,
        unreadable_lines=dict(unreadable),
        repeated_steps=repeated,
        samples_left_out=left_out,
    )


def checkpoint_names(run_dir: Path) -> tuple[str, ...]:
    """Complete checkpoints of a run, oldest first. Half-written ones lie beside under another name
    (docs/checkpoints.md)."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return ()
    return tuple(
        sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name.startswith("step_") and p.name[5:].isdigit())
    )


def _open_text(path: Path) -> io.TextIOWrapper:
    return path.open(encoding="utf-8", errors="replace")


def _read_metrics(path: Path, unreadable: Counter[str]) -> tuple[dict[str, Series], int]:
    if not path.is_file():
        raise DataError(
            f"{path.parent} has no metrics.jsonl; expected a run folder that has trained at least one step. Name the "
            "run's `run_dir`"
        )
    columns: dict[str, tuple[array[int], array[float]]] = {}
    last, repeated = None, 0
    with _open_text(path) as lines:
        for record in read_json_lines(lines):
            number = None if record is None else _number(record.get("step"))
            if record is None or number is None:
                unreadable["metrics.jsonl"] += 1
                continue
            step = int(number)
            values = {
                k: math.nan if v is None else v for k, v in record.items() if k != "step" and _is_number_or_null(v)
            }
            only_validation = bool(values) and all(key.startswith("val/") for key in values)
            if last is not None and (step < last or (step == last and not only_validation)):
                repeated += last - step + 1
                _forget_from(columns, step)
            last = step
            for key, value in values.items():
                steps, numbers = columns.setdefault(key, (array("q"), array("d")))
                steps.append(step)
                numbers.append(float(value))
    series = {}
    for key, (steps, numbers) in columns.items():
        if steps:
            values_array = np.frombuffer(numbers, dtype=np.float64)
            finite = np.where(np.isfinite(values_array), values_array, np.nan)
            series[key] = Series(steps=np.frombuffer(steps, dtype=np.int64), values=finite)
    if not series:
        raise DataError(
            f"{path} holds no complete metrics line ({unreadable['metrics.jsonl']} unreadable); expected one JSON "
            "object with `step` a line. Wait for the first step, or name another run folder"
        )
    return series, repeated


def _is_number_or_null(value: Any) -> bool:
    """JSON has no NaN: the trainer writes null for a number that is not finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _forget_from(columns: dict[str, tuple[array[int], array[float]]], step: int) -> None:
    """A resumed run trains `step` again: what the lost attempt wrote from there on counts no more."""
    for steps, numbers in columns.values():
        keep = bisect_left(steps, step)
        del steps[keep:], numbers[keep:]


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a run's YAML; empty where it is missing, damaged or cannot be read."""
    try:
        return _read_config(path, {})[0]
    except OSError:
        return {}


def _read_config(path: Path, missing: dict[str, str]) -> tuple[dict[str, Any], str]:
    if not path.is_file():
        missing["config"] = (
            "config.yaml is not in the run folder; the configured shares and the planned steps are unknown."
        )
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        missing["config"] = f"config.yaml is not readable as YAML: {error}"
        return {}, text
    if not isinstance(config, dict):
        missing["config"] = "config.yaml holds no mapping of keys."
        return {}, text
    return config, text


def _read_status(path: Path, missing: dict[str, str]) -> dict[str, Any]:
    if not path.is_file():
        missing["status"] = "status.json is not in the run folder; whether the run ended is unknown."
        return {}
    status = json_object(path.read_text(encoding="utf-8", errors="replace"))
    if status is None:
        missing["status"] = "status.json holds no JSON object; whether the run ended is unknown."
        return {}
    return status


def _read_events(path: Path, missing: dict[str, str], unreadable: Counter[str]) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        missing["events"] = "events.jsonl is not in the run folder."
        return ()
    events = []
    with _open_text(path) as lines:
        for record in read_json_lines(lines):
            if record is None or "event" not in record:
                unreadable["events.jsonl"] += 1
            else:
                events.append(record)
    return tuple(events)


def _read_ledger(path: Path, unreadable: Counter[str]) -> Ledger:
    if not path.is_file():  # nothing was skipped
        return Ledger()
    rows: list[dict[str, Any]] = []
    counts: Counter[tuple[str, str]] = Counter()
    with _open_text(path) as lines:
        for record in read_json_lines(lines):
            if record is None:
                unreadable["ledger.jsonl"] += 1
                continue
            counts[(str(record.get("source", "?")), str(record.get("reason", "?")))] += 1
            if len(rows) < LEDGER_ROWS:
                rows.append(record)
    by_count = sorted(((s, r, n) for (s, r), n in counts.items()), key=lambda item: (-item[2], item[0], item[1]))
    return Ledger(rows=tuple(rows), counts=tuple(by_count), total=sum(counts.values()))


def _read_samples(folder: Path) -> tuple[tuple[SampleImage, ...], tuple[str, ...]]:
    files = sorted(folder.glob("*.png")) if folder.is_dir() else []
    images: list[SampleImage] = []
    left_out: list[str] = []
    used = 0
    for file in files:
        size = file.stat().st_size
        if len(images) >= MAX_SAMPLE_IMAGES or used + size > MAX_SAMPLE_BYTES:
            left_out.append(f"{file.name} (over {MAX_SAMPLE_IMAGES} images or {MAX_SAMPLE_BYTES // 2**20} MiB)")
            continue
        png = file.read_bytes()
        if len(png) < 24 or not png.startswith(PNG_SIGNATURE):
            left_out.append(f"{file.name} (not a PNG file)")
            continue
        width, height = struct.unpack(">II", png[16:24])
        title, text = _read_caption(file.with_suffix(".json"), default=file.stem)
        used += size
        images.append(SampleImage(name=file.name, png=png, width=width, height=height, title=title, text=text))
    return tuple(images), tuple(left_out)


def _read_caption(path: Path, *, default: str) -> tuple[str, str]:
    if not path.is_file():
        return default, ""
    caption = json_object(path.read_text(encoding="utf-8", errors="replace"))
    if caption is None:
        return default, f"({path.name} holds no JSON object)"
    return str(caption.get("title") or default), str(caption.get("text") or "")


def _read_evaluation(path: Path, missing: dict[str, str]) -> tuple[EvaluationRow, ...]:
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        missing["evaluation"] = f"evaluation.json is not readable as JSON: {error}"
        return ()
    rows, bad = [], 0
    for entry in entries if isinstance(entries, list) else []:
        value = _number(entry.get("value")) if isinstance(entry, dict) else None
        if value is None or "name" not in entry:
            bad += 1
            continue
        rows.append(
            EvaluationRow(
                name=str(entry["name"]),
                value=value,
                chance=_number(entry.get("chance")),
                ceiling=_number(entry.get("ceiling")),
                target=_number(entry.get("target")),
                note=str(entry.get("note") or ""),
                lower_is_better=bool(entry.get("lower_is_better", False)),
            )
        )
    if bad or not rows:
        missing["evaluation"] = (
            f"evaluation.json: {bad} of {bad + len(rows)} entries lack a `name` or a finite `value`."
        )
    return tuple(rows)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
