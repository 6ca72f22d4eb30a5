"""A file system that is full, fills up during a write, is read-only, slow, or loses the folder: the last good
checkpoint stays loadable."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import jp_train.engine.checkpoint.store as checkpoint_module
from jp_train.config import RunConfig
from jp_train.config.schema import SaveErrorAction
from jp_train.engine.checkpoint.disk import folder_bytes, free_bytes, gib, require_space, space_advice, with_advice
from jp_train.engine.checkpoint.saver import Saver
from jp_train.engine.checkpoint.store import CheckpointStore
from jp_train.errors import CheckpointError
from jp_train.model.partition_files import write_shard
from jp_train.run.sinks import Events, MetricsFile, StatusFile
from tests.engine.checkpoint.test_store import content, loaded, save, store, values
from tests.small_disk import fill, mounted


def folder_with_checkpoints(folder: Path, **sizes: int) -> Path:
    for name, size in sizes.items():
        (folder / name).mkdir()
        (folder / name / "rank_00000.safetensors").write_bytes(b"x" * size)
    return folder


def test_advice_names_damaged_checkpoints_first_and_keeps_the_newest_whole_one(tmp_path):
    folder = folder_with_checkpoints(tmp_path, step_0000001=1 << 20, step_0000002=2 << 20, step_0000003=3 << 20)
    assert space_advice(folder) == (
        "Free space: delete old checkpoints, but not the newest (step_0000003): step_0000001 (1.0 MiB), "
        "step_0000002 (2.0 MiB); then lower checkpoint.keep_last"
    )
    assert space_advice(folder, 5 << 20, damaged=("step_0000003",)) == (
        "Free at least 5.0 MiB: delete what is damaged: step_0000003 (3.0 MiB); then old checkpoints, but not the "
        "newest whole one (step_0000002): step_0000001 (1.0 MiB); then lower checkpoint.keep_last"
    )
    assert folder_bytes(folder) == 6 << 20 and [gib(1 << 20), gib(3 << 30)] == ["1.0 MiB", "3.00 GiB"]


def test_each_kind_of_failed_write_has_its_advice(tmp_path):
    def advice(number: int) -> str:
        return with_advice(OSError(number, os.strerror(number)), tmp_path)

    assert "Free space on that file system" in advice(errno.ENOSPC) and "Free space" in advice(errno.EDQUOT)
    assert f"Make {tmp_path} writable again" in advice(errno.EROFS)
    assert "was deleted or moved" in advice(errno.ENOENT)
    assert advice(errno.EIO) == str(OSError(errno.EIO, os.strerror(errno.EIO)))


def test_only_what_exceeds_the_free_space_is_refused(tmp_path):
    require_space(tmp_path, 1000, "checkpoint step_0000001")
    with pytest.raises(CheckpointError, match=r"checkpoint step_0000001 needs .* GiB, and only .* are free"):
        require_space(tmp_path, 2 * free_bytes(tmp_path), "checkpoint step_0000001")


@pytest.fixture
def small(tmp_path):
    """A run folder on a real file system of 9 MiB (a checkpoint of these tests has 2.4)."""
    with mounted(tmp_path / "small", "9m") as problem:
        if problem:
            pytest.skip(f"mounting a small file system needs root: {problem}")
        yield tmp_path / "small"


def assert_untouched(made: CheckpointStore, step: int) -> None:
    result = made.newest()
    assert result.step == step and result.path.name in [path.name for path in made.folder.iterdir()]
    assert torch.equal(loaded(made, result)["master/w"], values(step)["master/w"])
    assert not list(made.folder.glob(".saving_*")), (
        "what could not be completed is removed, so that its space is free again"
    )


def test_too_little_space_is_said_before_anything_is_written(small):
    made = store(small)
    save(made, 100)
    fill(small, 1_500_000)
    with pytest.raises(CheckpointError) as error:
        made.begin(200, content(200))
    text = str(error.value)
    for part in (
        "step_0000200 needs 2.4 MiB",
        "only 1.4 MiB are free at",
        str(made.folder),
        "step_0000100 (2.4 MiB) is the only complete checkpoint: keep it",
    ):
        assert part in text, text
    assert_untouched(made, 100)


def test_the_advice_names_old_checkpoints_but_not_the_newest(small):
    made = store(small, keep_last=5)
    save(made, 100), save(made, 200)
    with pytest.raises(
        CheckpointError, match=r"delete old checkpoints, but not the newest \(step_0000200\): step_0000100 \(2\.4 MiB\)"
    ):
        fill(small, 0), made.begin(300, content(300))


def test_checkpoints_found_damaged_make_room_for_a_save_also_when_another_attempt_found_them(small):
    made = store(small, keep_last=3)
    save(made, 100)
    (save(made, 200) / "state.json").write_text("{}")
    again = store(small, keep_last=3)
    assert again.newest().step == 100 and again.damaged == ["step_0000200"]
    save(again, 250)
    later = store(small, keep_last=3)
    assert later.newest().step == 250 and later.damaged == ["step_0000200"]
    save(later, 300)  # the disk has room for three
    assert sorted(path.name for path in later.folder.glob("step_*")) == ["step_0000100", "step_0000250", "step_0000300"]
    assert later.damaged == []
    assert_untouched(later, 300)


def test_where_no_damaged_checkpoint_is_left_to_delete_the_save_is_refused_and_the_whole_one_stays(small):
    made = store(small)
    save(made, 100)
    (save(made, 200) / "state.json").write_text("{}")
    again = store(small)
    assert again.newest().step == 100
    fill(small, 0)
    with pytest.raises(
        CheckpointError, match=r"Free .*step_0000100 \(2\.4 MiB\) is the only complete checkpoint: keep it"
    ):
        again.begin(150, content(150))
    assert_untouched(again, 100)


def test_a_disk_that_fills_up_during_the_write_leaves_the_checkpoint_before(small, monkeypatch):
    made = store(small)
    save(made, 100)

    def with_others_writing(path: Path, tensors: Any) -> dict[str, Any]:
        fill(small, 1_000_000)  # somebody else takes the space after it was checked
        return write_shard(path, tensors)

    monkeypatch.setattr(checkpoint_module, "write_shard", with_others_writing)
    made.begin(200, content(200))
    with pytest.raises(CheckpointError, match=r"rank 0: .*No space left on device.*Free space"):
        made.settle()
    (small / "filler").unlink()
    assert_untouched(made, 100)
    monkeypatch.undo()
    save(made, 200)
    assert_untouched(made, 200)


def test_a_read_only_file_system_is_named(small):
    made = store(small)
    save(made, 100)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*Make .*checkpoints writable again"):
        made.begin(200, content(200))
    assert_untouched(made, 100)
    subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
    save(made, 200)


def test_a_run_folder_that_is_deleted_during_a_save_is_an_error_and_the_next_save_makes_it_anew(tmp_path, monkeypatch):
    made = store(tmp_path / "run")
    monkeypatch.setattr(
        checkpoint_module,
        "write_shard",
        lambda path, tensors: (shutil.rmtree(tmp_path / "run"), write_shard(path, tensors))[1],
    )
    made.begin(100, content(100))
    with pytest.raises(CheckpointError, match="was deleted or moved while the run wrote to it"):
        made.settle()
    monkeypatch.undo()
    save(made, 200)
    assert_untouched(made, 200)


def test_a_slow_disk_holds_up_neither_training_nor_the_checkpoint_before(tmp_path, monkeypatch):
    made, release = store(tmp_path), threading.Event()
    save(made, 100)
    monkeypatch.setattr(
        checkpoint_module, "write_shard", lambda path, tensors: (release.wait(20), write_shard(path, tensors))[1]
    )
    made.begin(200, content(200))
    for _ in range(3):
        assert made.poll() is None
    assert store(tmp_path).newest().step == 100
    release.set()
    assert made.settle().step == 200
    assert_untouched(made, 200)


# -- the policy ------------------------------------------------------------------------------------


class Told:
    """Collects what a RunLog would write."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.failed = 0
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def event(self, name: str, step: int, **details: Any) -> None:
        self.events.append((name, step))

    def saved(self, step: int) -> None:
        pass

    def save_failed(self, total: int) -> None:
        self.failed = total


