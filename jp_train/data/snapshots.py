"""`plan_snapshots.jsonl` of a run folder: the plan's state every `data.snapshot_steps` steps and at each save, one JSON
object a line.

Any row of the run is a fold of at most `data.snapshot_steps` steps away from one of them, also when the checkpoints of
that time are gone. A line is `Plan.state()`; its `step` is the number of completed steps, so that its rows of plan step
`step` come next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jp_train.files import append_lines, read_json_lines

SNAPSHOTS_FILE = "plan_snapshots.jsonl"
_CHECKPOINT = re.compile(r"step_(\d{7,})$")
MOST_CANDIDATES = 4
"""States kept in memory to fall back on when the nearest is damaged."""


def append_snapshot(path: Path, state: dict[str, Any]) -> None:
    """Add a plan's state, on disk when this returns (a few kilobytes)."""
    append_lines(path, [json.dumps(state)])


def nearest_snapshots(run_dir: str | Path, step: int) -> Iterator[dict[str, Any]]:
    """The plan states that a run folder holds for `step` completed steps or fewer, nearest first: of
    `plan_snapshots.jsonl` and of the checkpoints, at most `MOST_CANDIDATES` of each. What cannot be read is passed
    over; the states themselves are not checked."""
    candidates: list[tuple[int, dict[str, Any] | Path]] = []
    candidates += [(state["step"], state) for state in _lines(Path(run_dir) / SNAPSHOTS_FILE, step)]
    candidates += _checkpoints(Path(run_dir) / "checkpoints", step)
    for _, candidate in sorted(candidates, key=lambda candidate: -candidate[0]):
        state: Any = candidate
        try:
            if isinstance(candidate, Path):
                state = json.loads((candidate / "state.json").read_text(encoding="utf-8"))["plan"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if _step(state) is not None and state["step"] <= step:
            yield state


def _lines(path: Path, step: int) -> list[dict[str, Any]]:
    """The states of the last steps until `step`, each step once."""
    if not path.is_file():
        return []
    kept: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for state in read_json_lines(file):
            state_step = _step(state)
            if state is not None and state_step is not None and state_step <= step:
                kept[state_step] = state
                if len(kept) > MOST_CANDIDATES:
                    del kept[min(kept)]
    return list(kept.values())


def _step(state: Any) -> int | None:
    step = state.get("step") if isinstance(state, dict) else None
    return step if isinstance(step, int) else None


def _checkpoints(folder: Path, step: int) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT.match(path.name))}
    return sorted(item for item in steps.items() if item[0] <= step)[-MOST_CANDIDATES:]
