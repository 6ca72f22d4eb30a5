"""Where a run goes on: from which checkpoint, with which accepted changes, or that nothing is left to do.

Training asks it on every rank, `jp-train check` and the launcher before there is any: without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jp_train.config import RunConfig
from jp_train.engine.checkpoint.files import Checkpoint
from jp_train.engine.checkpoint.finding import CheckpointFinder
from jp_train.engine.checkpoint.identity import accepted_differences, training_identity
from jp_train.engine.state import TrainState
from jp_train.engine.watch.stop import Stop, decide


@dataclass(frozen=True, kw_only=True)
class Standing:
    """`checkpoint`: to resume from, None for a new run. `accepted`: the differences that `checkpoint.accept` lets
    pass. `finished`: why nothing is left to do."""

    checkpoint: Checkpoint | None
    accepted: list[str]
    finished: Stop | None
    gone_back: bool = False
    """`checkpoint.resume_from` was obeyed before: the run goes on from its newest checkpoint."""

    def nothing_to_do(self, run_dir: str) -> str:
        """The sentence about a finished run; empty for any other."""
        if self.finished is None:
            return ""
        return (
            f"nothing to do, {run_dir} is finished ({self.finished.reason}); to train on, raise its steps or use "
            "another run_dir"
        )


def standing_of(
    cfg: RunConfig, finder: CheckpointFinder, *, on_damage: Callable[[str], None] = lambda text: None
) -> Standing:
    """Look at the run folder: the newest checkpoint, or that of `checkpoint.resume_from` where this run has not yet
    gone back to it. Collective.

    Raises CheckpointError when there is none of that step, when none is whole, and when the configuration differs from
    the checkpoint's in a key that `checkpoint.accept` does not name.
    """
    back_to, identity = cfg.checkpoint.resume_from, training_identity(cfg)
    done = back_to is not None and finder.went_back_to(back_to, identity)
    checkpoint = finder.newest(on_damage=on_damage) if done or back_to is None else finder.at_step(back_to)
    if checkpoint is None:
        return Standing(checkpoint=None, accepted=[], finished=None)
    accepted = accepted_differences(checkpoint.path, checkpoint.manifest["identity"], identity, cfg.checkpoint.accept)
    # later checkpoints, and the export made of them, give way to this one
    goes_back = checkpoint.step == back_to and finder.has_later(checkpoint.step)
    finished = None if goes_back else already_finished(cfg, checkpoint)
    return Standing(checkpoint=checkpoint, accepted=accepted, finished=finished, gone_back=done)


def already_finished(cfg: RunConfig, checkpoint: Checkpoint) -> Stop | None:
    """Why nothing is left to do, None when there is: steps, or a missing export."""
    if cfg.checkpoint.export_at_end and not (Path(cfg.run_dir) / "export").is_dir():
        return None
    state = TrainState.restored(cfg, checkpoint.state["training"])
    return decide(cfg.stage, step=state.step, signal_number=0, patience_over=state.patience.over)