class Contents(Saver):
    """A Saver of plain tensors instead of an engine's."""

    def __init__(self, cfg: RunConfig, told: Told) -> None:
        made = CheckpointStore(Path(cfg.run_dir), cfg.checkpoint, dp_rank=0, dp_world_size=1)
        super().__init__(cfg, made, Holder(), told, saved_step=None)

    def _content(self, state: dict[str, Any], about: dict[str, Any]):
        return content(state["step"])


class Holder:
    class deepspeed:  # noqa: N801 - the engine's attribute
        optimizer = None


def saver(run_dir: Path, **policy: Any) -> tuple[Contents, Told]:
    cfg, messages = RunConfig(run_dir=str(run_dir)), Told()
    cfg.checkpoint.every_steps = 10
    for key, value in policy.items():
        setattr(cfg.checkpoint, key, value)
    return Contents(cfg, messages), messages


def test_continue_tries_again_at_the_next_interval_and_forgets_failures_after_a_success(small):
    made, messages = saver(small, on_error=SaveErrorAction["continue"], max_failed_saves=3)
    filler = fill(small, 100_000)
    for step in (10, 20):
        made.save(step, {"step": step}, {}, final=False)
    filler.unlink()
    made.save(30, {"step": 30}, {}, final=False)
    made.settle(30, final=False)
    fill(small, 0)
    for step in (40, 50):
        made.save(step, {"step": step}, {}, final=False)
    with pytest.raises(CheckpointError, match=r"3 failed saves in a row.*resume from it with the same command"):
        made.save(60, {"step": 60}, {}, final=False)
    assert messages.events == [
        *[("save_failed", step) for step in (10, 20)],
        ("save", 30),
        *[("save_failed", step) for step in (40, 50, 60)],
    ]
    assert messages.failed == 5 and "trying again after step 20" in messages.said[0]


