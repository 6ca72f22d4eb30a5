"""What one rank of tests/engine/test_elastic.py does. Not a test module."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

import jp_train.engine.checkpoint.finding as finding
import jp_train.engine.checkpoint.store as checkpoints
import jp_train.train.session as session
import jp_train.train.trainer as training
from jp_train.config import RunConfig
from jp_train.config.schema import CheckpointConfig, SaveErrorAction
from jp_train.engine.checkpoint import partitions
from jp_train.engine.init import gather_for_reading, init_process_group
from jp_train.errors import CheckpointError
from jp_train.model.partition_files import PartitionReader
from tests.distributed import run_scenarios, serve
from tests.engine import worker
from tests.engine.checkpoint.test_store import content


def train(free_space_at: int | None = None, filler: str = "", compare: bool = False, **changes: Any) -> dict:
    """`worker.train`. `compare`: what partitions.py reads and restores, with DeepSpeed's own view of it (counts and
    names that differ).

    free_space_at: before that step, remove the file `filler`.
    """
    plain_prepare, plain_next = session.prepare, training.Trainer.next_step
    made: dict[str, Any] = {}

    def prepare(*args):
        parts, checkpoint = plain_prepare(*args), args[4]
        made["parts"] = parts
        if checkpoint is not None and compare:
            made["restored"] = restored(parts.engine.deepspeed, PartitionReader(checkpoint.path))
        return parts

    def next_step(self, steps):
        if self.state.step + 1 == free_space_at:
            Path(filler).unlink()
        return plain_next(self, steps)

    if "checkpoint.on_error" in changes:
        changes["checkpoint.on_error"] = SaveErrorAction(changes["checkpoint.on_error"])
    session.prepare, training.Trainer.next_step = prepare, next_step
    try:
        result = worker.train(**changes)
        if compare:
            result |= {"held": held(made["parts"].engine.deepspeed), "restored": made.get("restored")}
        return result
    finally:
        session.prepare, training.Trainer.next_step = plain_prepare, plain_next


def held(engine: Any) -> dict[str, Any]:
    """All ranks' slices put together, against the whole tensors that DeepSpeed gathers."""
    own = [(name, tensor.clone()) for name, tensor in partitions.local_slices(engine, with_frozen=True)]
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    pieces: dict[str, list[torch.Tensor]] = {}
    for rank in ranks:
        for name, tensor in rank:
            pieces.setdefault(name, []).append(tensor)
    differ, compared, padded = [], 0, 0
    for name, parameter in engine.module.named_parameters():
        for kind, whole in views(parameter).items():
            compared += 1
            padded += parameter.ds_numel % len(ranks) > 0
            if not torch.equal(torch.cat(pieces.pop(f"{kind}/{name}")), whole.flatten()):
                differ.append(f"{kind}/{name}")
    return {"compared": compared, "padded": padded, "differ": differ, "left over": list(pieces)}


def restored(engine: Any, reader: PartitionReader) -> dict[str, Any]:
    """A freshly restored engine against the files: master, moments, working weights, and small ones that stay
    gathered."""
    differ, compared = [], 0
    persistent = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.ds_persist]
    for name, parameter in persistent:  # first: a look through GatheredParameters would leave them partitioned
        if (parameter.requires_grad or reader.with_frozen) and not torch.equal(
            parameter.data, reader.whole(name).to(parameter.dtype)
        ):
            differ.append(f"persistent {name}")
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad and not reader.with_frozen:
            continue
        for kind, whole in views(parameter).items():
            compared += 1
            if not torch.equal(reader.read(kind, name, 0, parameter.ds_numel), whole.flatten()):
                differ.append(f"{kind}/{name}")
        with gather_for_reading([parameter]):
            if not torch.equal(parameter.data, reader.whole(name).to(parameter.dtype)):
                differ.append(f"working {name}")
    if persistent:
        persistent[0][1].all_gather([parameter for _, parameter in persistent])
    return {
        "compared": compared,
        "persistent": len(persistent),
        "differ": differ,
        "step": partitions.optimizer_step(engine),
    }


def views(parameter: Any) -> dict[str, torch.Tensor]:
    if parameter.requires_grad:
        moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in partitions.MOMENTS}
        return {"master": safe_get_full_fp32_param(parameter), **moments}
    with gather_for_reading([parameter]):
        return {"frozen": parameter.detach().clone()}


def one_rank_fails(folder: str) -> dict[str, Any]:
    """Saves and a look for the newest checkpoint with rank 1 in trouble: what each rank is told, and whether the
    ranks still fit together."""
    ranks = init_process_group(RunConfig())
    last = ranks.dp_rank == 1
    store = checkpoints.CheckpointStore(
        Path(folder), CheckpointConfig(), dp_rank=ranks.dp_rank, dp_world_size=ranks.dp_world_size
    )
    plain_write, plain_describe, release, told = (
        checkpoints.write_shard,
        finding.size_and_checksum,
        threading.Event(),
        {},
    )

    def save(step: int) -> int:
        store.begin(step, content(step))
        return store.settle().step

    def ask(what: str, action: Callable[[], Any]) -> None:
        try:
            told[what] = action()
        except CheckpointError as error:
            told[what] = str(error)

    def full(path: Path, tensors: Any) -> dict[str, Any]:
        if last:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain_write(path, tensors)

    def slow(path: Path, tensors: Any) -> dict[str, Any]:
        assert not last or release.wait(30)
        return plain_write(path, tensors)

    def unseen(file: Path, *, crc: bool = False) -> dict[str, Any]:
        if last:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))
        return plain_describe(file, crc=crc)

    def no_memory(tensors: Any) -> Any:
        if last:
            raise MemoryError("none left")
        return [(name, tensor.clone()) for name, tensor in tensors]

    ask("whole", lambda: save(100))
    with patch.object(checkpoints, "write_shard", full):
        ask("full", lambda: save(200))
    torch.distributed.barrier()  # rank 0 removes what was written
    ask("left", lambda: sorted(path.name for path in store.folder.iterdir()))
    with patch.object(checkpoints, "write_shard", slow):
        store.begin(300, content(300))
        ask("slow", store.poll)
        release.set()
        ask("slow, later", lambda: store.settle().step)
    with patch.object(store._host, "take", no_memory):
        ask("no memory", lambda: save(400))
    told["problems"] = list(store.problems)
    with patch.object(finding, "size_and_checksum", unseen):
        ask("unseen", store.newest)
    torch.distributed.barrier()
    if not last:
        damaged = store.folder / "step_0000400" / "rank_00001.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    torch.distributed.barrier()
    ask("damaged", lambda: store.newest().step)
    return told


SCENARIOS = {"train": train, "one_rank_fails": one_rank_fails}


def run(folder: Path, scenarios: list[dict[str, Any]]) -> int:
    session.leave_process_group = lambda code: None  # the next scenario needs it
    return run_scenarios(SCENARIOS, folder, scenarios)


if __name__ == "__main__":
    serve(run)
