"""What a checkpoint folder looks like, and how all ranks agree about one.

    checkpoints/step_0000100/manifest.json     step, ranks, sizes and checksums of every other file, code and package
                                               versions
                             state.json        plan state, counters, patience, freeze proof
                             config.yaml       the resolved configuration
                             partitions.json   how parameters are cut (model/partition_files.py)
                             rank_00000.safetensors   this rank's slices of weights and moments, and its random states
                             vq.safetensors    the VQ tokenizer, where frozen weights are kept too
    checkpoints/latest, best                   names of the newest and of the best one (for people and scripts: resume
                                               does not trust them)

`store.py` writes them, `finding.py` finds and `reading.py` reads them.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jp_train.engine.checkpoint.disk import with_advice
from jp_train.errors import CheckpointError, JpTrainError
from jp_train.files import BLOCK

FORMAT = 2
VQ_FILE = "vq.safetensors"
DAMAGED_FILE = "DAMAGED"
"""Lies in a checkpoint that a resume has found damaged, with the reason: a later attempt, which need not look at it
again, knows too."""
SMALL_FILE = 1 << 20
"""Text files up to this many bytes get a SHA-256, everything else a CRC-32 (which a rank computes at over 1 GB/s)."""
SHOWN = 2
"""Ranks whose errors a message spells out: a full disk fails them all."""
_NAME = re.compile(r"step_(\d{7,})$")

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `path` is its folder, `manifest` and `state` the parsed files."""

    path: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]


class RankGroup:
    """All ranks of a run as seen from one of them: both methods are collective."""

    def __init__(self, dp_rank: int, dp_world_size: int) -> None:
        self.rank, self.world = dp_rank, dp_world_size

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], T], what: str, folder: Path, damaged: Collection[str] = ()) -> T:
        """Run on rank 0; its value is returned on every rank, its failure raised there as a CheckpointError.
        `folder` and `damaged` go into advice about space."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = action()
            except OSError as error:
                box[1] = f"{what}: {with_advice(error, folder, damaged)}"
            except JpTrainError as error:
                box[1] = f"{what}: {error}"
        if self.world > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(box, src=0)
        if box[1]:
            raise CheckpointError(box[1])
        return box[0]


def step_name(step: int) -> str:
    """The folder of the checkpoint after `step` completed steps."""
    return f"step_{step:07d}"


def step_of(name: str) -> int:
    """The step in a folder's name; -1 for another name."""
    match = _NAME.match(name)
    return int(match[1]) if match else -1


def checkpoint_names(folder: Path, until: int | None = None) -> list[str]:
    """Checkpoints, oldest first. `until` leaves out those of later steps: they were passed over as damaged when this
    attempt resumed."""
    if not folder.is_dir():
        return []
    checkpoints = [
        (step, path.name) for path in folder.iterdir() if path.is_dir() and (step := step_of(path.name)) >= 0
    ]
    return [name for step, name in sorted(checkpoints) if until is None or step <= until]


def size_and_checksum(file: Path, *, crc: bool = False) -> dict[str, Any]:
    """Size and checksum of a file, as a manifest has them."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= SMALL_FILE and not crc:
            return {"size": size, "sha256": hashlib.sha256(stream.read()).hexdigest()}
        total = 0
        while block := stream.read(BLOCK):
            total = zlib.crc32(block, total)
    return {"size": size, "crc32": f"{total:08x}"}


def joined_errors(errors: list[str]) -> str:
    """The errors of some ranks in one line."""
    return "; ".join(errors[:SHOWN]) + (f"; and {len(errors) - SHOWN} more ranks" if len(errors) > SHOWN else "")
