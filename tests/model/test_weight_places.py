"""Where weights lie: told from names alone, as `jp-train launch` asks before it starts anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.errors import CheckpointError
from jp_train.model.weight_places import INDEX_FILE, export_folder, files_of, whole_model


def test_the_files_of_a_folder_are_those_of_its_index_else_all_of_one_format(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "c.bin"):
        (tmp_path / name).touch()
    assert [file.name for file in files_of(tmp_path)] == ["a.safetensors", "b.safetensors"]
    assert files_of(tmp_path / "c.bin") == [tmp_path / "c.bin"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "b.safetensors"}}))
    assert [file.name for file in files_of(tmp_path)] == ["b.safetensors"]
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="lists 2 files but gone.safetensors missing"):
        files_of(tmp_path)


def test_what_is_absent_is_told_apart_from_what_is_wrong_and_named_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="relative paths follow the working directory") as caught:
        files_of("weights")
    assert caught.value.absent == str(tmp_path / "weights") in str(caught.value)
    Path("weights").mkdir()
    with pytest.raises(CheckpointError, match=r"weights holds no \*.safetensors and no \*.bin file$") as caught:
        files_of("weights")
    assert caught.value.absent == ""


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_run_that_ended_before_its_first_checkpoint_is_called_so(tmp_path: Path, with_folder: bool) -> None:
    (tmp_path / "events.jsonl").touch()
    if with_folder:
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=f"saved no checkpoint .`jp-train status {tmp_path}` says why"):
        whole_model(tmp_path)


def test_a_run_folder_leads_to_its_export_and_a_folder_of_runs_names_one(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "stage1"
    (run / "checkpoints" / "step_0000010").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="is a run folder without export/.*jp-train export"):
        whole_model(run)
    (run / "checkpoints" / "step_0000010" / INDEX_FILE).touch()
    assert whole_model(run / "checkpoints" / "step_0000010") == run / "checkpoints" / "step_0000010"
    (run / "export").mkdir()
    assert whole_model(run) == export_folder(run) == run / "export"
    with pytest.raises(CheckpointError, match=f"did you mean {run}"):
        files_of(tmp_path / "runs")
