"""Going back to a chosen checkpoint (`checkpoint.resume_from`): what came after it becomes a run folder of its own.

    abandoned/step_0000012_back_to_0000004/checkpoints/     the checkpoints after step 4, moved
                                           export, wandb/run_id   moved: the run that goes on makes its own
                                           metrics.jsonl ...      copied, before the run drops its lines after step 4
                                           config.yaml            of the newest of those checkpoints

So nothing of it is lost, nothing of it is resumed by mistake, `jp-train report RUN RUN/abandoned/...` compares the two
curves, and `run_dir=RUN/abandoned/...` goes on where the run was before.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from jp_train.data.ledger import LEDGER_FILE
from jp_train.data.snapshots import SNAPSHOTS_FILE
from jp_train.engine.checkpoint.disk import ABANDONED
from jp_train.engine.checkpoint.files import checkpoint_names, step_name, step_of
from jp_train.files import fsync, write_atomically

LOGS = ("metrics.jsonl", LEDGER_FILE, "events.jsonl", SNAPSHOTS_FILE)
"""Files of the run folder whose lines up to a checkpoint's step must outlive a power cut if the checkpoint does."""
MOVED = ("export", "wandb/run_id")
"""What the run that goes on makes anew: the weights of its own end, and a curve of its own."""


@dataclass(frozen=True)
class Abandoned:
    """`folder` holds what a run had beyond the step that it went back to; `from_step`: its newest checkpoint."""

    folder: Path
    from_step: int


def abandon_after(run_dir: Path, step: int) -> Abandoned | None:
    """Move the checkpoints after `step`, damaged ones too, and what belongs to them out of the run; None where there
    are none. Raises OSError.

    The newest is moved last: a crash in the middle leaves a run that resumes where it was, and going back once more
    completes the same folder.
    """
    checkpoints = run_dir / "checkpoints"
    later = [name for name in checkpoint_names(checkpoints) if step_of(name) > step]
    if not later:
        return None
    folder = _folder(run_dir, later[-1], step)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for source in (*(run_dir / name for name in LOGS), checkpoints / later[-1] / "config.yaml"):
        if source.is_file():
            shutil.copyfile(source, folder / source.name)
            fsync(folder / source.name)
    for name in MOVED:
        if (run_dir / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            os.rename(run_dir / name, folder / name)
    for name in later:
        os.rename(checkpoints / name, folder / "checkpoints" / name)
    for changed in (folder, folder / "checkpoints", checkpoints, run_dir):
        fsync(changed)
    write_atomically(checkpoints / "latest", step_name(step) + "\n")
    return Abandoned(folder, step_of(later[-1]))


def _folder(run_dir: Path, newest: str, step: int) -> Path:
    """A folder that does not hold that checkpoint from an earlier time."""
    first = folder = run_dir / ABANDONED / f"{newest}_back_to_{step:07d}"
    number = 1
    while (folder / "checkpoints" / newest).exists():
        number += 1
        folder = first.with_name(f"{first.name}_{number}")
    return folder
