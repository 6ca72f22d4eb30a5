"""What one rank of tests/engine/test_elastic.py does. Not a test module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import worker
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from distributed import run_scenarios, serve

import jp_train.train as training
from jp_train.config.schema import SaveErrorAction
from jp_train.engine import partitions
from jp_train.engine.init import gather_for_reading
from jp_train.model.partition_files import PartitionReader


def train(free_space_at: int | None = None, filler: str = "", compare: bool = False, **changes: Any) -> dict:
    """`worker.train`. `compare`: what partitions.py reads and restores, with DeepSpeed's own view of it (counts and names that differ).

    free_space_at: before that step, remove the file `filler`.
    """
    plain_prepare, plain_next = training.prepare, training.Trainer.next_step
    made: dict[str, Any] = {}

    def prepare(*args):
        trainer, checkpoint = plain_prepare(*args), args[4]
        made["trainer"] = trainer
        if checkpoint is not None and compare:
            made["restored"] = restored(trainer.engine.deepspeed, PartitionReader(checkpoint.path))
        return trainer

    def next_step(self, steps):
        if self.state.step + 1 == free_space_at:
            Path(filler).unlink()
        return plain_next(self, steps)

    if "checkpoint.on_error" in changes:
        changes["checkpoint.on_error"] = SaveErrorAction(changes["checkpoint.on_error"])
    training.prepare, training.Trainer.next_step = prepare, next_step
    try:
        result = worker.train(**changes)
        if compare:
            result |= {"held": held(made["trainer"].engine.deepspeed), "restored": made.get("restored")}
        return result
    finally:
        training.prepare, training.Trainer.next_step = plain_prepare, plain_next


def held(engine: Any) -> dict[str, Any]:
    """All ranks' slices put together, against the whole tensors that DeepSpeed gathers."""
    own = [(name, tensor.clone()) for name, tensor in partitions.held(engine, with_frozen=True)]
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
    """A freshly restored engine against the files: master, moments, working weights, and small ones that stay gathered."""
    differ, compared = [], 0
    persistent = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.ds_persist]
    for name, parameter in persistent:  # first: a look through GatheredParameters would leave them partitioned
        if (parameter.requires_grad or reader.with_frozen) and not torch.equal(parameter.data, reader.whole(name).to(parameter.dtype)):
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
    return {"compared": compared, "persistent": len(persistent), "differ": differ, "step": partitions.optimizer_step(engine)}


def views(parameter: Any) -> dict[str, torch.Tensor]:
    if parameter.requires_grad:
        moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in partitions.MOMENTS}
        return {"master": safe_get_full_fp32_param(parameter), **moments}
    with gather_for_reading([parameter]):
        return {"frozen": parameter.detach().clone()}


SCENARIOS = {"train": train}


def run(folder: Path, scenarios: list[dict[str, Any]]) -> int:
    training.leave_process_group = lambda: None  # the next scenario needs it
    return run_scenarios(SCENARIOS, folder, scenarios)


if __name__ == "__main__":
    serve(run)
