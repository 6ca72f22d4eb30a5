"""One screen about a run: what it says while the run trains, when it hangs, and after its end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from jp_train.errors import DataError
from jp_train.run.status import format_status, status
from tests.run.synthetic_run import write_run


def beat(folder: Path, at: float) -> None:
    for name in ("status.json", "metrics.jsonl"):
        os.utime(folder / name, (at, at))


def test_a_running_run_shows_progress_losses_and_eta(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=120, planned=480, state="running")
    beat(folder, 1_000_000.0)
    state_of_run = status(folder, now=1_000_002.0)
    assert (state_of_run["state"], state_of_run["step"], state_of_run["planned_steps"], state_of_run["share_done"]) == (
        "running",
        120,
        480,
        0.25,
    )
    assert set(state_of_run["losses"]) == {"total", "understanding", "text", "generation"}
    assert state_of_run["eta_s"] == pytest.approx(360 * 1.9) and state_of_run["heartbeat_age_s"] == 2.0
    assert (
        state_of_run["checkpoint"]["step"] == 120
        and state_of_run["checkpoints"] == 4
        and 0 < state_of_run["data_wait_share"] < 0.1
    )
    json.dumps(state_of_run, allow_nan=False)
    screen = format_status(state_of_run)
    assert "120 of 480 (25.0%)" in screen and "ETA" in screen and "12 min" not in screen.split("ETA")[0]


def test_a_run_without_a_sign_of_life_for_three_step_times_is_stale(tmp_path: Path) -> None:
    # about 19 s a step, the first 80 s
    folder = write_run(tmp_path / "run", steps=60, planned=480, state="running", speed=0.1)
    beat(folder, 1_000_000.0)
    limit = status(folder, now=1_000_000.0)["stale_after_s"]
    assert status(folder, now=1_000_000.0 + limit - 1)["state"] == "running"
    late = status(folder, now=1_000_000.0 + limit + 1)
    assert late["state"] == "stale" and "no sign of life" in late["reason"] and "stale" in format_status(late)


def test_an_ended_run_is_never_stale_and_has_no_eta(tmp_path: Path) -> None:
    for state, shown in (
        ("done", "finished"),
        ("stopped_early", "stopped_early"),
        ("stopped_by_signal", "stopped_by_signal"),
        ("failed", "failed"),
    ):
        state_of_run = status(write_run(tmp_path / state, steps=30, state=state), now=9e9)
        assert (
            state_of_run["state"] == shown
            and state_of_run["eta_s"] is None
            and "ETA" not in format_status(state_of_run)
        )


def test_losses_come_from_the_attempt_that_counts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    steps = [(1, 9.0), (2, 9.0), (3, 9.0), (2, 1.0)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss/total": v}) + "\n" for s, v in steps) + '{"step": 3, "loss/t'
    )
    state_of_run = status(folder)
    assert state_of_run["losses"]["total"] == 5.0 and state_of_run["step"] == 2 and state_of_run["state"] == "unknown"


def test_a_run_that_has_only_started_is_shown_and_an_empty_folder_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="not a run folder"):
        status(tmp_path / "run")
    (tmp_path / "run" / "status.json").write_text(
        json.dumps({"state": "starting", "planned_steps": 10, "dp_world_size": 2, "stage": "stage1"})
    )
    state_of_run = status(tmp_path / "run")
    assert (state_of_run["state"], state_of_run["step"], state_of_run["checkpoint"], state_of_run["tokens_per_s"]) == (
        "starting",
        0,
        None,
        None,
    )
    assert "none yet" in format_status(state_of_run)


def test_the_rank_longest_without_progress_is_told_while_the_run_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=120, planned=480, state="running")
    beat(folder, 1_000_000.0)
    (folder / "heartbeats").mkdir()
    for rank, idle, written in ((0, 1.0, 999_999.0), (1, 40.0, 999_998.0), (2, 0.5, 999_995.0)):
        values = {"rank": rank, "step": 121, "phase": "forward", "idle_s": idle, "time": written}
        (folder / "heartbeats" / f"rank_{rank:04d}.json").write_text(json.dumps(values))
    (folder / "heartbeats" / "rank_0003.json").write_text("{")
    state_of_run = status(folder, now=1_000_000.0)
    assert state_of_run["slowest_rank"] == {"rank": 1, "step": 121, "phase": "forward", "idle_s": 42.0, "age_s": 2.0}
    assert "slowest: rank 1, 42 s without progress (forward)" in format_status(state_of_run)
    assert status(write_run(tmp_path / "ended", steps=30, state="done"), now=9e9)["slowest_rank"] is None
