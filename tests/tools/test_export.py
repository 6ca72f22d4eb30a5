"""From one layout to another and back, with everything that goes along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jp_train.errors import CheckpointError
from jp_train.model.export import RUN_CONFIG
from jp_train.model.sampling import Sampling, read_sampling
from jp_train.model.weight_files import open_weights
from jp_train.tools.export import convert, describe
from tests.tools.test_inference import exported, small_model


def test_tensors_sampling_and_configuration_survive_both_layouts(tmp_path: Path) -> None:
    source = exported(small_model(tmp_path), tmp_path / "run" / "export", sampling=Sampling(cfg_scale=1.5))
    released = convert(source.parent, tmp_path / "released", layout="deepseek", dtype="fp32")
    back = convert(released, tmp_path / "back", dtype="fp32", temperature=0.6)
    before, after = open_weights(source), open_weights(back)
    assert sorted(before.keys()) == sorted(after.keys())
    assert all(torch.equal(before.get(name), after.get(name)) for name in before.keys())  # noqa: SIM118 - no dict
    assert read_sampling(released) == Sampling(cfg_scale=1.5, temperature=1.0)
    assert read_sampling(back) == Sampling(cfg_scale=1.5, temperature=0.6)
    assert (back / RUN_CONFIG).read_text() == (source / RUN_CONFIG).read_text()


def test_an_export_is_described_by_its_files(tmp_path: Path) -> None:
    folder = exported(small_model(tmp_path), tmp_path / "export")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    assert describe(folder) == (
        f"{len(open_weights(folder).keys())} tensors, {size:.1f} MiB; images at cfg scale 5, temperature 1"
    )


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    folder = exported(small_model(tmp_path), tmp_path / "export")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="out is not empty"):
        convert(folder, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
