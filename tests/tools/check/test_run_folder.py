"""The run folder as `jp-train check` and the launcher see it, in the words of training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jp_train.config import RunConfig
from jp_train.engine.checkpoint.identity import training_identity
from jp_train.engine.state import TrainState
from jp_train.errors import CheckpointError, JpTrainError, LaunchError
from jp_train.run.lock import take
from jp_train.tools.check.run_folder import run_folder
from jp_train.tools.check.subject import Subject
from tests.engine.checkpoint.test_store import save, store
from tests.small_disk import fill, mounted


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    config.stage.training_steps, config.stage.trainable = 100, ["aligner"]
    return config


def saved(cfg: RunConfig, step: int) -> Path:
    state = TrainState.restored(cfg, None)
    state.step = step
    made = store(Path(cfg.run_dir))
    return save(made, step, identity=training_identity(cfg), state={"training": state.saved()})


def refused(cfg: RunConfig) -> JpTrainError:
    with pytest.raises(JpTrainError) as caught:
        run_folder(Subject(config=cfg))
    return caught.value


def test_a_new_folder_a_run_under_way_and_a_finished_one_are_told_apart(cfg: RunConfig) -> None:
    assert run_folder(Subject(config=cfg)) == {"step": None, "accepted": [], "finished": ""}
    saved(cfg, 40)
    assert run_folder(Subject(config=cfg))["step"] == 40
    saved(cfg, 100)
    assert run_folder(Subject(config=cfg))["finished"] == "", "the export is missing"
    (Path(cfg.run_dir) / "export").mkdir()
    subject = Subject(config=cfg)
    assert run_folder(subject)["finished"] == subject.finished
    assert subject.finished.startswith(f"nothing to do, {cfg.run_dir} is finished (all training steps done)")


def test_another_configuration_is_refused_as_training_refuses_it_and_accepted_by_the_same_key(cfg: RunConfig) -> None:
    saved(cfg, 40)
    cfg.optimizer.lr *= 2
    error = refused(cfg)
    assert isinstance(error, CheckpointError) and "1 difference(s)" in str(error)
    assert "checkpoint.accept=[optimizer.lr]" in str(error)
    cfg.checkpoint.accept = ["optimizer.lr"]
    (accepted,) = run_folder(Subject(config=cfg))["accepted"]
    assert accepted.startswith("optimizer.lr: ")


def test_a_folder_in_use_is_refused_with_its_holder_and_left_as_it_is(cfg: RunConfig) -> None:
    held = take(cfg.run_dir)
    try:
        error = refused(cfg)
        assert isinstance(error, LaunchError) and f"process {os.getpid()} on" in str(error)
        assert held.path.exists()
    finally:
        held.release()


def test_a_folder_that_takes_no_file_is_a_problem_beside_the_others(cfg: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cfg.run_dir = str(tmp_path / "file" / "run")
    subject = Subject(config=cfg)
    run_folder(subject)
    (problem,) = subject.problems
    assert f"run_dir {cfg.run_dir} cannot be written" in str(problem) and "another run_dir" in str(problem)


def test_too_little_room_for_the_next_checkpoint_is_named_before_it_is_needed(cfg: RunConfig, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "12m") as problem:
        if problem:
            pytest.skip(problem)
        cfg.run_dir = str(tmp_path / "disk" / "run")
        saved(cfg, 40)
        fill(tmp_path / "disk", 1 << 20)
        error = refused(cfg)
        assert isinstance(error, CheckpointError) and "the next checkpoint needs" in str(error)
