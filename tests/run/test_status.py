"""One screen about a run: what it says while the run trains, when it hangs, and after its end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from jp_train.cli.main import main
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
    assert (
        "(mean of 100 steps)" in screen.split("speed")[0]
        and "120 of 480 (25.0%)" in screen
        and "ETA" in screen
        and "12 min" not in screen.split("ETA")[0]
    )


def test_a_run_without_a_sign_of_life_for_three_step_times_is_stale(tmp_path: Path) -> None:
    # about 19 s a step, the first 80 s
    folder = write_run(tmp_path / "run", steps=60, planned=480, state="running", speed=0.1)
    beat(folder, 1_000_000.0)
    limit = status(folder, now=1_000_000.0)["stale_after_s"]
    assert status(folder, now=1_000_000.0 + limit - 1)["state"] == "running"
    late = status(folder, now=1_000_000.0 + limit + 1)
    assert late["state"] == "stale" and "no sign of life" in late["reason"] and "stale" in format_status(late)


@pytest.mark.parametrize("ahead_s", [-7200.0, 7200.0])
def test_a_reader_whose_clock_is_wrong_sees_the_same_run(tmp_path: Path, monkeypatch, ahead_s: float) -> None:
    folder = write_run(tmp_path / "run", steps=60, planned=480, state="running")
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead_s)
    seen = status(folder)
    assert seen["state"] == "running" and seen["heartbeat_age_s"] < 600 and seen["checkpoint"]["age_s"] < 600
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


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


@pytest.mark.parametrize("looked_at", ["s3/run", "./s3/run/", "{absolute}"])
def test_a_path_of_an_event_is_shown_below_the_run_folder_whichever_way_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "s3" / "run", steps=20)
    elsewhere = "/x/s3/run/export"  # its end is like the run folder's name
    with (folder / "events.jsonl").open("a") as file:
        for path in (f"{folder}/export", elsewhere):
            file.write(json.dumps({"event": "export", "step": 20, "time": 9e8, "path": path}) + "\n")
    screen = format_status(status(Path(looked_at.format(absolute=folder)))).splitlines()
    assert [line.rsplit("  ", 1)[1] for line in screen[-2:]] == ["path export", f"path {elsewhere}"]


def test_the_screen_keeps_to_80_columns_cuts_no_number_and_tells_held_out_losses_by_kind_and_by_source(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run", stage="stage3", steps=60, state="failed")
    sources = {f"val/held-out-source-{number}": 1.5 + number for number in range(6)}
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    reason = "JpTrainError: rank 1 (process 8673 on vm) is gone (killed, or crashed without a word); " + "so much " * 40
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(last | {"step": 61} | sources) + "\n")
    with (folder / "events.jsonl").open("a") as file:
        save = {"path": f"{folder}/checkpoints/step_0000060", "bytes": 29831707, "stall_s": 0.038, "total_s": 1.234567}
        file.write(json.dumps({"event": "save", "step": 60, "time": 9e8, **save}) + "\n")
        file.write(json.dumps({"event": "failed", "step": 60, "time": 9e8, "reason": reason}) + "\n")
    (folder / "status.json").write_text(json.dumps({"state": "failed", "step": 61, "reason": reason}))
    first, *screen = format_status(status(folder)).splitlines()
    assert first == str(folder) and max(map(len, screen)) <= 80
    lines = "\n".join(screen)
    assert "failed: JpTrainError: rank 1 (process 8673 on vm) is gone" in " ".join(lines.split())
    held_out = next(line for line in screen if "held out" in line)
    assert held_out.split()[2::2] == ["total", "understanding", "text", "generation"]
    assert lines.split("by source")[1].split("speed")[0].split()[::2] == [
        name.removeprefix("val/") for name in ["val/held_digits", *sources]
    ]
    saved = next(line for line in screen if "step 60  save  path" in line)
    assert saved.endswith("save  path checkpoints/step_0000060"), "of what has no room, not even the beginning"
    assert screen[-1].rstrip().endswith("…")


def test_the_rank_longest_without_progress_is_told_while_the_run_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=120, planned=480, state="running")
    beat(folder, 1_000_000.0)
    (folder / "heartbeats").mkdir()
    for rank, idle, written in ((0, 1.0, 999_999.0), (1, 40.0, 999_998.0), (2, 0.5, 999_995.0)):
        clock = written + 3600 * (rank - 1)  # of the rank's host, which nobody has set
        path = folder / "heartbeats" / f"rank_{rank:04d}.json"
        path.write_text(json.dumps({"rank": rank, "step": 121, "phase": "forward", "idle_s": idle, "time": clock}))
        os.utime(path, (written, written))
    (folder / "heartbeats" / "rank_0003.json").write_text("{")
    state_of_run = status(folder, now=1_000_000.0)
    assert state_of_run["slowest_rank"] == {"rank": 1, "step": 121, "phase": "forward", "idle_s": 42.0, "age_s": 2.0}
    assert "slowest: rank 1, 42 s without progress (forward)" in format_status(state_of_run)
    assert status(write_run(tmp_path / "ended", steps=30, state="done"), now=9e9)["slowest_rank"] is None


def test_a_folder_of_run_folders_is_answered_with_their_names(tmp_path):
    for name in ("stage2", "stage1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text('{"state": "finished"}')
    with pytest.raises(DataError, match=f"Below it are {tmp_path}/stage1, {tmp_path}/stage2"):
        status(tmp_path)


def test_watching_a_run_ends_with_it(tmp_path, capsys):
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    assert main(["status", str(tmp_path), "--watch", "1000"]) == 0
    assert "finished" in capsys.readouterr().out
