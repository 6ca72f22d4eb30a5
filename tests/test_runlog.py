"""What the run folder says when things go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.config import RunConfig, batch_plan
from jp_train.config.schema import WandbMode
from jp_train.runlog import RunLog

VALUES = {
    "loss/total": 2.0,
    "optim/lr": 1e-4,
    "optim/grad_norm": 0.5,
    "packing/fill": 1.0,
    "perf/tokens_per_s": 1.0,
    "time/step_s": 1.0,
    "time/data_wait_s": 0.0,
}


def started(tmp_path: Path) -> RunLog:
    cfg = RunConfig(run_dir=str(tmp_path))
    cfg.logging.wandb.mode = WandbMode.disabled
    log = RunLog(cfg, active=True, dp_world_size=1)
    log.begin()
    log.open(batch=batch_plan(cfg, 1), resumed_step=None, checkpoint=None)
    return log


def events(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


class Broken:
    def __init__(self, essential: bool) -> None:
        self.essential = essential

    def log(self, step, values) -> None:
        raise ConnectionResetError("Connection lost")

    def close(self) -> None:
        raise AssertionError("a dropped sink is not closed")


def test_a_failing_wandb_is_named_and_dropped_and_the_step_is_still_logged(tmp_path):
    log = started(tmp_path)
    log._sinks.append(Broken(essential=False))
    log.step(1, VALUES), log.step(2, VALUES)
    log.close()
    assert [event["reason"] for event in events(tmp_path)] == ["ConnectionResetError: Connection lost"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_failing_metrics_file_stops_the_run(tmp_path):
    log = started(tmp_path)
    log._sinks.append(Broken(essential=True))
    with pytest.raises(ConnectionResetError):
        log.step(1, VALUES)


def test_a_failed_attempt_says_why_and_a_refused_one_leaves_the_status_of_the_run_alone(tmp_path):
    log = started(tmp_path)
    log.fail(ValueError("broken"))
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "ValueError: broken")
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    RunLog(RunConfig(run_dir=str(tmp_path)), active=True, dp_world_size=1).fail(ValueError("another configuration"))
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "finished"}
    assert [event["event"] for event in events(tmp_path)] == ["failed", "failed"]


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(RunConfig(run_dir=str(tmp_path / "run")), active=False, dp_world_size=2)
    log.begin(), log.say("x"), log.event("x", 0), log.step(1, VALUES), log.fail(ValueError())
    assert not (tmp_path / "run").exists()
