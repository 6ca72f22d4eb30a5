"""What the terminal shows of the smoke run, its time left, and the words of its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.smoke.console import STEP_INTERVAL_S, LineFilter, recorded
from examples.smoke.run import PRIOR_S, measured_pace
from examples.smoke.summary import COLUMNS, format_summary
from examples.smoke.targets import SPREADS, TARGETS
from tests.run.synthetic_run import write_run

STEP = "step {}/420  loss 4.549 (und 4.567 text 4.849 gen 4.297)  lr 1.8e-03  norm 1.64  3,223 tok/s  ETA 2 min 37 s"


def test_steps_are_shown_every_half_minute_and_shortened_with_the_time_left_of_the_whole_run() -> None:
    now = [0.0]
    show = LineFilter(60.0, clock=lambda: now[0])
    first = show(STEP.format(" 10"))
    losses = "loss 4.549 (und 4.567 text 4.849 gen 4.297)"
    assert first == f"step  10/420  {losses}  ETA 2 min 37 s  (all 3 min 37 s)"
    assert first is not None and len(first) <= 100
    now[0] = STEP_INTERVAL_S - 1
    assert show(STEP.format(" 20")) is None
    now[0] = STEP_INTERVAL_S
    assert show(STEP.format(" 30")) is not None
    assert show(STEP.format("420")) is not None, "the last step is always shown"


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-28 20:27:29,544] [INFO] [launch.py:158:main] nnodes=1, num_local_procs=2, node_rank=0",
        "Writing model shards: 100%|##########| 1/1 [00:00<00:00, 57.37it/s]",
        "command: python -m deepspeed.launcher.runner",
        "step 50/50  held out  total 5.6119 und 5.6119",
        "",
    ],
)
def test_routine_lines_stay_in_the_log_file(line: str) -> None:
    assert LineFilter(0.0)(line) is None


@pytest.mark.parametrize(
    "line",
    ["RuntimeError: out of memory", "[2026-11-28 20:27:29,544] [ERROR] [launch.py] Killing subprocess", "warning: x"],
)
def test_errors_and_unknown_lines_are_shown(line: str) -> None:
    assert LineFilter(0.0)(line + "\n") == line


def test_output_of_child_processes_goes_into_the_log_and_shown_lines_to_the_terminal(tmp_path: Path, capfd) -> None:
    log = tmp_path / "logs" / "step.log"
    script = "import sys; print('quiet'); print('loud', file=sys.stderr)"
    with recorded(log, lambda line: line.strip() if "loud" in line else None):
        subprocess.run([sys.executable, "-c", script], check=True)
    assert sorted(log.read_text().split()) == ["loud", "quiet"]
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "loud\n")
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "after\n", "the terminal is given back"


def test_the_pace_is_what_the_finished_steps_took_beside_what_they_should_take(tmp_path: Path) -> None:
    assert measured_pace(tmp_path, [], {}) == 1.0
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "data.json").write_text(json.dumps({"seconds": 240.0}))
    assert measured_pace(tmp_path, ["data"], {"data": 120.0}) == pytest.approx((PRIOR_S + 240) / (PRIOR_S + 120))


def test_targets_lie_two_spreads_below_the_mean_of_the_measured_runs() -> None:
    measured = {
        "digits named": (0.81, 0.78, 0.78, 0.83, 0.78, 0.75, 0.82),
        "digits generated": (0.84, 0.93, 0.78, 0.92, 0.82, 0.90, 0.84),
    }
    for name, scores in measured.items():
        mean = sum(scores) / len(scores)
        spread = (sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)) ** 0.5
        assert SPREADS[name] == pytest.approx(spread, abs=0.005)
        assert 0 <= mean - 2 * spread - TARGETS[name] < 0.01


def test_the_summary_keeps_to_its_columns_and_says_what_a_miss_means(tmp_path: Path) -> None:
    write_run(tmp_path / "stage1", stage="stage1", steps=40)
    write_run(tmp_path / "stage2", stage="stage2", steps=80, schedule=100, state="stopped_early")
    last = write_run(tmp_path / "stage3", stage="stage3", steps=60)
    met, missed = TARGETS["digits named"], TARGETS["digits generated"] - 0.001
    rows = [
        {"name": "digits named", "value": met, "chance": 0.1, "target": met},
        {"name": "digits generated", "value": missed, "chance": 0.1, "ceiling": 0.98, "target": missed + 0.001},
    ]
    (last / "evaluation.json").write_text(json.dumps(rows))
    text = format_summary(tmp_path, seconds=600)
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= COLUMNS
    assert [line.split()[-1] for line in lines if line.startswith("digits ")] == ["met", "target"]
    assert "--seed 1" in text and "stage2 -> stage3: questions are asked in another form" in text
    (last / "evaluation.json").write_text(json.dumps(rows[:1]))
    assert "below target" not in format_summary(tmp_path, seconds=600)