@pytest.mark.parametrize(("policy", "final"), (("stop", False), ("continue", True)))
def test_stop_and_every_final_save_end_the_run(policy, final, small):
    made, messages = saver(small, on_error=SaveErrorAction[policy])
    fill(small, 100_000)
    with pytest.raises(CheckpointError) as error:
        made.save(10, {"step": 10}, {}, final=final)
    assert error.value.exit_code == 4 and messages.events == [("save_failed", 10)]


def test_a_final_save_is_made_although_the_one_before_failed(small, monkeypatch):
    made, messages = saver(small, on_error=SaveErrorAction.stop)
    monkeypatch.setattr(
        checkpoint_module, "write_shard", lambda path, tensors: os.open("/nonexistent/folder", os.O_RDONLY)
    )
    made.save(10, {"step": 10}, {}, final=False)  # fails in its thread
    for thread in threading.enumerate():
        if thread.name == "save-10":
            thread.join()
    monkeypatch.undo()
    made.save(13, {"step": 13}, {}, final=True)
    assert messages.events == [("save_failed", 13), ("save", 13)] and made.saved_step == 13


def test_a_step_is_saved_once(tmp_path):
    made, messages = saver(tmp_path)
    made.save(10, {"step": 10}, {}, final=False)
    made.save(10, {"step": 10}, {}, final=True)
    assert (
        messages.events == [("save", 10)]
        and made.values() == {"checkpoint/stall_s": made.stall_s}
        and made.values() == {}
    )


def test_metrics_and_events_wait_for_room_and_come_whole_and_in_order(small):
    """A full disk must not end a run through its log: `checkpoint.on_error` decides."""
    metrics, messages, state = (
        MetricsFile(small / "metrics.jsonl", None),
        Events(small / "events.jsonl"),
        StatusFile(small / "status.json"),
    )
    for step in range(1, 301):
        if step == 5:
            filler = fill(small, 0)
        if step == 280:
            filler.unlink()
        metrics.log(step, {"loss/total": 1 / step})
        messages.write("save_failed", step, reason="x" * 100)
        state.update(step=step)
        if step == 279:
            assert len((small / "metrics.jsonl").read_text()) < 5000, "the disk is full"
    metrics.close()
    for name in ("metrics.jsonl", "events.jsonl"):
        assert [json.loads(line)["step"] for line in (small / name).read_text().splitlines()] == list(range(1, 301))
    assert json.loads((small / "status.json").read_text())["step"] == 300
