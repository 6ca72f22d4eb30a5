"""What the run folder says when things go wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

import jp_train.engine.watch.stop as stop
import jp_train.run.log as log_module
from jp_train.config import RunConfig, batch_plan
from jp_train.config.schema import WandbMode
from jp_train.engine.watch.stop import Stop
from jp_train.run.log import RunLog
from jp_train.run.sinks import SINKS
from jp_train.run.status import status

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


class CsvFile:
    """The example of CONTRIBUTING: step and loss as comma-separated values."""

    essential = False

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)

    @classmethod
    def opened(cls, cfg: RunConfig, resumed_step: int | None) -> CsvFile:
        return cls(Path(cfg.run_dir) / "loss.csv")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.writerow([step, values["loss/total"]])

    def close(self) -> None:
        self._file.close()


def test_a_sink_is_one_class_and_its_entry_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "SINKS", (*SINKS, CsvFile))
    log = started(tmp_path)
    log.step(1, VALUES), log.step(2, VALUES)
    log.close()
    assert (tmp_path / "loss.csv").read_text().splitlines() == ["1,2.0", "2,2.0"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_a_signal_stops_says_what_was_saved_and_how_to_go_on(tmp_path, capsys):
    log = started(tmp_path)
    log.step(41, VALUES)
    log.finish(stop.Stop("signal SIGINT", "stopped_by_signal", 130), 41)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "signal SIGINT: saved at step 41; run the same command to resume"
    )
    log = started(tmp_path)
    log.finish(stop.Stop("all training steps done", "finished"), 50)
    assert capsys.readouterr().err.splitlines()[-1] == "finished after step 50: all training steps done"


@pytest.mark.parametrize(("begun", "saved", "way_on"), [(False, False, "start again"), (True, True, "resume")])
def test_a_run_that_a_signal_ends_at_once_says_how_to_go_on(begun, saved, way_on, tmp_path, capsys):
    log = started(tmp_path)
    if begun:
        log.step(7, VALUES)
    if saved:
        log.saved(5)
    log.stopped_by_force(130)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"; run the same command to {way_on}")


def test_a_failed_attempt_says_why_and_a_refused_one_leaves_the_status_of_the_run_alone(tmp_path):
    log = started(tmp_path)
    log.fail(ValueError("broken"))
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "ValueError: broken")
    (tmp_path / "status.json").write_text('{"state": "stopped_by_signal"}')
    RunLog(RunConfig(run_dir=str(tmp_path)), active=True, dp_world_size=1).fail(ValueError("another configuration"))
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "stopped_by_signal"}
    assert [event["event"] for event in events(tmp_path)] == ["failed", "failed"]


@pytest.mark.parametrize("state", ("finished", "stopped_early"))
def test_a_refused_attempt_leaves_no_trace_in_the_folder_of_a_run_that_has_ended_well(state, tmp_path):
    log = started(tmp_path)
    log.finish(Stop("all training steps done", state), 9)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    RunLog(RunConfig(run_dir=str(tmp_path)), active=True, dp_world_size=1).fail(ValueError("another configuration"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert status(tmp_path)["state"] == state


@pytest.mark.parametrize("begun", (False, True))
def test_a_second_signal_leaves_a_status_that_says_stopped_wherever_it_finds_the_process(begun, tmp_path, monkeypatch):
    """Also while the training thread holds a lock that starting a thread needs: the handler runs on top of it and
    may wait for nothing."""
    monkeypatch.setattr(stop, "SAME_SIGNAL_S", 0.02)
    log = started(tmp_path)
    if begun:
        log.step(7, VALUES)
    child = os.fork()
    if child == 0:
        try:
            with stop.SignalFlag(log.stopped_by_force).installed(), threading._active_limbo_lock:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    status = json.loads((tmp_path / "status.json").read_text())
    assert (
        status["state"] == "stopped_by_signal"
        and ("sent twice" if begun else "before the first step") in status["reason"]
    )
    (event,) = events(tmp_path)
    assert (event["event"], event["step"], event["exit_code"]) == ("stop", 7 if begun else 0, 143)


def test_an_exit_hook_that_never_ends_does_not_keep_a_second_signal_from_ending_the_process(monkeypatch):
    monkeypatch.setattr(stop, "SAME_SIGNAL_S", 0.02)
    monkeypatch.setattr(stop, "EXIT_HOOK_S", 0.2)
    child = os.fork()
    if child == 0:
        try:
            with stop.SignalFlag(lambda code: time.sleep(60)).installed():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_other_ranks_write_nothing(tmp_path):
    log = RunLog(RunConfig(run_dir=str(tmp_path / "run")), active=False, dp_world_size=2)
    log.begin(), log.say("x"), log.event("x", 0), log.step(1, VALUES), log.fail(ValueError())
    assert not (tmp_path / "run").exists()
