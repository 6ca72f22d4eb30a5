"""The frame of one rank's process (whole runs: tests/engine/test_distributed_runs.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from jp_train.config import RunConfig
from jp_train.errors import ConfigError, LaunchError
from jp_train.run.lock import take
from jp_train.train.session import lock_run_folder


def test_a_run_folder_that_cannot_be_made_or_is_in_use_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir .*file/run cannot be written.*choose another run_dir"):
        lock_run_folder(RunConfig(run_dir=str(tmp_path / "file" / "run")))
    held = take(tmp_path / "run")
    try:
        with pytest.raises(LaunchError, match=r"run_dir .* is in use"):
            lock_run_folder(RunConfig(run_dir=str(tmp_path / "run")))
    finally:
        held.release()
