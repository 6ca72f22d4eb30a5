"""What training would say about the run folder before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jp_train.cluster.facts import disk, nearest
from jp_train.cluster.preflight import checkpoint_bytes
from jp_train.engine.checkpoint.disk import require_space
from jp_train.engine.checkpoint.files import Checkpoint, RankGroup
from jp_train.engine.checkpoint.finding import CheckpointFinder
from jp_train.engine.checkpoint.resume import standing_of
from jp_train.run.lock import require_free, unwritable
from jp_train.tools.check.subject import Subject


def run_folder(subject: Subject) -> dict[str, Any]:
    """`step`: completed steps of the checkpoint to go on from, None for a new run; `accepted`: differences that
    `checkpoint.accept` lets pass; `finished`: the sentence of a run with nothing left to do, else empty.

    Raises LaunchError (in use), CheckpointError (another configuration, no whole checkpoint, no room for the next one)
    and ConfigError (not writable). Checksums are left to training.
    """
    config, folder = subject.config, Path(subject.config.run_dir)
    require_free(folder)
    written = disk(folder) if subject.here else {}  # preflight looks at the disks of the ranks' hosts
    if "error" in written:
        subject.problem(unwritable(folder, OSError(written["errno"], written["error"], written["there"])))
    finder = CheckpointFinder(folder / "checkpoints", RankGroup(0, 1), contents=False)
    standing = standing_of(config, finder, on_damage=subject.warnings.append)
    subject.finished = standing.nothing_to_do(config.run_dir)
    if subject.here and not subject.finished:
        needed = _size(standing.checkpoint) or checkpoint_bytes(config)
        require_space(nearest(finder.folder), needed, "the next checkpoint", finder.damaged)
    return {
        "step": None if standing.checkpoint is None else standing.checkpoint.step,
        "accepted": standing.accepted,
        "finished": subject.finished,
    }


def _size(checkpoint: Checkpoint | None) -> int:
    """Bytes of all its files, 0 without one."""
    return sum(file["size"] for file in checkpoint.manifest["files"].values()) if checkpoint else 0
