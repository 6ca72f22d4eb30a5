"""Folders of weights that are not what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from jp_train.errors import CheckpointError
from jp_train.model.weight_files import open_weights


def test_a_folder_of_runs_names_the_run_that_was_meant(tmp_path: Path) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        (tmp_path / "smoke" / stage / "export").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"did you mean \S+/smoke/stage3\?"):
        open_weights(tmp_path / "smoke")
    with pytest.raises(CheckpointError, match=r"no \*\.bin file$"):
        open_weights(tmp_path / "smoke" / "stage1" / "export")
