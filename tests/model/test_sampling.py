"""What generation_config.json says about images, and what a missing or broken one means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.errors import CheckpointError
from jp_train.model.sampling import GENERATION_FILE, Sampling, read_sampling, write_sampling


def test_without_a_file_or_a_key_the_paper_s_values_hold(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == Sampling(cfg_scale=5.0, temperature=1.0)
    (tmp_path / GENERATION_FILE).write_text('{"guidance_scale": null, "eos_token_id": 1}')
    assert read_sampling(tmp_path) == Sampling(cfg_scale=5.0, temperature=1.0)


def test_other_values_of_an_export_change_nothing_else_in_its_file(tmp_path: Path) -> None:
    before = {"eos_token_id": 1, "guidance_scale": 5, "generation_kwargs": {"boi_token_id": 7}}
    (tmp_path / GENERATION_FILE).write_text(json.dumps(before))
    write_sampling(tmp_path, Sampling(cfg_scale=2.0, temperature=0.6))
    assert read_sampling(tmp_path) == Sampling(cfg_scale=2.0, temperature=0.6)
    assert json.loads((tmp_path / GENERATION_FILE).read_text()) == {
        "eos_token_id": 1,
        "guidance_scale": 2.0,
        "generation_kwargs": {"boi_token_id": 7, "temperature": 0.6},
    }


@pytest.mark.parametrize("text", ["{", '{"guidance_scale": "much"}', "[]"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / GENERATION_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{GENERATION_FILE} cannot be read"):
        read_sampling(tmp_path)
