"""Complete or absent: crashes at every point of a save, damage, retention, refusals. Real files, plain tensors for
an engine's slices."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import jp_train.engine.checkpoint.store as checkpoint_module
from jp_train.config import RunConfig
from jp_train.config.schema import CheckpointConfig, Schedule
from jp_train.engine.checkpoint.files import Checkpoint
from jp_train.engine.checkpoint.identity import accepted_differences, training_identity
from jp_train.engine.checkpoint.store import CheckpointStore, Content
from jp_train.errors import CheckpointError
from jp_train.model.partition_files import Parameter, PartitionReader, rank_file, write_shard

TRAINED = Parameter(name="w", shape=(3, 70_000), trained=True)
FROZEN = Parameter(name="f", shape=(5,), trained=False)


class Crash(BaseException):
    """The process ends here."""


def values(step: int) -> dict[str, torch.Tensor]:
    weights = torch.arange(TRAINED.numel, dtype=torch.float32) + step
    return {
        "master/w": weights,
        "exp_avg/w": weights / 2,
        "exp_avg_sq/w": weights / 4,
        "frozen/f": torch.arange(5).to(torch.bfloat16),
    }


def content(step: int, **changes: Any) -> Content:
    given = {"state": {"step": step}, "identity": {"seed": 7}, "config_text": "seed: 7\n", "about": {}} | changes
    return Content(
        tensors=list(values(step).items()), parameters=[TRAINED, FROZEN], optimizer_step=step, with_frozen=True, **given
    )


def store(run_dir: Path, **policy: Any) -> CheckpointStore:
    return CheckpointStore(run_dir, CheckpointConfig(**policy), dp_rank=0, dp_world_size=1)


def save(made: CheckpointStore, step: int, **changes: Any) -> Path:
    made.begin(step, content(step, **changes))
    return made.settle().path


def loaded(made: CheckpointStore, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}

    def fill(reader: PartitionReader) -> None:
        for name in values(0):
            kind, _, parameter = name.partition("/")
            result[name] = reader.read(kind, parameter, 0, reader.parameters[parameter].numel)

    made.load(checkpoint, fill)
    return result


@pytest.mark.parametrize("background", (True, False))
def test_the_newest_checkpoint_is_found_by_itself_with_its_state(background, tmp_path):
    made = store(tmp_path, background=background)
    assert made.newest() is None
    save(made, 100), save(made, 200)
    (tmp_path / "checkpoints" / "latest").write_text("step_0000100\n")
    result = made.newest()
    assert (result.step, result.state, result.path.name) == (200, {"step": 200}, "step_0000200"), "latest is for people"
    assert result.manifest["dp_world_size"] == 1
    for name, tensor in loaded(made, result).items():
        assert torch.equal(tensor, values(200)[name])


def test_a_rank_file_is_what_safetensors_reads_and_nothing_is_pickled(tmp_path):
    path = save(store(tmp_path), 100)
    read = load_file(path / rank_file(0))
    assert {name: tensor for name, tensor in read.items() if "rng" not in name}.keys() == values(100).keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in values(100).items())
    assert not [file.name for file in path.rglob("*") if file.suffix in (".pt", ".bin", ".pkl")]


def test_a_background_save_holds_the_values_of_its_own_step(tmp_path):
    """Training goes on while the thread writes: what it changes must not reach the file."""
    made, release = store(tmp_path), threading.Event()
    live = values(100)
    plain = checkpoint_module.write_shard
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            checkpoint_module, "write_shard", lambda path, tensors: (release.wait(10), plain(path, tensors))[1]
        )
        made.begin(100, Content(**{**content(100).__dict__, "tensors": list(live.items())}))
        for tensor in live.values():
            tensor.fill_(-1)
        assert made.poll() is None and made.pending_step == 100 and made.newest() is None
        release.set()
        saved = made.settle()
    assert saved.step == 100 and saved.bytes == sum(file["size"] for file in made.newest().manifest["files"].values())
    assert all(torch.equal(tensor, values(100)[name]) for name, tensor in loaded(made, made.newest()).items())


def test_without_host_memory_for_a_copy_training_waits_and_the_checkpoint_is_whole(tmp_path, monkeypatch):
    made = store(tmp_path)

    def none_left(_: Any) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(made._host, "take", none_left)
    save(made, 100)
    assert torch.equal(loaded(made, made.newest())["master/w"], values(100)["master/w"])
    assert made.problems == [
        "rank 0: no host memory for a copy (none left): training waited while step 100 was written"
    ]


@pytest.mark.parametrize(
    "where",
    (
        "before the shards",
        "inside a shard",
        "before the manifest",
        "before the rename",
        "before latest",
        "before deleting old ones",
    ),
)
def test_a_crash_at_any_point_of_a_save_leaves_a_complete_checkpoint(where, tmp_path, monkeypatch):
    made = store(tmp_path, keep_last=1, background=False)
    save(made, 100)

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    def half(path: Path, tensors: Any) -> None:
        write_shard(path, tensors)
        path.write_bytes(path.read_bytes()[:1000])
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        if where == "before the shards":
            patched.setattr(checkpoint_module, "write_shard", crash)
        elif where == "inside a shard":
            patched.setattr(checkpoint_module, "write_shard", half)
        elif where == "before the manifest":
            patched.setattr(CheckpointStore, "_publish", crash)
        elif where == "before the rename":
            patched.setattr(checkpoint_module.os, "rename", crash)
        elif where == "before latest":
            plain = checkpoint_module.write_atomically
            patched.setattr(
                checkpoint_module,
                "write_atomically",
                lambda path, text: crash() if path.name == "latest" else plain(path, text),
            )
        else:
            patched.setattr(checkpoint_module.threading, "Thread", crash)
        save(made, 200)
    renamed = where in ("before latest", "before deleting old ones")
    again = store(tmp_path, keep_last=1)
    result = again.newest()
    assert result.step == (200 if renamed else 100)
    assert torch.equal(loaded(again, result)["master/w"], values(result.step)["master/w"])
    save(again, 200)  # and the next save clears what was left over
    assert again.newest().step == 200
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_0000200"]


def test_a_first_save_that_crashed_counts_as_no_checkpoint(tmp_path, monkeypatch):
    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(checkpoint_module, "write_shard", crash)
        save(store(tmp_path, background=False), 100)
    assert store(tmp_path).newest() is None


def test_retention_keeps_the_last_ones_the_multiples_and_the_best(tmp_path):
    made = store(tmp_path, keep_last=2, keep_every=300, keep_best=True)
    losses = {100: 3.0, 200: 1.5, 300: 2.0, 400: 1.5, 500: 1.7, 600: float("nan"), 700: None}
    for step, loss in losses.items():
        save(made, step, about={"val/total": loss})
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert names == [f"step_{step:07d}" for step in (200, 300, 600, 700)]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_0000200\n"
    save(made, 800, about={"val/total": 1.0})
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_0000800\n" and not (
        tmp_path / "checkpoints" / "step_0000200"
    ).exists()


def test_a_damaged_checkpoint_of_a_later_step_pushes_out_no_whole_one(tmp_path):
    """A run that resumed before it and is stopped before it gets there again."""
    made = store(tmp_path, keep_last=1, keep_every=100, keep_best=True)
    for step, loss in ((100, 2.0), (200, 1.0), (300, 1.0)):
        (save(made, step, about={"val/total": loss}) / "state.json").write_text(
            "{}" if step > 100 else json.dumps({"step": step})
        )
    again = store(tmp_path, keep_last=1, keep_best=True)
    assert again.newest().step == 100
    save(again, 150)
    assert again.newest().step == 150 and (again.folder / "best").read_text() == "step_0000100\n"
    save(again, 200)
    save(again, 300)
    assert sorted(path.name for path in again.folder.iterdir()) == ["best", "latest", "step_0000100", "step_0000300"]


def test_damaged_checkpoints_are_deleted_once_enough_whole_ones_are_as_new(tmp_path):
    made = store(tmp_path, keep_last=2)
    for step in (100, 200, 300):
        path = save(made, step)
    (path / "state.json").write_text("{}")
    again = store(tmp_path, keep_last=2)
    assert again.newest().step == 200 and again.damaged == ["step_0000300"]
    save(again, 250)
    save(again, 310)
    assert "step_0000300" in [path.name for path in again.folder.iterdir()]
    save(again, 410)
    assert sorted(path.name for path in again.folder.iterdir()) == ["latest", "step_0000310", "step_0000410"]
    assert again.damaged == []


def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it_is_complete(tmp_path, monkeypatch):
    """Else a power cut could leave a checkpoint whose steps have no line in metrics.jsonl."""
    done: list[str] = []
    plain_sync, plain_rename = checkpoint_module.os.fsync, checkpoint_module.os.rename

    def sync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        plain_sync(descriptor)

    def rename(before: Path, after: Path) -> None:
        done.append(f"renamed to {Path(after).name}")
        plain_rename(before, after)

    (tmp_path / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr(checkpoint_module.os, "fsync", sync)
    monkeypatch.setattr(checkpoint_module.os, "rename", rename)
    save(store(tmp_path), 100, logs=[tmp_path / "metrics.jsonl", tmp_path / "ledger.jsonl"])
    assert done.index("metrics.jsonl") < done.index("renamed to step_0000100") > done.index(tmp_path.name), done


@pytest.mark.parametrize("fault", ("missing", "short"))
def test_a_file_that_rank_0_does_not_see_whole_is_no_part_of_a_checkpoint(fault, tmp_path, monkeypatch):
    made = store(tmp_path)
    save(made, 100)

    def elsewhere(path: Path, tensors: Any) -> dict[str, Any]:
        described = write_shard(path, tensors)
        path.unlink() if fault == "missing" else path.write_bytes(path.read_bytes()[:-1])
        return described

    monkeypatch.setattr(checkpoint_module, "write_shard", elsewhere)
    with pytest.raises(
        CheckpointError,
        match=r"rank_00000\.safetensors is not visible to rank 0; run_dir must lie on a file system that all",
    ):
        save(made, 200)
    assert made.newest().step == 100


def test_what_cannot_be_deleted_is_told_and_fails_no_save(tmp_path, monkeypatch):
    """On NFS a folder stays while somebody reads one of its files."""
    made, plain = store(tmp_path, keep_last=1), checkpoint_module.shutil.rmtree

    def held(path: Path, **options: Any) -> None:
        if Path(path).name == ".deleting_step_0000100":
            raise OSError(39, "Directory not empty", str(path))
        plain(path, **options)

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", held)
    for step in (100, 200, 300):
        save(made, step)
    assert made.newest().step == 300 and [path.name for path in made.folder.glob("step_*")] == ["step_0000300"]
    assert len(made.problems) == 2 and all(
        "step_0000100 cannot be deleted and takes space" in text for text in made.problems
    )
    monkeypatch.undo()
    save(made, 400)
    assert sorted(path.name for path in made.folder.iterdir()) == ["latest", "step_0000400"]


def changed(**changes: Any) -> dict[str, Any]:
    cfg = RunConfig()
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node: Any = cfg
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, leaf, value)
    return training_identity(cfg)


def compared(now: dict[str, Any], accept: tuple[str, ...] = ()) -> list[str]:
    return accepted_differences(Path("checkpoints/step_0000001"), changed(), now, accept)


def test_another_configuration_is_refused_with_every_difference_and_what_to_pass():
    assert (
        compared(changed(run_dir="elsewhere", data__workers=9, stage__training_steps=5, engine__micro_batch_rows=4))
        == []
    )
    other = changed(seed=1, data__seq_len=128, optimizer__lr=0.5)
    with pytest.raises(CheckpointError) as error:
        compared(other, ("seed",))
    for line in ("2 difference(s)", "data.seq_len: 4096 -> 128", "optimizer.lr: 0.001 -> 0.5"):
        assert line in str(error.value)
    assert "seed: 0" not in str(error.value)
    passed = re.search(r"checkpoint\.accept=\[(.*?)\]", str(error.value))[1].split(",")
    assert compared(other, tuple(passed)) == ["data.seq_len: 4096 -> 128", "optimizer.lr: 0.001 -> 0.5", "seed: 0 -> 1"]
    assert len(compared(other, ("data", "optimizer", "seed"))) == 3, "a section accepts all its keys"


@pytest.mark.parametrize("key", ("model__language__layers", "stage__trainable"))
def test_what_decides_which_tensors_there_are_cannot_be_accepted(key):
    value = 3 if "layers" in key else ["aligner"]
    dotted = key.replace("__", ".")
    with pytest.raises(CheckpointError, match=re.escape(dotted) + r".*cannot change within a run.*model\.init_from"):
        compared(changed(**{key: value}), (dotted,))


def test_the_length_of_a_cosine_schedule_may_not_change():
    assert changed(stage__training_steps=5) == changed()
    cosine = {"optimizer__schedule": Schedule.cosine}
    assert changed(stage__training_steps=5, **cosine) != changed(**cosine)
    with pytest.raises(CheckpointError, match="shape depends on stage.training_steps; with a constant rate it may"):
        compared(changed(stage__training_steps=5, **cosine))


def test_the_manifest_lists_everything_but_itself(tmp_path):
    path = save(store(tmp_path), 1)
    listed = set(json.loads((path / "manifest.json").read_text())["files"])
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert listed == there - {"manifest.json"}


# -- partition files -------------------------------------------------------------------------------
