"""Reads the checkpoint that `finding.py` found back, for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from jp_train.engine.checkpoint.files import VQ_FILE, Checkpoint, joined_errors
from jp_train.engine.checkpoint.finding import CheckpointFinder
from jp_train.engine.checkpoint.rng import PREFIX, derive_rng, restore_rng
from jp_train.errors import CheckpointError
from jp_train.model.partition_files import PartitionReader, ShardReader, rank_file


class CheckpointReader(CheckpointFinder):
    """The `checkpoints/` folder of one run, to read. Every method is called by all ranks."""

    def load(
        self, checkpoint: Checkpoint, fill: Callable[[PartitionReader], None], vq: torch.nn.Module | None = None
    ) -> None:
        """Read a checkpoint of any number of ranks: `fill` takes weights and optimizer state, `vq` its weights; random
        states are set. Collective.

        `fill` may not run collectives. Raises CheckpointError on every rank when one rank cannot read its part.
        """
        rank, failure = self._group.rank, None
        try:
            reader = PartitionReader(checkpoint.path)
            fill(reader)
            reader.close()
            if vq is not None and (checkpoint.path / VQ_FILE).exists():
                _load_vq(vq, checkpoint.path / VQ_FILE)
            if rank < reader.world:
                shard = ShardReader(checkpoint.path / rank_file(rank))
                restore_rng({name: shard.read(name) for name in shard.keys() if name.startswith(PREFIX)})  # noqa: SIM118 - not a dict
                shard.close()
            else:
                derive_rng(checkpoint.manifest["identity"].get("seed"), checkpoint.step, rank)
        except CheckpointError as error:
            failure = f"rank {rank}: {error}"
        failures = [text for text in self._group.gather(failure) if text]
        if failures:
            raise CheckpointError(joined_errors(failures))


def _load_vq(vq: torch.nn.Module, path: Path) -> None:
    reader = ShardReader(path)
    with torch.no_grad():
        for name, parameter in vq.named_parameters():
            if reader.shape(f"model.{name}") != tuple(parameter.shape):
                raise CheckpointError(
                    f"{path}: model.{name} is {list(reader.shape(f'model.{name}'))}, model.vq says "
                    f"{list(parameter.shape)}"
                )
            parameter.copy_(reader.read(f"model.{name}").view(parameter.shape))
    reader.close()
