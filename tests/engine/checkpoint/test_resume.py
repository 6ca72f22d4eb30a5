"""Where a run goes on, decided without an engine (whole runs: tests/engine/test_distributed_runs.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from jp_train.config import RunConfig
from jp_train.config.schema import EarlyStopConfig
from jp_train.engine.checkpoint.files import Checkpoint
from jp_train.engine.checkpoint.resume import already_finished
from jp_train.engine.state import TrainState


def run(tmp_path: Path, **early_stop) -> RunConfig:
    cfg = RunConfig(run_dir=str(tmp_path))
    cfg.stage.training_steps, cfg.stage.early_stop = 100, EarlyStopConfig(**early_stop)
    return cfg


def after(cfg: RunConfig, step: int, waited: int = 0) -> Checkpoint:
    state = TrainState.restored(cfg, None)
    state.step, state.patience.waited = step, waited
    return Checkpoint(Path("x"), step, {}, {"training": state.saved()})


@pytest.mark.parametrize(
    ("step", "early", "waited", "state"),
    [(100, {}, 0, "finished"), (60, {"at_step": 60}, 0, "stopped_early"), (9, {"patience": 3}, 3, "stopped_early")],
)
def test_a_run_whose_stop_rule_holds_and_whose_export_exists_has_nothing_left_to_do(
    tmp_path, step, early, waited, state
):
    cfg = run(tmp_path, **early)
    assert already_finished(cfg, after(cfg, step, waited)) is None, "the export is missing"
    (tmp_path / "export").mkdir()
    assert already_finished(cfg, after(cfg, step, waited)).state == state
    assert already_finished(cfg, after(cfg, step - 1, 0)) is None


def test_raising_the_steps_makes_a_finished_run_go_on(tmp_path):
    (tmp_path / "export").mkdir()
    cfg = run(tmp_path, at_step=60)
    checkpoint = after(cfg, 60)
    cfg.stage.early_stop.at_step = 80
    assert already_finished(cfg, checkpoint) is None


def test_the_state_between_steps_survives_a_checkpoint(tmp_path):
    cfg = run(tmp_path, patience=3)
    state = TrainState.restored(cfg, None)
    state.step, state.tokens = 7, 1 << 40
    state.patience.observe(2.0), state.skips.observe(False, 7, cfg.guard), state.statistics.judge(3.0, 1.0)
    assert TrainState.restored(cfg, state.saved()).saved() == state.saved()
