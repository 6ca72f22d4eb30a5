"""Complete or absent: crashes at every point of a save, damage, retention, refusals. The engine is a stand-in that writes files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jp_train.engine.checkpoint as checkpoint_module
from jp_train.config import RunConfig
from jp_train.config.schema import CheckpointConfig, Schedule
from jp_train.engine.checkpoint import CheckpointStore, refuse_other_configuration, refuse_other_world
from jp_train.engine.identity import identity
from jp_train.errors import CheckpointError


class Crash(BaseException):
    """The process ends here."""


class Engine:
    """Writes what DeepSpeed would: two files for rank 0, one of them larger than SMALL_FILE."""

    def __init__(self, crash: str = "") -> None:
        self.crash = crash
        self.loaded: Path | None = None

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not save_latest, "DeepSpeed's latest is written before the other ranks are done"
        if self.crash == "before":
            raise Crash
        where = Path(folder) / tag
        where.mkdir()
        (where / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"model")
        if self.crash == "during":
            (where / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"hal")
            raise Crash
        (where / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(bytes(range(256)) * 5000)

    def load_checkpoint(self, folder: str, *, tag: str, load_module_strict: bool, load_lr_scheduler_states: bool) -> tuple[Any, dict]:
        self.loaded = Path(folder) / tag
        return self.loaded, {}


def store(run_dir: Path, **policy: Any) -> CheckpointStore:
    return CheckpointStore(run_dir, CheckpointConfig(**policy), dp_rank=0, dp_world_size=1)


def save(made: CheckpointStore, step: int, engine: Engine | None = None) -> Path:
    return made.save(
        engine or Engine(), step=step, state={"step": step}, identity={"seed": 7}, config_text="seed: 7\n", about={}, with_frozen=True
    )


def test_the_newest_checkpoint_is_found_by_itself_with_its_state(tmp_path):
    made = store(tmp_path)
    assert made.newest() is None
    save(made, 100), save(made, 200)
    (tmp_path / "checkpoints" / "latest").write_text("step_0000100\n")
    found = made.newest()
    assert (found.step, found.state, found.path.name) == (200, {"step": 200}, "step_0000200"), "latest is for people"
    assert found.manifest["dp_world_size"] == 1 and "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt" in found.manifest["files"]
    engine = Engine()
    made.load(engine, found)
    assert engine.loaded == found.path / "deepspeed"


@pytest.mark.parametrize(
    "where", ("before", "during", "after the shards", "before the rename", "before latest", "before deleting old ones")
)
def test_a_crash_at_any_point_of_a_save_leaves_a_complete_checkpoint(where, tmp_path, monkeypatch):
    made = store(tmp_path, keep_last=1)
    save(made, 100)

    def crash(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        if where == "after the shards":
            patched.setattr(CheckpointStore, "_describe_all", crash)
        elif where == "before the rename":
            patched.setattr(checkpoint_module.os, "rename", crash)
        elif where == "before latest":
            plain = checkpoint_module.write_durably
            patched.setattr(checkpoint_module, "write_durably", lambda path, text: crash() if path.name == "latest" else plain(path, text))
        elif where == "before deleting old ones":
            patched.setattr(CheckpointStore, "_retire", crash)
        save(made, 200, Engine(where))
    renamed = where in ("before latest", "before deleting old ones")
    found = store(tmp_path).newest()
    assert found.step == (200 if renamed else 100)
    save(made, 200)  # and the next save clears what was left over
    assert made.newest().step == 200
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_0000200"]


@pytest.mark.parametrize(
    "damage", ("missing file", "short file", "flipped byte", "flipped byte in a large file", "no manifest", "bad manifest")
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path):
    made = store(tmp_path)
    save(made, 100)
    newest = save(made, 200)
    large = newest / "deepspeed" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    if damage == "missing file":
        large.unlink()
    elif damage == "short file":
        large.write_bytes(large.read_bytes()[:-1])
    elif damage == "flipped byte":
        (newest / "state.json").write_text('{"step": 201}')
    elif damage == "flipped byte in a large file":
        large.write_bytes(b"\x01" + large.read_bytes()[1:])
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    told: list[str] = []
    assert made.newest(on_damage=told.append).step == 100
    assert len(told) == 1 and "step_0000200" in told[0]


def test_only_damaged_checkpoints_stop_the_run_instead_of_starting_over(tmp_path):
    made = store(tmp_path)
    (save(made, 100) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: .*step_0000100: manifest.json is missing"):
        made.newest()


def test_a_first_save_that_crashed_counts_as_no_checkpoint(tmp_path):
    made = store(tmp_path)
    with pytest.raises(Crash):
        save(made, 100, Engine("during"))
    assert made.newest() is None


def test_retention_keeps_the_last_ones_and_the_multiples(tmp_path):
    made = store(tmp_path, keep_last=2, keep_every=300)
    for step in range(100, 800, 100):
        save(made, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert names == [f"step_{step:07d}" for step in (300, 600, 700)]


def test_a_failing_disk_is_a_checkpoint_error_and_harms_nothing(tmp_path, monkeypatch):
    made = store(tmp_path)
    save(made, 100)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "_fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save(made, 200)
    assert made.newest().step == 100


def test_random_states_come_back(tmp_path):
    made = store(tmp_path)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    save(made, 100)
    expected = [random.random(), np.random.rand(), float(torch.rand(1))]
    made.load(Engine(), made.newest())
    assert [random.random(), np.random.rand(), float(torch.rand(1))] == expected


def changed(**changes: Any) -> dict[str, Any]:
    cfg = RunConfig()
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node: Any = cfg
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, leaf, value)
    return identity(cfg)


def test_another_configuration_is_refused_with_every_difference(tmp_path):
    made = store(tmp_path)
    made.save(Engine(), step=1, state={}, identity=changed(), config_text="", about={}, with_frozen=True)
    found = made.newest()
    refuse_other_configuration(found, changed(run_dir="elsewhere", data__workers=9, stage__training_steps=5, engine__micro_batch_rows=4))
    with pytest.raises(CheckpointError) as error:
        refuse_other_configuration(found, changed(seed=1, data__seq_len=128, optimizer__lr=0.5))
    for line in ("3 difference(s)", "seed: 0 -> 1", "data.seq_len: 4096 -> 128", "optimizer.lr: 0.001 -> 0.5"):
        assert line in str(error.value)


def test_the_length_of_a_cosine_schedule_may_not_change():
    assert changed(stage__training_steps=5) == changed()
    cosine = {"optimizer__schedule": Schedule.cosine}
    assert changed(stage__training_steps=5, **cosine) != changed(**cosine)


def test_another_number_of_ranks_is_refused(tmp_path):
    made = store(tmp_path)
    save(made, 1)
    with pytest.raises(CheckpointError, match=r"written by 1 rank\(s\) and this run has 4"):
        refuse_other_world(made.newest(), 4)


def test_the_manifest_lists_everything_but_itself(tmp_path):
    path = save(store(tmp_path), 1)
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert listed == there - {"manifest.json"}
    shutil.rmtree(path)
