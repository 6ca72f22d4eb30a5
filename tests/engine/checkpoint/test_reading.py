"""Which checkpoint a resume finds, and what it says about those that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.engine.checkpoint.files import RankGroup
from jp_train.engine.checkpoint.reading import CheckpointReader
from jp_train.errors import CheckpointError
from jp_train.model.partition_files import rank_file
from tests.engine.checkpoint.test_store import save, store


def reader(run_dir: Path) -> CheckpointReader:
    return CheckpointReader(run_dir / "checkpoints", RankGroup(0, 1))


def test_a_mark_of_damage_is_left_for_the_next_attempt_and_goes_when_the_files_are_restored(tmp_path):
    made = store(tmp_path)
    save(made, 100)
    state = save(made, 200) / "state.json"
    whole = state.read_bytes()
    state.write_text("{}")
    assert reader(tmp_path).newest().step == 100
    assert "state.json" in (state.parent / "DAMAGED").read_text()
    state.write_bytes(whole)
    assert reader(tmp_path).newest().step == 200 and not (state.parent / "DAMAGED").exists()


@pytest.mark.parametrize(
    "damage",
    ("missing file", "short file", "flipped byte", "flipped byte in a large file", "no manifest", "bad manifest"),
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path):
    made = store(tmp_path)
    save(made, 100)
    newest = save(made, 200)
    large = newest / rank_file(0)
    if damage == "missing file":
        large.unlink()
    elif damage == "short file":
        large.write_bytes(large.read_bytes()[:-1])
    elif damage == "flipped byte":
        (newest / "state.json").write_text('{"step": 201}')
    elif damage == "flipped byte in a large file":
        large.write_bytes(large.read_bytes()[:-1] + b"\x01")
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    messages: list[str] = []
    assert reader(tmp_path).newest(on_damage=messages.append).step == 100
    assert len(messages) == 1 and "step_0000200" in messages[0]


def test_only_damaged_checkpoints_stop_the_run_instead_of_starting_over(tmp_path):
    made = store(tmp_path)
    (save(made, 100) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: .*step_0000100: manifest.json is missing"):
        reader(tmp_path).newest()


def test_a_checkpoint_of_another_format_is_refused_with_the_way_round_it(tmp_path):
    made = store(tmp_path)
    save(made, 100)
    manifest = save(made, 200) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with pytest.raises(
        CheckpointError, match=r"step_0000200 has format 1, this jp_train reads format 2.*model\.init_from"
    ):
        reader(tmp_path).newest()
